"""Every claim of the paper with the function that judges it; the rules are in judge.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

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
from scripts.evidence.paper import paper_rows
from scripts.evidence.results import Results
from scripts.evidence.rows import score
from scripts.evidence.settings import ENOUGH, LEVEL, Setting, half_interval
from scripts.evidence.theorem_check import largest_errors

RNNS = ("lstm_chars", "gru_chars", "gru_words", "gru_pixels")
EXACT = 1e-12  # tolerance for float64 and a handful of operations
SLACK = 0.5  # points of accuracy that a score may lie below the printed one

Judge = Callable[[Results], Finding]
SettingJudge = Callable[[Setting], Finding]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, its place in the paper, and the function and runs that decide it."""

    text: str
    where: str
    judge: Judge
    keys: tuple[str, ...]  # experiments of paper.yaml whose runs decide
    command: str  # if a measurement decides instead of runs

    @property
    def commands(self) -> list[str]:
        """The commands that make the runs or measurements behind the claim."""
        return [self.command] if self.command else [paper_rows()[k].command for k in self.keys]


CLAIMS: list[Claim] = []


def claim(text: str, where: str, *keys: str, command: str = "") -> Callable[[Judge], Judge]:
    """Add a claim to `CLAIMS`; the decorated function judges it."""

    def add(judge: Judge) -> Judge:
        CLAIMS.append(Claim(text, where, judge, keys, command))
        return judge

    return add


def claim_on_runs(
    text: str, where: str, *keys: str, full_only: bool = False
) -> Callable[[SettingJudge], Judge]:
    """Add a claim that `in_best` judges for every experiment in ``keys``."""

    def add(judge: SettingJudge) -> Judge:
        def on_all(results: Results) -> Finding:
            found = [in_best(results, key, judge, full_only) for key in keys]
            return combined([f for f in found if f.outcome is not Outcome.NOT_RUN] or found[:1])

        return claim(text, where, *keys)(on_all)

    return add


def in_best(results: Results, key: str, judge: SettingJudge, full_only: bool = False) -> Finding:
    """The finding in an experiment's first setting that can be judged, else the first with runs."""
    found = [judge(setting) for setting in results.settings[key] if setting.full or not full_only]
    judged = [f for f in found if f.decided] + [f for f in found if f.outcome != Outcome.NOT_RUN]
    return next(iter(judged), NOT_RUN)


def matches_at(k: int | None = None, gamma: float | None = None) -> SettingJudge:
    """A judge of Highway-BP against backpropagation, at k or else the largest k up to five."""

    def judge(setting: Setting) -> Finding:
        known = (k for k in setting.ks("highway", gamma) if k <= 5)
        at = max(known, default=None) if k is None else k
        return matches(setting, setting.arm("highway", at, gamma))

    return judge


def reaches(*arms: tuple[str, int | None]) -> SettingJudge:
    """A judge: the mean of every arm is at least its printed score less SLACK points."""

    def judge(setting: Setting) -> Finding:
        printed, found = setting.paper.published, []
        for grad, k in arms:
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


@claim(
    "k iterations give the sum over all paths through at most k blocks; k = L is exact",
    "Theorems 1 and 2",
    command="make test",
)
def theorem(_: Results) -> Finding:
    sums, exact = largest_errors()
    line = (
        f"six layers, float64, computed for this page: at every k within {sums:.0e} of the sum "
        f"over paths, at k = L within {exact:.0e} of autograd; on many more architectures in "
        "tests/highway_bp/test_paths.py"
    )
    return measured([line], max(sums, exact) < EXACT)


def measured(lines: list[str], *held: bool) -> Finding:
    """The finding of a measurement; undecided if the claim holds in some of the cases only."""
    outcome = Outcome.HOLDS if all(held) else Outcome.UNDECIDED if any(held) else Outcome.FAILS
    return Finding(lines, outcome, full=True)


@claim_on_runs("k = 0, the residual path alone, ends below backpropagation", "Figure 2", "resnet32")
def residual_path_alone(setting: Setting) -> Finding:
    return worse(setting, setting.arm("highway", 0), setting.arm("bp"))


claim_on_runs(
    "with the modified downsampling backpropagation reaches 92.75 % with ResNet-32",
    "review discussion",
    "resnet32",
    full_only=True,
)(reaches(("bp", None)))
claim_on_runs(
    "ResNet-32 reaches 82.38, 89.0 and 91.0 % at k = 0, 1 and 2",
    "review discussion",
    "resnet32",
    full_only=True,
)(reaches(("highway", 0), ("highway", 1), ("highway", 2)))
claim_on_runs(
    "ResNet-32 matches backpropagation at k = 3", "Figure 2, review discussion", "resnet32"
)(matches_at(3))
claim_on_runs(
    "ResNet-110 matches backpropagation at k = 4, with L = 54", "section 4, Figure 2", "resnet110"
)(matches_at(4))
claim_on_runs("ResNet-56 on ImageNet32 matches backpropagation at k = 5", "Figure 2", "resnet56")(
    matches_at(5)
)


@claim_on_runs(
    "GPT-2 diverges with the plain split, gamma = 0, and not with gamma = 0.2",
    "appendix C.3",
    "gpt2",
)
def plain_split_diverges(setting: Setting) -> Finding:
    return diverges(setting, 0.0, 0.2)


claim_on_runs(
    "with gamma = 0.2, GPT-2 matches backpropagation with few iterations",
    "Figures 2 and 3",
    "gpt2",
)(matches_at(gamma=0.2))
claim_on_runs(
    "with gamma = 0.8, RoBERTa can be fine-tuned with few iterations", "Figure 2", "roberta"
)(matches_at(gamma=0.8))


@claim("about five iterations suffice in most cases", "section 4, conclusion", *paper_rows())
def five_iterations(results: Results) -> Finding:
    """Judge every experiment at its largest k up to five; more than half have to hold."""
    findings = [in_best(results, key, matches_at()) for key in paper_rows()]
    decided = [f for f in findings if f.decided]
    found = combined(decided or [f for f in findings if f.outcome is Outcome.TOO_FEW])
    held = sum(f.outcome is Outcome.HOLDS for f in decided)
    if len(decided) >= ENOUGH and held > len(decided) / 2:  # "in most cases"
        found = replace(found, outcome=Outcome.HOLDS, full=all(f.full for f in decided))
    line = f"holds in {held} of the {len(decided)} experiments that can be judged"
    return replace(found, lines=[*found.lines, line])


@claim_on_runs("Highway-BP is better than fixed-point iteration at equal k", "Figure 4", *RNNS)
def better_than_fixed_point(setting: Setting) -> Finding:
    ks = [k for k in setting.ks("highway") if k and k in setting.ks("fixed_point")]
    return better_at_equal_k(setting, ks) if ks else NOT_RUN


@claim_on_runs("at k = 0 fixed-point iteration is worse than Highway-BP", "Figure 4", *RNNS)
def worse_without_carry(setting: Setting) -> Finding:
    """At k = 0 the fixed point's gradient consists of the losses' own gradients alone."""
    return worse(setting, setting.arm("fixed_point", 0), setting.arm("highway", 0))


claim_on_runs("the GRU on pixels matches backpropagation at k = 10", "Figure 4", "gru_pixels")(
    matches_at(10)
)


@claim_on_runs(
    "fixed-point iteration fails on pixels, where the only loss is at the end",
    "Figure 4",
    "gru_pixels",
)
def fixed_point_fails_on_pixels(setting: Setting) -> Finding:
    arms = [setting.arm("fixed_point", k) for k in setting.ks("fixed_point") if k]
    return combined([worse(setting, arm, setting.arm("bp")) for arm in arms])


@claim_on_runs(
    "the 3-layer GRU reaches a perplexity of about 50 with k = 0",
    "section 4",
    "gru_words",
    full_only=True,
)
def perplexity_of_k_0(setting: Setting) -> Finding:
    rows = setting.arm("highway", 0)
    outcome = Outcome.TOO_FEW if rows else Outcome.NOT_RUN
    if len(rows) >= ENOUGH:
        printed = setting.paper.published["highway"][0]
        near = abs(fmean(map(score, rows)) - printed) < 5.0
        outcome = Outcome.HOLDS if near else Outcome.FAILS
    return finding(setting, summary(rows), outcome, rows)


def shapes_measured(results: Results) -> tuple[str, list[dict]]:
    """A device and the paper's shapes measured on it in float32, on a GPU if there is one."""
    records = results.records("bench_rnn*.json").values()
    found = [
        (r["environment"]["device"], r["paper"])
        for r in records
        if r.get("paper") and not r.get("tf32")
    ]
    return min(found, key=lambda one: "CPU" in one[0], default=("", []))


@claim(
    "recurrent networks train up to 3.5 times faster than by a loop over cells",
    "Table 3",
    command="python scripts/bench_rnn.py --parts paper, on a GPU",
)
def speed_of_recurrence(results: Results) -> Finding:
    """Table 3's speed-ups over a loop of cells, and those over torch's own layer."""
    device, shapes = shapes_measured(results)
    lines, held = [], []
    for found in shapes:
        printed = paper_rows()[found["row"]].speedup
        ratios = {k: found["ms"]["loop"] / found["ms"][f"k{k}"] for k in printed}
        held += [ratio >= printed[k] for k, ratio in ratios.items()]
        shown = ", ".join(
            f"k = {k}: {ratio:.1f} (paper {printed[k]:g}; over torch.nn "
            f"{found['speedup'][f'k{k}']:.2f})"
            for k, ratio in ratios.items()
        )
        lines.append(f"{found['shape']}: {shown}")
    return on_gpu(device, "times faster than a loop over cells", lines, held)


@claim(
    "an iteration of Highway-BP costs little more than one of the fixed point",
    "Table 6",
    command="python scripts/bench_rnn.py --parts paper, on a GPU",
)
def cost_beside_fixed_point(results: Results) -> Finding:
    """Table 6: a step of Highway-BP beside one of the fixed point at equal k."""
    device, shapes = shapes_measured(results)
    lines, held = [], []
    for found in shapes:
        ms, table = found["ms"], paper_rows()[found["row"]].milliseconds
        ks = [k for k in table["highway"] if f"k{k}" in ms and f"fp{k}" in ms]
        ratios = [ms[f"k{k}"] / ms[f"fp{k}"] for k in ks]
        papers = [table["highway"][k] / table["fixed_point"][k] for k in ks]
        held.append(fmean(ratios) <= max(papers))
        lines.append(
            f"{found['shape']}: {min(ratios):.2f} to {max(ratios):.2f} times "
            f"(paper {min(papers):.2f} to {max(papers):.2f})"
        )
    return on_gpu(device, "Highway-BP's step over the fixed point's, k = 0 to 20", lines, held)


def on_gpu(device: str, what: str, lines: list[str], held: list[bool]) -> Finding:
    """The finding of times on a device; times on a CPU decide nothing about a GPU."""
    if not lines:
        return NOT_MEASURED
    found = measured([f"{what}, on {device}:", *lines], *held)
    return replace(found, outcome=Outcome.NOT_MEASURED) if "CPU" in device else found


@claim(
    "memory: at most two more hidden states per layer than backpropagation",
    "appendix D",
    command="python scripts/bench_engine.py",
)
def memory(results: Results) -> Finding:
    record = results.records("bench_engine.json").get("bench_engine")
    if record is None:
        return NOT_MEASURED
    name = "hidden_states_per_layer_above_bp_k2"
    found = {load: w["memory"][name] for load, w in record["workloads"].items()}
    text = ", ".join(f"{load} {value:.2f}" for load, value in found.items())
    line = f"hidden states per layer above backpropagation's peak, k = 2: {text}"
    return measured([line], max(found.values()) <= 2.0)


Moments = list[dict]  # of one run: per moment, the gradient's error at every k


def claim_on_moments(
    text: str, what: str
) -> Callable[[Callable[[Moments], Iterable[bool]]], Judge]:
    """Add a claim on Figure 6: count how often it holds over the runs of all networks."""

    def add(holds: Callable[[Moments], Iterable[bool]]) -> Judge:
        def judge(results: Results) -> Finding:
            settings = [s for _, s in results.chosen if s and s.learned and s.with_moments]
            rows = [row for setting in settings for row in setting.with_moments]
            held = [one for row in rows for one in holds(row["curve"]["gradient_error"])]
            if not held:
                return NOT_RUN
            outcome = Outcome.HOLDS if sum(held) >= LEVEL * len(held) else Outcome.UNDECIDED
            if sum(held) < len(held) / 2:
                outcome = Outcome.FAILS
            names = "; ".join(setting.paper.title for setting in settings)
            line = f"{what} {sum(held)} of {len(held)} times, in {len(settings)} networks: {names}"
            return Finding([line], outcome, all(setting.full for setting in settings), rows)

        return claim(text, "Figure 6", *paper_rows())(judge)

    return add


@claim_on_moments(
    "the gradient comes closer to the exact one with every k",
    "the cosine with the exact gradient rises with every k:",
)
def errors_fall(moments: Moments) -> Iterable[bool]:
    return (all(b >= a - 1e-3 for a, b in pairwise(m["cosine"])) for m in moments)


@claim_on_moments(
    "the error of the gradient grows during training",
    "the error at a k is larger at the end than after a tenth:",
)
def errors_grow(moments: Moments) -> Iterable[bool]:
    """Compare the error after a tenth of training with that at its end, for every k."""
    first, last = (m["relative_error"] for m in (moments[:2][-1], moments[-1]))
    return (a <= b for a, b in zip(first, last, strict=True))


@claim_on_moments(
    "each iteration adds less than the one before", "increments shrink from k = 1 on:"
)
def increments_shrink(moments: Moments) -> Iterable[bool]:
    for m in moments:
        increments = [inc for k, inc in zip(m["k"], m["increment"], strict=True) if k >= 1]
        yield all(b <= a for a, b in pairwise(increments))


@claim(
    "with a device per layer, the backward pass takes k / L of its time",
    "Eq. 13, appendix E",
    command="python scripts/bench_sharded.py",
)
def shared_backward(results: Results) -> Finding:
    """The backward pass of layers on two processes beside that of one process."""
    record = results.records("bench_sharded.json").get("bench_sharded")
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


@claim("the networks have the printed numbers of parameters", "Table 2", *paper_rows())
def parameter_counts(results: Results) -> Finding:
    rows = [(paper, s.rows[0]) for paper, s in results.chosen if s and s.full]
    if not rows:
        return NOT_RUN
    lines = [f"{p.title}: {row['parameters']:,} (printed {p.parameters:,})" for p, row in rows]
    near = [abs(row["parameters"] / p.parameters - 1) < 0.06 for p, row in rows]
    lines.append("of all nine presets in tests/experiments/test_presets.py")
    outcome = Outcome.HOLDS if all(near) else Outcome.FAILS
    return Finding(lines, outcome, True, [row for _, row in rows])
