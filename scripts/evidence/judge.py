"""Comparisons of arms and what follows from them: scatter never helps a claim.

Differences are of `settings.badness`, so more is worse. Arms whose seeds see the same text are
compared seed by seed (paired t), others by Welch's t-test. The rules stood before the runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf, isfinite
from statistics import fmean

import numpy as np
from scipy import stats

from scripts.evidence.rows import Row, arm_of, metric_of, score
from scripts.evidence.settings import ENOUGH, Setting, badness, has_diverged

LEVEL = 0.95


class Outcome(StrEnum):
    """What a comparison says of a claim."""

    HOLDS = "holds"
    FAILS = "fails"
    UNDECIDED = "undecided"
    TOO_FEW = "not enough runs"
    NOT_LEARNED = "not learned"
    NOT_RUN = "not run"
    NOT_MEASURED = "not measured"


class Verdict(StrEnum):
    """In the words of the page."""

    REPRODUCED = "reproduced"
    REDUCED = "holds in a reduced setting"
    UNDECIDED = "undecided"
    CONTRADICTED = "contradicted"
    NOT_SEEN = "not seen in a reduced setting"
    TOO_FEW = "not enough runs"
    NOT_LEARNED = "not learned"
    NOT_RUN = "not run"
    NOT_MEASURED = "not measured"


def verdict_of(outcome: Outcome, full: bool) -> Verdict:
    """``full``: in the paper's own setting."""
    match outcome:
        case Outcome.HOLDS:
            return Verdict.REPRODUCED if full else Verdict.REDUCED
        case Outcome.FAILS:
            return Verdict.CONTRADICTED if full else Verdict.NOT_SEEN
    return Verdict(outcome.value)


@dataclass(frozen=True)
class Finding:
    """What was measured, what follows, in which setting, and the rows that it rests on."""

    lines: list[str]
    outcome: Outcome
    full: bool = False
    rows: list[Row] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        return verdict_of(self.outcome, self.full)


def combined(findings: Sequence[Finding]) -> Finding:
    """A claim on all of them: it fails with one, holds with every one, and is else as open as the
    most open one that is not merely missing."""
    if not findings:
        return Finding(["nothing yet"], Outcome.NOT_RUN)
    outcomes = {f.outcome for f in findings}
    order = (Outcome.FAILS, Outcome.UNDECIDED, Outcome.TOO_FEW, Outcome.HOLDS)
    outcome = next((o for o in order if o in outcomes), findings[0].outcome)
    decided = [f for f in findings if f.outcome is outcome]
    return Finding(
        [line for f in findings for line in f.lines],
        outcome,
        all(f.full for f in decided),
        [row for f in findings for row in f.rows],
    )


@dataclass(frozen=True)
class Difference:
    """How much worse one arm is than another, in the mean.

    low, high: the two-sided interval. at_most, at_least: the one-sided bounds. p: two-sided.
    """

    mean: float
    low: float
    high: float
    at_least: float
    at_most: float
    p: float


def difference(
    ours: Sequence[Row],
    others: Sequence[Row],
    paired: bool,
    value: Callable[[Row], float] = badness,
) -> Difference | None:
    """Of at least two seeds each; None of fewer. Where a run diverged it is infinite."""
    if paired:
        common = sorted({r["seed"] for r in ours} & {r["seed"] for r in others})
        ours, others = (
            [next(r for r in rows if r["seed"] == seed) for seed in common]
            for rows in (ours, others)
        )
    if min(len(ours), len(others)) < 2:
        return None
    a, b = (np.array([value(row) for row in rows]) for rows in (ours, others))
    if not np.isfinite(a).all() or not np.isfinite(b).all():
        worse = inf if np.isfinite(b).all() else -inf if np.isfinite(a).all() else 0.0
        return Difference(worse, worse, worse, worse, worse, 0.0 if worse else 1.0)
    mean = float(a.mean() - b.mean())
    if (np.ptp(a - b) if paired else max(np.ptp(a), np.ptp(b))) == 0.0:  # no scatter at all
        return Difference(mean, mean, mean, mean, mean, 0.0 if mean else 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of differences that are nearly equal
        test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    low, high = map(float, test.confidence_interval(LEVEL))
    at_least, at_most = map(float, test.confidence_interval(2 * LEVEL - 1))
    return Difference(mean, low, high, at_least, at_most, float(test.pvalue))


def matches(setting: Setting, ours: Sequence[Row]) -> Finding:
    """Non-inferiority to backpropagation: the one-sided bound lies below the margin."""
    exact = setting.arm("bp")
    if refused := _cannot_judge(setting, ours, exact):
        return refused
    paper = setting.paper
    values = [(badness, setting.margin)]
    if paper.margin_loss is not None:
        values.append((lambda row: inf if row["diverged"] else row["eval_loss"], paper.margin_loss))
    outcomes, texts = [], []
    for value, margin in values:
        found = difference(ours, exact, paper.paired, value)
        outcomes.append(
            Outcome.HOLDS
            if found.at_most < margin
            else Outcome.FAILS
            if found.at_least > margin
            else Outcome.UNDECIDED
        )
        unit = unit_of(setting) if value is badness else "nats of evaluation loss"
        texts.append(f"{in_words(found, unit)}, margin {margin:.3g}")
    worst = next(o for o in (Outcome.FAILS, Outcome.UNDECIDED, Outcome.HOLDS) if o in outcomes)
    line = f"{said(setting, ours)}; {said(setting, exact)}: {'; '.join(texts)}"
    return Finding([f"{setting}: {line}"], worst, setting.full, [*ours, *exact])


def worse(setting: Setting, ours: Sequence[Row], others: Sequence[Row]) -> Finding:
    """The two-sided interval of the difference lies beyond the margin."""
    if refused := _cannot_judge(setting, ours, others):
        return refused
    found = difference(ours, others, setting.paper.paired)
    margin = setting.margin
    outcome = (
        Outcome.HOLDS
        if found.low > margin
        else Outcome.FAILS
        if found.high < margin
        else Outcome.UNDECIDED
    )
    line = f"{said(setting, ours)}; {said(setting, others)}: {in_words(found, unit_of(setting))}"
    return Finding(
        [f"{setting}: {line}, margin {margin:.3g}"], outcome, setting.full, [*ours, *others]
    )


def better_at_equal_k(setting: Setting, ks: Sequence[int]) -> Finding:
    """Highway-BP against the fixed point at every k, Holm's correction over k.

    Holds where it is better at one k at least and worse at none; fails where it is worse at one.
    """
    pairs = {k: (setting.arm("highway", k), setting.arm("fixed_point", k)) for k in ks}
    rows = [row for arms in pairs.values() for arm in arms for row in arm]
    if not setting.learned:
        return not_learned(setting)
    enough = {k: arms for k, arms in pairs.items() if min(map(len, arms)) >= ENOUGH}
    if not enough:
        shown = "; ".join(
            f"k = {k}: {said(setting, ours)}, {said(setting, other)}"
            for k, (ours, other) in pairs.items()
        )
        return Finding([f"{setting}: {shown}"], Outcome.TOO_FEW, setting.full, rows)
    found = {k: difference(*arms, setting.paper.paired) for k, arms in enough.items()}
    significant = holm({k: d.p for k, d in found.items()})
    gains = [k for k in significant if found[k].mean < 0]
    losses = [k for k in significant if found[k].mean > 0]
    outcome = Outcome.FAILS if losses else Outcome.HOLDS if gains else Outcome.UNDECIDED
    shown = "; ".join(
        f"k = {k}: {in_words(d, unit_of(setting))}, p = {d.p:.2g}" for k, d in found.items()
    )
    line = f"{setting}: Highway less FP, {shown}; after Holm better at k = {_listed(gains)}"
    return Finding([f"{line}, worse at k = {_listed(losses)}"], outcome, setting.full, rows)


def holm(p: dict[int, float], level: float = 1 - LEVEL) -> list[int]:
    """The keys whose p stays significant when all are tested together (Holm 1979)."""
    kept = []
    for place, key in enumerate(sorted(p, key=p.__getitem__)):
        if p[key] > level / (len(p) - place):
            break
        kept.append(key)
    return kept


def diverges(setting: Setting, gamma: float, mends: float) -> Finding:
    """At every k that both gammas were run with: the first diverges, the second does not."""
    ks = sorted(set(setting.ks("highway", gamma)) & set(setting.ks("highway", mends)))
    cells, lines, rows = [], [], []
    for k in ks:
        bad, good = setting.arm("highway", k, gamma), setting.arm("highway", k, mends)
        lost, kept = sum(map(has_diverged, bad)), sum(map(has_diverged, good))
        lines.append(
            f"k = {k}: {lost} of {len(bad)} runs diverged at gamma = {gamma:g}, "
            f"{kept} of {len(good)} at {mends:g} ({said(setting, bad)}; {said(setting, good)})"
        )
        rows += [*bad, *good]
        if min(len(bad), len(good)) >= ENOUGH:
            cells.append((lost / len(bad), kept / len(good)))
    if not ks:
        return Finding(["nothing yet"], Outcome.NOT_RUN)
    outcome = Outcome.TOO_FEW
    if cells:
        held = [lost > 0.5 and kept == 0 for lost, kept in cells]
        never = all(lost == 0 for lost, _ in cells)
        outcome = Outcome.HOLDS if all(held) else Outcome.FAILS if never else Outcome.UNDECIDED
    return Finding([f"{setting}: {line}" for line in lines], outcome, setting.full, rows)


def not_learned(setting: Setting) -> Finding:
    exact = setting.arm("bp")
    shown = said(setting, exact) if exact else "no run of backpropagation"
    return Finding(
        [f"{setting}: {shown}, hardly better than a guess"],
        Outcome.NOT_LEARNED if exact else Outcome.NOT_RUN,
        setting.full,
        exact,
    )


def _cannot_judge(setting: Setting, ours: Sequence[Row], others: Sequence[Row]) -> Finding | None:
    """Why nothing can be said of two arms, or None."""
    if setting.arm("bp") and not setting.learned:
        return not_learned(setting)
    if not ours or not others:
        return Finding(["nothing yet"], Outcome.NOT_RUN)
    if min(len(ours), len(others)) < ENOUGH:
        line = f"{setting}: {said(setting, ours)}; {said(setting, others)}"
        return Finding([line], Outcome.TOO_FEW, setting.full, [*ours, *others])
    return None


def said(setting: Setting, rows: Sequence[Row]) -> str:
    """For instance "Highway k=3 46.90 (3 seeds)"."""
    if not rows:
        return "not run"
    values = [score(row) for row in rows]
    digits = metric_of(rows[0]).digits
    seeds = f"{len(rows)} seed{'s' if len(rows) > 1 else ''}"
    shown = f"{fmean(values):.{digits}f}" if all(map(isfinite, values)) else "diverged"
    return f"{arm_of(rows[0])} {shown} ({seeds})"


def unit_of(setting: Setting) -> str:
    return {
        "eval_accuracy": "points worse",
        "eval_bits_per_char": "bits worse",
        "eval_perplexity": "in log perplexity",
    }[setting.paper.metric]


def in_words(found: Difference, unit: str) -> str:
    return f"{found.mean:+.3g} [{found.low:.3g}, {found.high:.3g}] {unit}"


def _listed(ks: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(ks))) or "none"
