"""Claim by claim: what the paper says, what was measured here, and the verdict, from the rows.

A verdict is computed: where the paper's own setting was run in full, "reproduced" or "not"; on
shorter runs, other data or smaller models, "partly" where the claim holds there and "not so far"
where it does not; "too short to tell" where runs are there and nothing can be concluded from
them; "not yet run" without any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

from scripts.evidence.every_source import key_of
from scripts.evidence.evidence import (
    Comparison,
    Evidence,
    better,
    has_learned,
    is_papers,
    matches,
    of,
    shown,
)
from scripts.evidence.paper import paper_rows
from scripts.evidence.rows import Row, score, title
from scripts.evidence.theorem_check import largest_errors
from scripts.sharding.validation import called, fastest

REPRODUCED, PARTLY, NOT_SO_FAR, NOT = "reproduced", "partly", "not so far", "not"
TOO_SHORT, NOT_YET = "too short to tell", "not yet run"
VERDICTS = (REPRODUCED, PARTLY, NOT_SO_FAR, NOT, TOO_SHORT, NOT_YET)
RNNS = ("lstm_chars", "gru_chars", "gru_words", "gru_pixels")
EXACT = 1e-12  # float64, a handful of operations


@dataclass(frozen=True)
class Finding:
    """What was measured, the verdict, and the rows it rests on, by experiment."""

    measured: list[str]  # a line per experiment
    verdict: str
    rows: dict[str, list[Row]]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, where it stands, the command that makes the rows, and the judge."""

    text: str
    where: str
    command: str
    judge: Callable[[Evidence], Finding]


NOTHING = Finding(["nothing yet"], NOT_YET, {})


def judged(key: str, comparison: Comparison) -> Finding:
    """The verdict on one comparison of one experiment's rows."""
    return together({key: [comparison]})


def together(comparisons: dict[str, list[Comparison]]) -> Finding:
    """One verdict on many comparisons, by experiment: it holds if each does."""
    rows = {key: [row for c in found for row in c.rows] for key, found in comparisons.items()}
    found = [c for several in comparisons.values() for c in several]
    if not found:
        return NOTHING
    held = sum(c.holds for c in found)
    parts = [
        f"{title(rows[key][0])}: " + "; ".join(c.text for c in several)
        for key, several in comparisons.items()
        if several
    ]
    if len(found) > 1:
        parts.append(f"It holds in {held} of {len(found)} comparisons.")
    whole = all(is_papers(key, used) for key, used in rows.items())
    return Finding(parts, verdict_of(held, len(found), whole), rows)


def verdict_of(held: int, tried: int, whole: bool) -> str:
    """``held`` of ``tried`` comparisons hold; ``whole``: in the paper's own settings."""
    if held < tried / 2:
        return NOT if whole else NOT_SO_FAR
    return REPRODUCED if held == tried and whole else PARTLY


def matches_backprop(key: str, k: int) -> Callable[[Evidence], Finding]:
    def judge(evidence: Evidence) -> Finding:
        rows = evidence.rows(key)
        ours, exact = of(rows, "highway", k), of(rows, "bp")
        if exact and not has_learned(key, exact):
            return too_short(key, exact)
        if not ours or not exact:
            return NOTHING
        return judged(key, matches(ours, exact))

    return judge


def too_short(key: str, exact: list[Row]) -> Finding:
    text = f"{title(exact[0])}: {shown(exact)}, hardly more than a guess"
    return Finding([text], TOO_SHORT, {key: exact})


def theorem(_: Evidence) -> Finding:
    sums, exact = largest_errors()
    held = max(sums, exact) < EXACT
    text = (
        f"six layers, float64, computed for this page: at every k within {sums:.0e} of the sum "
        f"over paths, at k = L within {exact:.0e} of autograd; on many more architectures by "
        "tests/highway_bp/test_paths.py"
    )
    return Finding([text], REPRODUCED if held else NOT, {})


def residual_path_alone(evidence: Evidence) -> Finding:
    """k = 0 trains, and is worse than backpropagation."""
    rows = evidence.rows("resnet32")
    none, exact = of(rows, "highway", 0), of(rows, "bp")
    if not none or not exact:
        return NOTHING
    comparison = better(exact, none)
    above_chance = fmean(map(score, none)) > 20.0  # ten classes: 10 %
    return judged("resnet32", replace(comparison, holds=comparison.holds and above_chance))


def five_iterations(evidence: Evidence) -> Finding:
    """The largest k up to five that was run, against backpropagation, everywhere."""
    found: dict[str, list[Comparison]] = {}
    for key in paper_rows():
        rows = evidence.rows(key)
        ks = [row["k"] for row in of_any_k(rows, "highway") if row["k"] <= 5]
        exact = of(rows, "bp")
        if ks and exact and has_learned(key, exact):
            found[key] = [matches(of(rows, "highway", max(ks)), exact)]
    return together(found)


def plain_split_of_gpt2_fails(evidence: Evidence) -> Finding:
    """A run with gamma = 0 that scores as backpropagation does speaks against it."""
    rows = evidence.rows("gpt2")
    plain = [row for row in of_any_k(rows, "highway") if row["gamma"] == 0.0]
    return fails(
        "gpt2", of(plain, "highway", max((row["k"] for row in plain), default=0)), of(rows, "bp")
    )


def fixed_point_fails_on_pixels(evidence: Evidence) -> Finding:
    rows = evidence.rows("gru_pixels")
    return fails("gru_pixels", of(rows, "fixed_point", 10), of(rows, "bp"))


def fails(key: str, rows: list[Row], exact: list[Row]) -> Finding:
    """The verdict on the claim that ``rows`` do not match ``exact``."""
    if not rows or not exact:
        return NOTHING
    if not has_learned(key, exact):
        return too_short(key, exact)
    comparison = matches(rows, exact)
    return judged(key, replace(comparison, holds=not comparison.holds))


def better_than_fixed_point(evidence: Evidence) -> Finding:
    """At every k that both were run with, k = 0 aside."""
    found = {}
    for key in RNNS:
        rows = evidence.rows(key)
        ks = sorted(
            {r["k"] for r in of_any_k(rows, "highway")}
            & {r["k"] for r in of_any_k(rows, "fixed_point")}
        )
        found[key] = [better(of(rows, "highway", k), of(rows, "fixed_point", k)) for k in ks]
    return together({key: several for key, several in found.items() if several})


def of_any_k(rows: list[Row], grad: str) -> list[Row]:
    return [row for row in rows if row["grad"] == grad and row["k"]]


def perplexity_of_k_0(evidence: Evidence) -> Finding:
    rows = of(evidence.rows("gru_words"), "highway", 0)
    if not rows:
        return NOTHING
    comparison = Comparison(shown(rows), abs(fmean(map(score, rows)) - 50.0) < 5.0, rows)
    if not is_papers("gru_words", rows):  # another vocabulary is another perplexity
        return Finding(
            [f"{title(rows[0])}: {shown(rows)}; another setting, not comparable"],
            TOO_SHORT,
            {"gru_words": rows},
        )
    return judged("gru_words", comparison)


def speed_of_recurrence(evidence: Evidence) -> Finding:
    """Table 3's speed-ups over a loop of cells."""
    record = evidence.benches.get("bench_rnn_paper")
    if record is None:
        return NOTHING
    device = record["environment"]["device"]
    parts, held = [], []
    for found in record["paper"]:
        key = found["row"]
        loop = {k: found["ms"]["loop"] / found["ms"][f"k{k}"] for k in paper_rows()[key].speedup}
        held += [ratio > 1 for ratio in loop.values()]
        shown_ = ", ".join(
            f"k = {k}: {ratio:.2f} (paper {paper_rows()[key].speedup[k]:g})"
            for k, ratio in loop.items()
        )
        parts.append(f"{found['shape']}: {shown_}")
    parts.insert(0, f"times faster than a loop over cells, on {device}:")
    return Finding(parts, verdict_of(sum(held), len(held), whole="CPU" not in device), {})


def memory(evidence: Evidence) -> Finding:
    """Two more states per layer than backpropagation, at most."""
    record = evidence.benches.get("bench_engine")
    if record is None:
        return NOTHING
    name = "hidden_states_per_layer_above_bp_k2"
    found = {load: w["memory"][name] for load, w in record["workloads"].items() if "memory" in w}
    text = ", ".join(f"{load} {value:.2f}" for load, value in found.items())
    held = sum(value <= 2.0 for value in found.values())
    return Finding(
        [f"hidden states per layer above backpropagation's peak, k = 2: {text}"],
        verdict_of(held, len(found), whole=True),
        {},
    )


def errors_fall(evidence: Evidence) -> Finding:
    """Figure 6: at every moment the cosine rises with k."""
    used: dict[str, list[Row]] = {}
    for name, rows in evidence.results.setups.items():
        used.setdefault(key_of(name), []).extend(r for r in rows if "gradient_error" in r["curve"])
    used = {key: rows for key, rows in used.items() if rows}
    if not used:
        return NOTHING
    moments = [
        moment["cosine"]
        for rows in used.values()
        for row in rows
        for moment in row["curve"]["gradient_error"]
    ]
    held = sum(all(b >= a - 1e-3 for a, b in pairwise(cosines)) for cosines in moments)
    whole = all(key in paper_rows() and is_papers(key, rows) for key, rows in used.items())
    return Finding(
        [
            f"the cosine with the exact gradient rises with every k at {held} of "
            f"{len(moments)} moments of training, in {len(used)} networks"
        ],
        verdict_of(held, len(moments), whole),
        used,
    )


def shared_backward(evidence: Evidence) -> Finding:
    """Layers on two processes: the backward pass beside that of one process."""
    record = evidence.benches.get("bench_sharded")
    if record is None or not {"1", "2"} <= record["processes"].keys():
        return NOTHING
    one = record["processes"]["1"]["seconds"]["bp_backward"]
    two = record["processes"]["2"]["seconds"]
    ratios = {name: two[f"{name}_backward"] / one for name in ("bp", "k0", "k1")}
    text = (
        f"two processes on {record['environment']['device']}: backward pass over that of one "
        f"process: k = 0 {ratios['k0']:.2f}, k = 1, which is exact, {ratios['k1']:.2f}, "
        f"backpropagation {ratios['bp']:.2f}; parameters' gradients included, which Eq. 13 "
        "leaves out; not measured on more devices"
    )
    (exact, least), *ours = fastest(two)
    shown = ", ".join(f"k = {k} {way[1] / least:.2f}" for k, way in enumerate(ours))
    steps = f"whole steps, over those of the fastest exact strategy ({called(exact)}): {shown}"
    return Finding([text, steps], verdict_of(ratios["k0"] < 0.6, 1, whole=False), {})


CLAIMS = [
    Claim(
        "k iterations give the sum over all paths through at most k blocks; k = L is exact",
        "Theorems 1 and 2",
        "make test",
        theorem,
    ),
    Claim(
        "k = 0, the residual path alone, trains, and ends below backpropagation",
        "Figure 2",
        "make sweep ROW=resnet32",
        residual_path_alone,
    ),
    Claim(
        "ResNet-32 matches backpropagation at k = 3",
        "Figure 2, review discussion",
        "make sweep ROW=resnet32",
        matches_backprop("resnet32", 3),
    ),
    Claim(
        "ResNet-110 matches backpropagation at k = 4, with L = 54",
        "section 4, Figure 2",
        "make sweep ROW=resnet110",
        matches_backprop("resnet110", 4),
    ),
    Claim(
        "ResNet-56 on ImageNet32 matches at k = 5",
        "Figure 2",
        "make sweep ROW=resnet56",
        matches_backprop("resnet56", 5),
    ),
    Claim(
        "GPT-2 diverges with the plain split, gamma = 0, and needs gamma = 0.2",
        "appendix C.3",
        "python train.py -m experiment=gpt2_wikitext103 gamma=0,0.2",
        plain_split_of_gpt2_fails,
    ),
    Claim(
        "GPT-2 matches backpropagation at k = 5",
        "Figures 2 and 3",
        "make sweep ROW=gpt2",
        matches_backprop("gpt2", 5),
    ),
    Claim(
        "RoBERTa can be fine-tuned with few iterations (k = 3)",
        "Figure 2",
        "make sweep ROW=roberta",
        matches_backprop("roberta", 3),
    ),
    Claim(
        "about five iterations suffice in most cases",
        "section 4, conclusion",
        "make sweep ROW=...",
        five_iterations,
    ),
    Claim(
        "Highway-BP is better than fixed-point iteration at equal k",
        "Figure 4",
        "make sweep ROW=gru_chars",
        better_than_fixed_point,
    ),
    Claim(
        "the GRU on pixels matches backpropagation at k = 10",
        "Figure 4",
        "make sweep ROW=gru_pixels",
        matches_backprop("gru_pixels", 10),
    ),
    Claim(
        "fixed-point iteration fails on pixels, where the only loss is at the end",
        "Figure 4",
        "make sweep ROW=gru_pixels",
        fixed_point_fails_on_pixels,
    ),
    Claim(
        "the 3-layer GRU reaches a perplexity of about 50 with k = 0",
        "section 4",
        "make sweep ROW=gru_words",
        perplexity_of_k_0,
    ),
    Claim(
        "recurrent networks train up to 3.5 times faster than by a loop over cells",
        "Tables 3 and 6",
        "python scripts/bench_rnn.py --parts paper",
        speed_of_recurrence,
    ),
    Claim(
        "memory: at most two more hidden states per layer than backpropagation",
        "appendix D",
        "python scripts/bench_engine.py",
        memory,
    ),
    Claim(
        "the gradient comes closer to the exact one with every k, all through training",
        "Figure 6",
        "python train.py grad=bp diagnostics=figure6",
        errors_fall,
    ),
    Claim(
        "with a device per layer, the backward pass takes k / L of its time",
        "Eq. 13, appendix E",
        "python scripts/bench_sharded.py",
        shared_backward,
    ),
]
