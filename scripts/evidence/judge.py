"""Compare arms and judge what follows for a claim. Scatter never helps a claim.

Differences are of `settings.error_score`: larger is worse. Arms whose seeds see the same text are
compared seed by seed (paired t-test), others by Welch's t-test. The rules predate the runs.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf, isfinite
from statistics import fmean

import numpy as np
from scipy import stats

from scripts.evidence.rows import METRICS, Row, arm_of, metric_of, score
from scripts.evidence.settings import ENOUGH, LEVEL, Setting, error_score, has_diverged


class Outcome(StrEnum):
    """What a comparison means for a claim."""

    HOLDS = "holds"
    FAILS = "fails"
    UNDECIDED = "undecided"
    TOO_FEW = "not enough runs"
    NOT_LEARNED = "not learned"
    NOT_RUN = "not run"
    NOT_MEASURED = "not measured"


class Verdict(StrEnum):
    """What the report says about a claim."""

    REPRODUCED = "reproduced"
    REDUCED = "holds in a reduced setting"
    UNDECIDED = "undecided"
    CONTRADICTED = "contradicted"
    NOT_SEEN = "not seen in a reduced setting"
    TOO_FEW = "not enough runs"
    NOT_LEARNED = "not learned"
    NOT_RUN = "not run"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Finding:
    """What was measured, what follows, whether in full, and the rows that this rests on."""

    lines: list[str]
    outcome: Outcome
    full: bool = False
    rows: list[Row] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        match self.outcome:
            case Outcome.HOLDS:
                return Verdict.REPRODUCED if self.full else Verdict.REDUCED
            case Outcome.FAILS:
                return Verdict.CONTRADICTED if self.full else Verdict.NOT_SEEN
        return Verdict(self.outcome.value)

    @property
    def decided(self) -> bool:
        return self.outcome in (Outcome.HOLDS, Outcome.FAILS, Outcome.UNDECIDED)


NOT_RUN = Finding(["nothing yet"], Outcome.NOT_RUN)
NOT_MEASURED = Finding(["nothing yet"], Outcome.NOT_MEASURED)


def finding(setting: Setting, text: str, outcome: Outcome, *arms: Sequence[Row]) -> Finding:
    """A finding in one setting, which rests on ``arms``."""
    rows = [row for arm in arms for row in arm]
    return Finding([f"{setting}: {text}"], outcome, setting.full, rows)


def combined(findings: Sequence[Finding]) -> Finding:
    """Combine findings on one claim: the outcome is the first of fails, undecided, not enough runs
    and holds that occurs among them; if none of these occurs, that of the first finding."""
    if not findings:
        return NOT_RUN
    outcomes = {f.outcome for f in findings}
    order = (Outcome.FAILS, Outcome.UNDECIDED, Outcome.TOO_FEW, Outcome.HOLDS)
    outcome = next((o for o in order if o in outcomes), findings[0].outcome)
    return Finding(
        [line for f in findings for line in f.lines],
        outcome,
        all(f.full for f in findings if f.outcome is outcome),
        [row for f in findings for row in f.rows],
    )


def beyond(low: float, high: float, margin: float) -> Outcome:
    """Whether a number is above a margin, given the bounds of the number."""
    if low > margin:
        return Outcome.HOLDS
    return Outcome.FAILS if high < margin else Outcome.UNDECIDED


@dataclass(frozen=True)
class Difference:
    """How much worse the mean of one arm is than that of another.

    low, high: the two-sided interval. at_least, at_most: the one-sided bounds. p: two-sided.
    """

    mean: float
    low: float
    high: float
    at_least: float
    at_most: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.3g} [{self.low:.3g}, {self.high:.3g}]"


def difference(
    ours: Sequence[Row],
    others: Sequence[Row],
    paired: bool,
    value: Callable[[Row], float] = error_score,
) -> Difference | None:
    """``ours`` less ``others``; None if one has under two seeds, infinite if only one diverged."""
    ours, others = comparable(ours, others, paired)
    if min(len(ours), len(others)) < 2:
        return None
    a, b = (np.array([value(row) for row in rows]) for rows in (ours, others))
    lost_a, lost_b = (not np.isfinite(values).all() for values in (a, b))
    if lost_a or lost_b:
        return _certain(0.0 if lost_a and lost_b else inf if lost_a else -inf)
    mean = float(a.mean() - b.mean())
    if (np.ptp(a - b) if paired else max(np.ptp(a), np.ptp(b))) == 0.0:
        return _certain(mean)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about differences that are nearly equal
        test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    # The ends of the two-sided 90 % interval are the one-sided 95 % bounds.
    bounds = (*test.confidence_interval(LEVEL), *test.confidence_interval(2 * LEVEL - 1))
    return Difference(mean, *map(float, bounds), float(test.pvalue))


def comparable(ours: Sequence[Row], others: Sequence[Row], paired: bool) -> list[Sequence[Row]]:
    """Both arms; if paired, their rows of common seeds, in one order."""
    if not paired:
        return [ours, others]
    by_seed = [{row["seed"]: row for row in rows} for rows in (ours, others)]
    common = sorted(by_seed[0].keys() & by_seed[1].keys())
    return [[rows[seed] for seed in common] for rows in by_seed]


def enough(setting: Setting, *arms: Sequence[Row]) -> bool:
    """Whether two arms have the seeds that a verdict needs."""
    return min(map(len, comparable(*arms, setting.paper.paired))) >= ENOUGH


def _certain(mean: float) -> Difference:
    """A difference without scatter: all bounds equal the mean."""
    return Difference(mean, mean, mean, mean, mean, 0.0 if mean else 1.0)


def matches(setting: Setting, ours: Sequence[Row]) -> Finding:
    """Judge non-inferiority to backpropagation: the one-sided bound must lie below the margin."""
    exact, paper = setting.arm("bp"), setting.paper
    if refused := _cannot_judge(setting, ours, exact):
        return refused
    scores = [(error_score, setting.margin, METRICS[paper.metric].worse)]
    if paper.margin_loss is not None:
        scores.append((_final_loss, paper.margin_loss, "nats of evaluation loss"))
    outcomes, texts = [], []
    for value, margin, unit in scores:
        found = difference(ours, exact, paper.paired, value)
        # It matches below the margin: "beyond", with all signs turned.
        outcomes.append(beyond(-found.at_most, -found.at_least, -margin))
        texts.append(f"{found} {unit}, at most {found.at_most:.3g}, margin {margin:.3g}")
    worst = next(o for o in (Outcome.FAILS, Outcome.UNDECIDED, Outcome.HOLDS) if o in outcomes)
    text = f"{summary(ours)}; {summary(exact)}: {'; '.join(texts)}"
    return finding(setting, text, worst, ours, exact)


def _final_loss(row: Row) -> float:
    return inf if row["diverged"] else row["eval_loss"]


def worse(setting: Setting, ours: Sequence[Row], others: Sequence[Row]) -> Finding:
    """Judge whether ``ours`` is worse: the two-sided interval must lie beyond the margin."""
    if refused := _cannot_judge(setting, ours, others):
        return refused
    found = difference(ours, others, setting.paper.paired)
    text = f"{found} {METRICS[setting.paper.metric].worse}, margin {setting.margin:.3g}"
    outcome = beyond(found.low, found.high, setting.margin)
    text = f"{summary(ours)}; {summary(others)}: {text}"
    return finding(setting, text, outcome, ours, others)


def better_at_equal_k(setting: Setting, ks: Sequence[int]) -> Finding:
    """Judge whether Highway-BP is better than the fixed point, with Holm's correction over k.

    Holds if it is better at one k at least and worse at none; fails if it is worse at one.
    """
    if not setting.learned:
        return not_learned(setting)
    pairs = {k: (setting.arm("highway", k), setting.arm("fixed_point", k)) for k in ks}
    arms = [arm for pair in pairs.values() for arm in pair]
    known = {k: pair for k, pair in pairs.items() if enough(setting, *pair)}
    if not known:
        shown = (f"k = {k}: {', '.join(map(summary, pair))}" for k, pair in pairs.items())
        return finding(setting, "; ".join(shown), Outcome.TOO_FEW, *arms)
    found = {k: difference(*pair, setting.paper.paired) for k, pair in known.items()}
    significant = sorted(holm({k: d.p for k, d in found.items()}))
    gains = [k for k in significant if found[k].mean < 0]
    losses = [k for k in significant if found[k].mean > 0]
    outcome = Outcome.FAILS if losses else Outcome.HOLDS if gains else Outcome.UNDECIDED
    unit = METRICS[setting.paper.metric].worse
    shown = "; ".join(f"k = {k}: {d} {unit}, p = {d.p:.2g}" for k, d in found.items())
    gained, lost = (", ".join(f"k = {k}" for k in some) or "no k" for some in (gains, losses))
    text = f"Highway less FP, {shown}; after Holm better at {gained}, worse at {lost}"
    return finding(setting, text, outcome, *arms)


def holm(p: dict[int, float]) -> list[int]:
    """The keys whose p stays significant when all are tested together (Holm 1979)."""
    kept = []
    for place, key in enumerate(sorted(p, key=p.__getitem__)):
        if p[key] > (1 - LEVEL) / (len(p) - place):
            break
        kept.append(key)
    return kept


def diverges(setting: Setting, gamma: float, mends: float) -> Finding:
    """Judge whether ``gamma`` diverges and ``mends`` does not, at every k that both have."""
    ks = sorted(set(setting.ks("highway", gamma)) & set(setting.ks("highway", mends)))
    if not ks:
        return NOT_RUN
    shares, lines, rows = [], [], []
    for k in ks:
        bad, good = setting.arm("highway", k, gamma), setting.arm("highway", k, mends)
        lost, kept = sum(map(has_diverged, bad)), sum(map(has_diverged, good))
        lines.append(
            f"{setting}: k = {k}: {lost} of {len(bad)} runs diverged at gamma = {gamma:g}, "
            f"{kept} of {len(good)} at {mends:g} ({summary(bad)}; {summary(good)})"
        )
        rows += [*bad, *good]
        if min(len(bad), len(good)) >= ENOUGH:
            shares.append((lost / len(bad), kept / len(good)))
    outcome = Outcome.UNDECIDED
    if not shares:
        outcome = Outcome.TOO_FEW
    elif all(lost > 0.5 and kept == 0 for lost, kept in shares):
        outcome = Outcome.HOLDS
    elif all(lost == 0 for lost, _ in shares):
        outcome = Outcome.FAILS
    return Finding(lines, outcome, setting.full, rows)


def not_learned(setting: Setting) -> Finding:
    if not (exact := setting.arm("bp")):
        return finding(setting, "no run of backpropagation", Outcome.NOT_RUN, exact)
    shown = f"{summary(exact)}, hardly better than a guess"
    return finding(setting, shown, Outcome.NOT_LEARNED, exact)


def _cannot_judge(setting: Setting, ours: Sequence[Row], others: Sequence[Row]) -> Finding | None:
    """Why two arms cannot be compared, or None."""
    if setting.arm("bp") and not setting.learned:
        return not_learned(setting)
    if not ours or not others:
        return NOT_RUN
    if not enough(setting, ours, others):
        text = f"{summary(ours)}; {summary(others)}"
        return finding(setting, text, Outcome.TOO_FEW, ours, others)
    return None


def summary(rows: Sequence[Row]) -> str:
    """For instance "Highway k=3 46.90 (3 seeds)"."""
    if not rows:
        return "not run"
    values, digits = [score(row) for row in rows], metric_of(rows[0]).digits
    shown = f"{fmean(values):.{digits}f}" if all(map(isfinite, values)) else "diverged"
    return f"{arm_of(rows[0])} {shown} ({len(rows)} seed{'s' if len(rows) > 1 else ''})"
