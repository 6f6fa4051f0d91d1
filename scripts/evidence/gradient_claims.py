"""Claims on the gradient's error (Figure 6), counted over moments of training."""

from collections.abc import Callable, Iterable
from itertools import pairwise

from scripts.evidence.claim import Claim
from scripts.evidence.judge import NOT_RUN, Finding, Outcome
from scripts.evidence.paper import paper_rows
from scripts.evidence.results import Results

NEARLY_ALWAYS = 0.95  # share of the cases in which a claim on all of them has to hold
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
        outcome = Outcome.HOLDS if sum(held) >= NEARLY_ALWAYS * len(held) else Outcome.UNDECIDED
        if sum(held) < len(held) / 2:
            outcome = Outcome.FAILS
        line = f"at gamma = 0 {what} {sum(held)} of {len(held)} times: {'; '.join(parts)}"
        return Finding([line], outcome, all(setting.full for setting in settings), rows)

    return Claim("Figure 6", judge, tuple(paper_rows()))


def errors_fall(moments: Moments) -> Iterable[bool]:
    return (all(b >= a - 1e-3 for a, b in pairwise(m["cosine"])) for m in moments)


def errors_grow(moments: Moments) -> Iterable[bool]:
    """Compare the error after a tenth of training with that at its end, for every k."""
    first, last = (m["relative_error"] for m in (moments[min(1, len(moments) - 1)], moments[-1]))
    return (a <= b for a, b in zip(first, last, strict=True))


def increments_shrink(moments: Moments) -> Iterable[bool]:
    for m in moments:
        increments = [inc for k, inc in zip(m["k"], m["increment"], strict=True) if k >= 1]
        yield all(b <= a for a, b in pairwise(increments))
