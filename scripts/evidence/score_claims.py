"""Claims on final scores, judged in a setting; the rules of comparison are in judge.py."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

from scipy import stats

from scripts.evidence.claim import Claim, holds_if
from scripts.evidence.judge import (
    NOT_RUN,
    Finding,
    Outcome,
    better_at_equal_k,
    beyond,
    combined,
    finding,
    matches,
    summary,
    worse,
)
from scripts.evidence.paper import paper_rows
from scripts.evidence.results import Results
from scripts.evidence.rows import score
from scripts.evidence.settings import ENOUGH, Setting, error_score, half_interval

RNNS = ("lstm_chars", "gru_chars", "gru_words", "gru_pixels")
SLACK = 0.5  # points of accuracy that a score may lie below the printed one

SettingJudge = Callable[[Setting], Finding]


def on_runs(where: str, judge: SettingJudge, *keys: str) -> Claim:
    """A claim that ``judge`` decides in the best setting of every experiment in ``keys``."""

    def on_all(results: Results) -> Finding:
        found = [in_best(results, key, judge) for key in keys]
        return combined([f for f in found if f.outcome is not Outcome.NOT_RUN])

    return Claim(where, on_all, keys)


def in_best(results: Results, key: str, judge: SettingJudge) -> Finding:
    """The finding in an experiment's first preset that can be judged, else the first with runs.

    If a preset has run on several kinds of device, the finding that rests on the most runs; the
    others are mentioned.
    """
    found = [f for f in map(judge, results.settings[key]) if f.outcome is not Outcome.NOT_RUN]
    decided = [f for f in found if f.decided]
    if not decided:
        return next(iter(found), NOT_RUN)
    alike = [f for f in decided if f.rows[0]["experiment"] == decided[0].rows[0]["experiment"]]
    best = max(alike, key=lambda f: len(f.rows))
    others = [
        f"{f.outcome} with fewer runs: {line}" for f in alike if f is not best for line in f.lines
    ]
    return replace(best, lines=[*best.lines, *others])


def matches_at(k: int | None = None, gamma: float | None = None) -> SettingJudge:
    """A judge of Highway-BP against backpropagation, at k or else the largest k up to five.

    If there are not enough runs at that k, the largest with enough is mentioned.
    """

    def judge(setting: Setting) -> Finding:
        known = [k for k in setting.ks("highway", gamma) if k <= 5] if k is None else [k]
        at = sorted(known, reverse=True) or [None]
        found = [matches(setting, setting.arm("highway", k, gamma)) for k in at]
        if found[0].outcome is not Outcome.TOO_FEW:
            return found[0]
        below = next((f.lines for f in found if f.decided), [])
        return replace(found[0], lines=[*found[0].lines, *below])

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
    counts = Counter(f.outcome for f in known)
    ends = (Outcome.HOLDS, Outcome.FAILS)
    outcome = next((o for o in ends if counts[o] > len(known) / 2), Outcome.UNDECIDED)
    if sum(f.decided for f in known) < ENOUGH:
        outcome = Outcome.TOO_FEW
    line = f"of {len(known)} experiments: " + ", ".join(f"{o} {n}" for o, n in counts.items())
    found = combined(known)
    return replace(found, lines=[*found.lines, line], outcome=outcome)


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
