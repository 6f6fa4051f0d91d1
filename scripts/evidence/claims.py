"""The claims of the paper, and how each is judged; the rules of comparison are in judge.py."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

from scipy import stats

from scripts.evidence.judge import (
    NOT_MEASURED,
    NOT_RUN,
    Finding,
    Outcome,
    better_at_equal_k,
    beyond,
    combined,
    diverges,
    finding,
    matches,
    summary,
    worse,
)
from scripts.evidence.paper import PaperRow, paper_rows
from scripts.evidence.results import Results
from scripts.evidence.rows import score
from scripts.evidence.settings import ENOUGH, LEVEL, Setting, error_score, half_interval
from scripts.evidence.theorem_check import largest_errors

RNNS = ("lstm_chars", "gru_chars", "gru_words", "gru_pixels")
EXACT = 1e-12  # tolerance for float64 and a handful of operations
SLACK = 0.5  # points of accuracy that a score may lie below the printed one

Judge = Callable[[Results], Finding]
SettingJudge = Callable[[Setting], Finding]


@dataclass(frozen=True)
class Claim:
    """A claim's place in the paper, and the function and runs that decide it."""

    where: str
    judge: Judge
    keys: tuple[str, ...] = ()  # experiments of paper.yaml whose runs decide
    command: str = ""  # if a measurement decides instead of runs

    @property
    def commands(self) -> list[str]:
        """The commands that make the runs or measurements behind the claim."""
        return [self.command] if self.command else [paper_rows()[k].command for k in self.keys]


# Claims on final scores, judged in a setting.


def on_runs(where: str, judge: SettingJudge, *keys: str) -> Claim:
    """A claim that ``judge`` decides in the best setting of every experiment in ``keys``."""

    def on_all(results: Results) -> Finding:
        found = [in_best(results, key, judge) for key in keys]
        return combined([f for f in found if f.outcome is not Outcome.NOT_RUN])

    return Claim(where, on_all, keys)


def in_best(results: Results, key: str, judge: SettingJudge) -> Finding:
    """The finding in an experiment's first preset that can be judged, else the first with runs.

    If a preset has run on several kinds of device, the finding that rests on the most runs.
    """
    found = [f for f in map(judge, results.settings[key]) if f.outcome is not Outcome.NOT_RUN]
    decided = [f for f in found if f.decided]
    if not decided:
        return next(iter(found), NOT_RUN)
    alike = [f for f in decided if f.rows[0]["experiment"] == decided[0].rows[0]["experiment"]]
    return max(alike, key=lambda f: len(f.rows))


def matches_at(k: int | None = None, gamma: float | None = None) -> SettingJudge:
    """A judge of Highway-BP against backpropagation, at k or else the largest k up to five."""

    def judge(setting: Setting) -> Finding:
        known = (k for k in setting.ks("highway", gamma) if k <= 5)
        at = max(known, default=None) if k is None else k
        return matches(setting, setting.arm("highway", at, gamma))

    return judge


def reaches(*arms: tuple[str, int | None]) -> SettingJudge:
    """A judge in full alone: every arm's mean is at least its printed score less SLACK points."""

    def judge(setting: Setting) -> Finding:
        printed, found = setting.paper.published, []
        for grad, k in arms if setting.full else ():
            rows, value = setting.arm(grad, k), printed[grad] if k is None else printed[grad][k]
            if not rows:
                continue
            text, outcome = f"{summary(rows)}, printed {value:g}", Outcome.TOO_FEW
            if len(rows) >= ENOUGH:
                scores = [score(row) for row in rows]
                low, high = (fmean(scores) + sign * half_interval(scores) for sign in (-1, 1))
                text += f" [{low:.2f}, {high:.2f}]"
                outcome = beyond(low, high, value - SLACK)
            found.append(finding(setting, text, outcome, rows))
        return combined(found)

    return judge


def is_worse(ours: tuple, others: tuple) -> SettingJudge:
    """A judge of two arms, each given as the arguments of `Setting.arm`."""
    return lambda setting: worse(setting, setting.arm(*ours), setting.arm(*others))


def better_than_fixed_point(setting: Setting) -> Finding:
    ks = [k for k in setting.ks("highway") if k and k in setting.ks("fixed_point")]
    return better_at_equal_k(setting, ks) if ks else NOT_RUN


def fixed_point_fails(setting: Setting) -> Finding:
    arms = [setting.arm("fixed_point", k) for k in setting.ks("fixed_point") if k]
    return combined([worse(setting, arm, setting.arm("bp")) for arm in arms])


def perplexity_of_k_0(setting: Setting) -> Finding:
    """Judged in full alone: within 5 of the printed perplexity."""
    rows = setting.arm("highway", 0) if setting.full else []
    outcome = Outcome.TOO_FEW if rows else Outcome.NOT_RUN
    if len(rows) >= ENOUGH:
        printed = setting.paper.published["highway"][0]
        outcome = holds_if(abs(fmean(map(score, rows)) - printed) < 5.0)
    return finding(setting, summary(rows), outcome, rows)


def five_iterations(results: Results) -> Finding:
    """Judge every experiment at its largest k up to five, "in most cases": more than half of those
    that have runs, whether they can be judged or not."""
    findings = [in_best(results, key, matches_at()) for key in paper_rows()]
    known = [f for f in findings if f.decided or f.outcome is Outcome.TOO_FEW]
    if not known:
        return combined(findings)
    counts, most = Counter(f.outcome for f in known), len(known) / 2
    outcome = Outcome.UNDECIDED if sum(f.decided for f in known) >= ENOUGH else Outcome.TOO_FEW
    for end in (Outcome.HOLDS, Outcome.FAILS):
        outcome = end if outcome is Outcome.UNDECIDED and counts[end] > most else outcome
    line = f"of {len(known)} experiments: " + ", ".join(f"{o} {n}" for o, n in counts.items())
    return replace(combined(known), lines=[*combined(known).lines, line], outcome=outcome)


def better_everywhere(results: Results) -> Finding:
    """Judge every recurrent network; and a sign test over networks, of means over equal k."""
    found = on_runs("", better_than_fixed_point, *RNNS).judge(results)
    networks: dict[str, dict[str, list[float]]] = {}
    for row in found.rows:
        scores = networks.setdefault(row["experiment"], {"highway": [], "fixed_point": []})
        scores[row["grad"]].append(error_score(row))
    better = [fmean(s["highway"]) < fmean(s["fixed_point"]) for s in networks.values()]
    if not better:
        return found
    p = stats.binomtest(sum(better), len(better)).pvalue
    line = f"mean over k better in {sum(better)} of {len(better)} networks, sign test: p = {p:.2g}"
    return replace(found, lines=[*found.lines, line])


def parameter_counts(_: Results) -> Finding:
    rows = paper_rows().values()
    others = [p for p in rows if p.counted]
    lines = [f"{p.title}: {p.counted:,}, printed {p.parameters:,}" for p in others]
    lines.append(
        f"as printed in {len(rows) - len(others)} of {len(rows)} presets, to the last printed digit"
    )
    return Finding(lines, Outcome.UNDECIDED if others else Outcome.HOLDS, full=True)


# Claims on the gradient's error, counted over moments of training.

Moments = list[dict]  # of one run: per moment, the gradient's error at every k


def on_moments(what: str, holds: Callable[[Moments], Iterable[bool]]) -> Claim:
    """A claim on Figure 6: count how often it holds over the runs of all networks."""

    def judge(results: Results) -> Finding:
        settings = [s for _, s in results.chosen if s and s.learned and s.with_moments]
        rows, held, parts = [], [], []
        for setting in settings:
            runs = (row["curve"]["gradient_error"] for row in setting.with_moments)
            found = [one for moments in runs for one in holds(moments)]
            parts.append(f"{setting.title} {sum(found)}/{len(found)}")
            rows, held = rows + setting.with_moments, held + found
        if not held:
            return NOT_RUN
        outcome = Outcome.HOLDS if sum(held) >= LEVEL * len(held) else Outcome.UNDECIDED
        if sum(held) < len(held) / 2:
            outcome = Outcome.FAILS
        line = f"at gamma = 0 {what} {sum(held)} of {len(held)} times: {'; '.join(parts)}"
        return Finding([line], outcome, all(setting.full for setting in settings), rows)

    return Claim("Figure 6", judge, tuple(paper_rows()))


def errors_fall(moments: Moments) -> Iterable[bool]:
    return (all(b >= a - 1e-3 for a, b in pairwise(m["cosine"])) for m in moments)


def errors_grow(moments: Moments) -> Iterable[bool]:
    """Compare the error after a tenth of training with that at its end, for every k."""
    first, last = (m["relative_error"] for m in (moments[:2][-1], moments[-1]))
    return (a <= b for a, b in zip(first, last, strict=True))


def increments_shrink(moments: Moments) -> Iterable[bool]:
    for m in moments:
        increments = [inc for k, inc in zip(m["k"], m["increment"], strict=True) if k >= 1]
        yield all(b <= a for a, b in pairwise(increments))


# Claims that a measurement decides.


def holds_if(held: bool) -> Outcome:
    return Outcome.HOLDS if held else Outcome.FAILS


def theorem(_: Results) -> Finding:
    error = max(largest_errors())
    line = (
        "six layers, float64, computed for this page: at every k the sum over paths, at k = L "
        f"autograd's gradient, within {max(error, EXACT):.0e}; on many more architectures in "
        "tests/highway_bp/test_paths.py"
    )
    return Finding([line], holds_if(error <= EXACT), full=True)


def on_shapes(where: str, what: str, judge: Callable[..., tuple[str, list]]) -> Claim:
    """A claim on the paper's recurrent shapes, measured in float32, on a GPU if there is one.

    Undecided if it holds for some alone; times on a CPU decide nothing about a GPU.
    ``judge(paper, ms, speedup)`` returns text about a shape, and whether the claim holds there.
    """

    def on_all(results: Results) -> Finding:
        records = results.records("bench_rnn*.json").values()
        plain = [r for r in records if r.get("paper") and not r.get("tf32")]
        if not plain:
            return NOT_MEASURED
        record = min(plain, key=lambda r: "CPU" in r["environment"]["device"])
        device, lines, held = record["environment"]["device"], [], []
        for shape in record["paper"]:
            line, found = judge(paper_rows()[shape["row"]], shape["ms"], shape["speedup"])
            lines.append(f"{shape['shape']}: {line}")
            held += found
        outcome = Outcome.UNDECIDED if any(held) and not all(held) else holds_if(all(held))
        outcome = Outcome.NOT_MEASURED if "CPU" in device else outcome
        return Finding([f"{what}, on {device}:", *lines], outcome, full=True)

    return Claim(where, on_all, command="python scripts/bench_rnn.py --parts paper, on a GPU")


def speed_of_recurrence(paper: PaperRow, ms: dict, speedup: dict) -> tuple[str, list]:
    """Table 3's speed-ups over a loop of cells, and those over torch's own layer."""
    ratios = {k: ms["loop"] / ms[f"k{k}"] for k in paper.speedup}
    shown = ", ".join(
        f"k = {k}: {ratio:.1f} (paper {paper.speedup[k]:g}; over torch.nn {speedup[f'k{k}']:.2f})"
        for k, ratio in ratios.items()
    )
    return shown, [ratio >= paper.speedup[k] for k, ratio in ratios.items()]


def cost_beside_fixed_point(paper: PaperRow, ms: dict, _: dict) -> tuple[str, list]:
    """Table 6: a step of Highway-BP beside one of the fixed point at equal k."""
    table = paper.milliseconds
    ks = [k for k in table["highway"] if f"k{k}" in ms and f"fp{k}" in ms]
    ratios = [ms[f"k{k}"] / ms[f"fp{k}"] for k in ks]
    papers = [table["highway"][k] / table["fixed_point"][k] for k in ks]
    shown = (
        f"{min(ratios):.2f} to {max(ratios):.2f} times "
        f"(paper {min(papers):.2f} to {max(papers):.2f})"
    )
    return shown, [fmean(ratios) <= max(papers)]


def memory(results: Results) -> Finding:
    record = results.record("bench_engine")
    if record is None:
        return NOT_MEASURED
    name = "hidden_states_per_layer_above_bp_k2"
    found = {load: w["memory"][name] for load, w in record["workloads"].items()}
    lines = [f"hidden states per layer above backpropagation's peak, k = 2: {shown(found)}"]
    for record in results.records("bench_rnn_cuda*.json").values():
        above = {shape["shape"]: states_above(shape) for shape in record["memory"]}
        device = record["environment"]["device"]
        lines.append(f"per step above cuDNN's peak on {device}, k = 5: {shown(above)}")
        found |= above
    held = [value <= 2.0 for value in found.values()]
    mixed = any(held) and not all(held)
    return Finding(lines, Outcome.UNDECIDED if mixed else holds_if(all(held)), full=True)


def shown(states: dict[str, float]) -> str:
    return "; ".join(f"{name} {value:.2f}" for name, value in states.items())


def states_above(shape: dict) -> float:
    """Hidden states per step, of one layer, by which the peak at k = 5 is above torch.nn's."""
    *_, B, L, H = map(int, re.findall(r"\d+", shape["shape"]))
    parts = 2 if shape["shape"].startswith("LSTM") else 1  # its state is (c, h)
    peak = {name: value["tensors_mb"] for name, value in shape["peak"].items()}
    return 1e6 * (peak["k5"] - peak["nn"]) / (4 * B * L * H * parts)


def shared_backward(results: Results) -> Finding:
    """The backward pass of layers on two processes beside that of one process."""
    record = results.record("bench_sharded")
    if record is None or not {"1", "2"} <= record["processes"].keys():
        return NOT_MEASURED
    one, two = (record["processes"][P]["seconds"] for P in ("1", "2"))
    ratios = {name: two[f"{name}_backward"] / one["bp_backward"] for name in ("bp", "k0", "k1")}
    line = (
        f"two processes on {record['environment']['device']}: backward pass over that of one "
        f"process: k = 0 {ratios['k0']:.2f}, k = 1, which is exact, {ratios['k1']:.2f}, "
        f"backpropagation {ratios['bp']:.2f}; not measured on GPUs"
    )
    return Finding([line], Outcome.NOT_MEASURED)


CLAIMS: dict[str, Claim] = {
    "k iterations give the sum over all paths through at most k blocks; k = L is exact": Claim(
        "Theorems 1 and 2", theorem, command="make test"
    ),
    "k = 0, the residual path alone, ends below backpropagation": on_runs(
        "Figure 2", is_worse(("highway", 0), ("bp",)), "resnet32"
    ),
    "with the modified downsampling backpropagation reaches 92.75 % with ResNet-32": on_runs(
        "review discussion", reaches(("bp", None)), "resnet32"
    ),
    "ResNet-32 reaches 82.38, 89.0 and 91.0 % at k = 0, 1 and 2": on_runs(
        "review discussion", reaches(("highway", 0), ("highway", 1), ("highway", 2)), "resnet32"
    ),
    "ResNet-32 matches backpropagation at k = 3": on_runs(
        "Figure 2, review discussion", matches_at(3), "resnet32"
    ),
    "ResNet-110 matches backpropagation at k = 4, with L = 54": on_runs(
        "section 4, Figure 2", matches_at(4), "resnet110"
    ),
    "ResNet-56 on ImageNet32 matches backpropagation at k = 5": on_runs(
        "Figure 2", matches_at(5), "resnet56"
    ),
    "GPT-2 diverges with the plain split, gamma = 0, and not with gamma = 0.2": on_runs(
        "appendix C.3", lambda setting: diverges(setting, 0.0, 0.2), "gpt2"
    ),
    "with gamma = 0.2, GPT-2 matches backpropagation with few iterations": on_runs(
        "Figures 2 and 3", matches_at(gamma=0.2), "gpt2"
    ),
    "with gamma = 0.8, RoBERTa can be fine-tuned with few iterations": on_runs(
        "Figure 2", matches_at(gamma=0.8), "roberta"
    ),
    "about five iterations suffice in most cases": Claim(
        "section 4, conclusion", five_iterations, tuple(paper_rows())
    ),
    "Highway-BP is better than fixed-point iteration at equal k": Claim(
        "Figure 4", better_everywhere, RNNS
    ),
    # at k = 0 the fixed point's gradient consists of the losses' own gradients alone
    "at k = 0 fixed-point iteration is worse than Highway-BP": on_runs(
        "Figure 4", is_worse(("fixed_point", 0), ("highway", 0)), *RNNS
    ),
    "the GRU on pixels matches backpropagation at k = 10": on_runs(
        "Figure 4", matches_at(10), "gru_pixels"
    ),
    "fixed-point iteration fails on pixels, where the only loss is at the end": on_runs(
        "Figure 4", fixed_point_fails, "gru_pixels"
    ),
    "the 3-layer GRU reaches a perplexity of about 50 with k = 0": on_runs(
        "section 4", perplexity_of_k_0, "gru_words"
    ),
    "recurrent networks train up to 3.5 times faster than by a loop over cells": on_shapes(
        "Table 3", "times faster than a loop over cells", speed_of_recurrence
    ),
    "an iteration of Highway-BP costs little more than one of the fixed point": on_shapes(
        "Table 6", "Highway-BP's step over the fixed point's, k = 0 to 20", cost_beside_fixed_point
    ),
    "memory: at most two more hidden states per layer than backpropagation": Claim(
        "appendix D", memory, command="python scripts/bench_engine.py"
    ),
    "the gradient comes closer to the exact one with every k": on_moments(
        "the cosine with the exact gradient rises with every k:", errors_fall
    ),
    "the error of the gradient grows during training": on_moments(
        "the error at a k is larger at the end than after a tenth:", errors_grow
    ),
    "each iteration adds less than the one before": on_moments(
        "increments shrink from k = 1 on:", increments_shrink
    ),
    "with a device per layer, the backward pass takes k / L of its time": Claim(
        "Eq. 13, appendix E", shared_backward, command="python scripts/bench_sharded.py"
    ),
    "the networks have the printed numbers of parameters": Claim(
        "Table 2", parameter_counts, command="pytest tests/experiments/test_presets.py"
    ),
}
