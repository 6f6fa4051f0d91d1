"""Every claim of the paper, what was measured, and what follows; the rules are in judge.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np
from scipy import stats

from scripts.evidence.judge import (
    LEVEL,
    Finding,
    Outcome,
    better_at_equal_k,
    combined,
    diverges,
    matches,
    said,
    worse,
)
from scripts.evidence.paper import paper_row, paper_rows
from scripts.evidence.results_io import Results
from scripts.evidence.rows import Row, score
from scripts.evidence.settings import ENOUGH, Setting
from scripts.evidence.theorem_check import largest_errors

RNNS = ("lstm_chars", "gru_chars", "gru_words", "gru_pixels")
EXACT = 1e-12  # float64, a handful of operations
SLACK = 0.5  # points of accuracy about a printed score


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, where it stands, whose runs decide it, and the judge."""

    text: str
    where: str
    judge: Callable[[Results], Finding]
    keys: tuple[str, ...] = ()  # of paper.yaml
    command: str = ""  # where no runs but a measurement decides


def nothing() -> Finding:
    return combined([])


def in_best(
    results: Results, key: str, judge: Callable[[Setting], Finding], full_only: bool = False
) -> Finding:
    """By the first setting of an experiment that says something; else by the first one."""
    settings = [s for s in results.settings[key] if s.full or not full_only]
    findings = [judge(setting) for setting in settings]
    told = (Outcome.HOLDS, Outcome.FAILS, Outcome.UNDECIDED)
    order = [
        *(f for f in findings if f.outcome in told),
        *(f for f in findings if f.outcome is not Outcome.NOT_RUN),
    ]
    return next(iter(order), nothing())


def matches_at(key: str, k: int | None, gamma: float | None = None) -> Callable:
    """Highway-BP at k, or at the largest k up to five that there is, against backpropagation."""

    def judge(setting: Setting) -> Finding:
        ks = [m for m in setting.ks("highway", gamma) if m <= 5]
        at = k if k is not None or not ks else max(ks)
        return matches(setting, setting.arm("highway", at, gamma))

    return lambda results: in_best(results, key, judge)


def theorem(_: Results) -> Finding:
    sums, exact = largest_errors()
    line = (
        f"six layers, float64, computed for this page: at every k within {sums:.0e} of the sum "
        f"over paths, at k = L within {exact:.0e} of autograd; on many more architectures in "
        "tests/highway_bp/test_paths.py"
    )
    held = max(sums, exact) < EXACT
    return Finding([line], Outcome.HOLDS if held else Outcome.FAILS, full=True)


def residual_path_alone(results: Results) -> Finding:
    return in_best(results, "resnet32", lambda s: worse(s, s.arm("highway", 0), s.arm("bp")))


def reaches(key: str, printed: dict[tuple[str, int | None], float]) -> Callable:
    """In full: the mean of every arm is no less than its printed score but for SLACK points."""

    def judge(setting: Setting) -> Finding:
        found = []
        for (grad, k), value in printed.items():
            rows = setting.arm(grad, k)
            if not rows:
                continue
            scores = [score(row) for row in rows]
            line = f"{setting}: {said(setting, rows)}, printed {value:g}"
            if len(scores) < ENOUGH:
                found.append(Finding([line], Outcome.TOO_FEW, True, rows))
                continue
            low, high = stats.t.interval(
                LEVEL, len(scores) - 1, fmean(scores), max(stats.sem(scores), 1e-9)
            )
            outcome = Outcome.UNDECIDED
            if low > value - SLACK:
                outcome = Outcome.HOLDS
            elif high < value - SLACK:
                outcome = Outcome.FAILS
            found.append(Finding([f"{line} [{low:.2f}, {high:.2f}]"], outcome, True, rows))
        return combined(found)

    return lambda results: in_best(results, key, judge, full_only=True)


def five_iterations(results: Results) -> Finding:
    """The largest k up to five in every experiment that has learned."""
    findings = [matches_at(key, None)(results) for key in paper_rows()]
    told = (Outcome.HOLDS, Outcome.FAILS, Outcome.UNDECIDED)
    decided = [f for f in findings if f.outcome in told]
    found = combined(decided or [f for f in findings if f.outcome is Outcome.TOO_FEW])
    held = sum(f.outcome is Outcome.HOLDS for f in decided)
    if decided and held > len(decided) / 2 and len(decided) >= ENOUGH:  # "in most cases"
        found = Finding(found.lines, Outcome.HOLDS, all(f.full for f in decided), found.rows)
    lines = [*found.lines, f"holds in {held} of the {len(decided)} experiments that can be judged"]
    return Finding(lines, found.outcome, found.full, found.rows)


def better_than_fixed_point(results: Results) -> Finding:
    def judge(setting: Setting) -> Finding:
        ks = [k for k in setting.ks("highway") if k and k in setting.ks("fixed_point")]
        return better_at_equal_k(setting, ks) if ks else nothing()

    return combined(
        [f for key in RNNS if (f := in_best(results, key, judge)).outcome is not Outcome.NOT_RUN]
    )


def worse_without_carry(results: Results) -> Finding:
    """k = 0: the fixed point has the losses' own gradients alone."""

    def judge(setting: Setting) -> Finding:
        return worse(setting, setting.arm("fixed_point", 0), setting.arm("highway", 0))

    return combined(
        [f for key in RNNS if (f := in_best(results, key, judge)).outcome is not Outcome.NOT_RUN]
    )


def fixed_point_fails_on_pixels(results: Results) -> Finding:
    def judge(setting: Setting) -> Finding:
        ks = [k for k in setting.ks("fixed_point") if k]
        return combined(
            [worse(setting, setting.arm("fixed_point", k), setting.arm("bp")) for k in ks]
        )

    return in_best(results, "gru_pixels", judge)


def perplexity_of_k_0(results: Results) -> Finding:
    def judge(setting: Setting) -> Finding:
        rows = setting.arm("highway", 0)
        if len(rows) < ENOUGH:
            outcome = Outcome.TOO_FEW if rows else Outcome.NOT_RUN
            return Finding([f"{setting}: {said(setting, rows)}"], outcome, True, rows)
        near = abs(fmean(map(score, rows)) - 50.0) < 5.0
        outcome = Outcome.HOLDS if near else Outcome.FAILS
        return Finding([f"{setting}: {said(setting, rows)}"], outcome, True, rows)

    return in_best(results, "gru_words", judge, full_only=True)


def plain_split_diverges(results: Results) -> Finding:
    return in_best(results, "gpt2", lambda s: diverges(s, 0.0, 0.2))


def measured_shapes(results: Results) -> tuple[str, list[dict]]:
    """The device and the paper's four shapes on it, a GPU first."""
    records = [r for r in results.records("bench_rnn*.json").values() if r.get("paper")]
    records = [r for r in records if not r.get("tf32")]
    records.sort(key=lambda r: "CPU" in r["environment"]["device"])
    if not records:
        return "", []
    return records[0]["environment"]["device"], records[0]["paper"]


def speed_of_recurrence(results: Results) -> Finding:
    """Table 3's speed-ups over a loop of cells, and those over torch's own layer."""
    device, shapes = measured_shapes(results)
    lines, held = [], []
    for found in shapes:
        printed = paper_row(found["row"]).speedup
        ratios = {k: found["ms"]["loop"] / found["ms"][f"k{k}"] for k in printed}
        held += [ratio >= printed[k] for k, ratio in ratios.items()]
        shown = ", ".join(
            f"k = {k}: {ratio:.1f} (paper {printed[k]:g}; over torch.nn "
            f"{found['speedup'][f'k{k}']:.2f})"
            for k, ratio in ratios.items()
        )
        lines.append(f"{found['shape']}: {shown}")
    return on_gpu(device, "times faster than a loop over cells", lines, held)


def cost_beside_fixed_point(results: Results) -> Finding:
    """Table 6: a step of Highway-BP beside one of the fixed point at equal k."""
    device, shapes = measured_shapes(results)
    lines, held = [], []
    for found in shapes:
        table = paper_row(found["row"]).milliseconds
        ks = [k for k in table["highway"] if f"k{k}" in found["ms"] and f"fp{k}" in found["ms"]]
        ratios = [found["ms"][f"k{k}"] / found["ms"][f"fp{k}"] for k in ks]
        papers = [table["highway"][k] / table["fixed_point"][k] for k in ks]
        held.append(fmean(ratios) <= max(papers))
        lines.append(
            f"{found['shape']}: {min(ratios):.2f} to {max(ratios):.2f} times "
            f"(paper {min(papers):.2f} to {max(papers):.2f})"
        )
    return on_gpu(device, "Highway-BP's step over the fixed point's, k = 0 to 20", lines, held)


def on_gpu(device: str, what: str, lines: list[str], held: list[bool]) -> Finding:
    """What was measured on a CPU says nothing of a GPU."""
    if not lines:
        return Finding(["nothing yet"], Outcome.NOT_MEASURED)
    outcome = Outcome.HOLDS if all(held) else Outcome.UNDECIDED if any(held) else Outcome.FAILS
    if "CPU" in device:
        outcome = Outcome.NOT_MEASURED
    return Finding([f"{what}, on {device}:", *lines], outcome, full=True)


def memory(results: Results) -> Finding:
    """Two more states per layer than backpropagation, at most."""
    record = results.records("bench_engine.json").get("bench_engine")
    if record is None:
        return Finding(["nothing yet"], Outcome.NOT_MEASURED)
    name = "hidden_states_per_layer_above_bp_k2"
    found = {load: w["memory"][name] for load, w in record["workloads"].items() if "memory" in w}
    text = ", ".join(f"{load} {value:.2f}" for load, value in found.items())
    held = all(value <= 2.0 for value in found.values())
    line = f"hidden states per layer above backpropagation's peak, k = 2: {text}"
    return Finding([line], Outcome.HOLDS if held else Outcome.FAILS, full=True)


def moments_of(results: Results) -> list[tuple[Setting, Row]]:
    """The runs that measured the gradient's error, of every experiment's best setting."""
    return [
        (setting, row)
        for _, setting in results.chosen
        if setting and setting.learned
        for row in setting.arm("bp")
        if "gradient_error" in row["curve"]
    ]


def of_moments(
    results: Results, what: str, holds: Callable[[list[dict]], Iterable[bool]]
) -> Finding:
    """A claim on Figure 6: counted over all networks, by the moments of each run."""
    found = moments_of(results)
    if not found:
        return nothing()
    kept = [list(holds(row["curve"]["gradient_error"])) for _, row in found]
    held, tried = sum(map(sum, kept)), sum(map(len, kept))
    networks = {setting.paper.title for setting, _ in found}
    line = f"{what} {held} of {tried} times, in {len(networks)} networks: {', '.join(networks)}"
    full = all(setting.full for setting, _ in found)
    outcome = Outcome.HOLDS if held >= LEVEL * tried else Outcome.UNDECIDED
    if held < tried / 2:
        outcome = Outcome.FAILS
    return Finding([line], outcome, full, [row for _, row in found])


def errors_fall(results: Results) -> Finding:
    return of_moments(
        results,
        "the cosine with the exact gradient rises with every k:",
        lambda moments: (all(b >= a - 1e-3 for a, b in pairwise(m["cosine"])) for m in moments),
    )


def errors_grow(results: Results) -> Finding:
    def grows(moments: list[dict]) -> Iterable[bool]:
        """Per k, from a tenth of training to its end."""
        first, last = moments[min(1, len(moments) - 1)], moments[-1]
        return (
            a <= b for a, b in zip(first["relative_error"], last["relative_error"], strict=True)
        )

    return of_moments(results, "the error at a k is larger at the end than after a tenth:", grows)


def increments_shrink(results: Results) -> Finding:
    def shrink(moments: list[dict]) -> Iterable[bool]:
        return (
            all(b <= a for a, b in pairwise(np.array(m["increment"])[np.array(m["k"]) >= 1]))
            for m in moments
        )

    return of_moments(results, "increments shrink from k = 1 on:", shrink)


def shared_backward(results: Results) -> Finding:
    """Layers on two processes: the backward pass beside that of one process."""
    record = results.records("bench_sharded.json").get("bench_sharded")
    if record is None or not {"1", "2"} <= record["processes"].keys():
        return Finding(["nothing yet"], Outcome.NOT_MEASURED)
    one = record["processes"]["1"]["seconds"]["bp_backward"]
    two = record["processes"]["2"]["seconds"]
    ratios = {name: two[f"{name}_backward"] / one for name in ("bp", "k0", "k1")}
    line = (
        f"two processes on {record['environment']['device']}: backward pass over that of one "
        f"process: k = 0 {ratios['k0']:.2f}, k = 1, which is exact, {ratios['k1']:.2f}, "
        f"backpropagation {ratios['bp']:.2f}; not measured on GPUs"
    )
    return Finding([line], Outcome.NOT_MEASURED)


def parameter_counts(results: Results) -> Finding:
    lines, held, rows = [], [], []
    for paper, setting in results.chosen:
        if setting is None or not setting.full:
            continue
        count = setting.rows[0]["parameters"]
        rows += setting.rows[:1]
        held.append(abs(count / paper.parameters - 1) < 0.06)
        lines.append(f"{paper.title}: {count:,} (printed {paper.parameters:,})")
    if not lines:
        return nothing()
    outcome = Outcome.HOLDS if all(held) else Outcome.FAILS
    return Finding(
        [*lines, "of all nine presets in tests/experiments/test_presets.py"], outcome, True, rows
    )


R32 = {("highway", k): v for k, v in ((0, 82.38), (1, 89.0), (2, 91.0))}
CLAIMS = [
    Claim(
        "k iterations give the sum over all paths through at most k blocks; k = L is exact",
        "Theorems 1 and 2",
        theorem,
        command="make test",
    ),
    Claim(
        "k = 0, the residual path alone, ends below backpropagation",
        "Figure 2",
        residual_path_alone,
        ("resnet32",),
    ),
    Claim(
        "with the modified downsampling backpropagation reaches 92.75 % with ResNet-32",
        "review discussion",
        reaches("resnet32", {("bp", None): 92.75}),
        ("resnet32",),
    ),
    Claim(
        "ResNet-32 reaches 82.38, 89.0 and 91.0 % at k = 0, 1 and 2",
        "review discussion",
        reaches("resnet32", R32),
        ("resnet32",),
    ),
    Claim(
        "ResNet-32 matches backpropagation at k = 3",
        "Figure 2, review discussion",
        matches_at("resnet32", 3),
        ("resnet32",),
    ),
    Claim(
        "ResNet-110 matches backpropagation at k = 4, with L = 54",
        "section 4, Figure 2",
        matches_at("resnet110", 4),
        ("resnet110",),
    ),
    Claim(
        "ResNet-56 on ImageNet32 matches backpropagation at k = 5",
        "Figure 2",
        matches_at("resnet56", 5),
        ("resnet56",),
    ),
    Claim(
        "GPT-2 diverges with the plain split, gamma = 0, and not with gamma = 0.2",
        "appendix C.3",
        plain_split_diverges,
        ("gpt2",),
    ),
    Claim(
        "with gamma = 0.2, GPT-2 matches backpropagation with few iterations",
        "Figures 2 and 3",
        matches_at("gpt2", None, 0.2),
        ("gpt2",),
    ),
    Claim(
        "with gamma = 0.8, RoBERTa can be fine-tuned with few iterations",
        "Figure 2",
        matches_at("roberta", None, 0.8),
        ("roberta",),
    ),
    Claim(
        "about five iterations suffice in most cases",
        "section 4, conclusion",
        five_iterations,
        tuple(paper_rows()),
    ),
    Claim(
        "Highway-BP is better than fixed-point iteration at equal k",
        "Figure 4",
        better_than_fixed_point,
        RNNS,
    ),
    Claim(
        "at k = 0 fixed-point iteration is worse than Highway-BP",
        "Figure 4",
        worse_without_carry,
        RNNS,
    ),
    Claim(
        "the GRU on pixels matches backpropagation at k = 10",
        "Figure 4",
        matches_at("gru_pixels", 10),
        ("gru_pixels",),
    ),
    Claim(
        "fixed-point iteration fails on pixels, where the only loss is at the end",
        "Figure 4",
        fixed_point_fails_on_pixels,
        ("gru_pixels",),
    ),
    Claim(
        "the 3-layer GRU reaches a perplexity of about 50 with k = 0",
        "section 4",
        perplexity_of_k_0,
        ("gru_words",),
    ),
    Claim(
        "recurrent networks train up to 3.5 times faster than by a loop over cells",
        "Table 3",
        speed_of_recurrence,
        command="python scripts/bench_rnn.py --parts paper, on a GPU",
    ),
    Claim(
        "an iteration of Highway-BP costs little more than one of the fixed point",
        "Table 6",
        cost_beside_fixed_point,
        command="python scripts/bench_rnn.py --parts paper, on a GPU",
    ),
    Claim(
        "memory: at most two more hidden states per layer than backpropagation",
        "appendix D",
        memory,
        command="python scripts/bench_engine.py",
    ),
    Claim(
        "the gradient comes closer to the exact one with every k",
        "Figure 6",
        errors_fall,
        tuple(paper_rows()),
    ),
    Claim(
        "the error of the gradient grows during training",
        "Figure 6",
        errors_grow,
        tuple(paper_rows()),
    ),
    Claim(
        "each iteration adds less than the one before",
        "Figure 6",
        increments_shrink,
        tuple(paper_rows()),
    ),
    Claim(
        "with a device per layer, the backward pass takes k / L of its time",
        "Eq. 13, appendix E",
        shared_backward,
        command="python scripts/bench_sharded.py",
    ),
    Claim(
        "the networks have the printed numbers of parameters",
        "Table 2",
        parameter_counts,
        tuple(paper_rows()),
    ),
]
