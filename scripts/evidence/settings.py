"""Settings: rows that may be compared, all of one preset on one kind of device.

Rows of different settings are never pooled. A row belongs to the preset that it names if its setup
equals the one that the preset gives today. Otherwise it belongs to no setting.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite, log, nan, sqrt
from statistics import fmean, stdev

from scipy import stats

from scripts.evidence.paper import PaperRow, preset_gamma, preset_setup
from scripts.evidence.rows import Arm, Row, by_arm, name_of_run, score

ENOUGH = 3  # seeds of an arm, for a verdict
LEVEL = 0.95
POINTS, SHARE = 5.0, 0.1  # by which a network has to beat a guess: accuracy, share of loss
RISE = 0.1  # share by which the last loss of a run that diverged is above its best


@dataclass(frozen=True)
class Setting:
    """Rows of one preset on one kind of device, by arm."""

    paper: PaperRow
    preset: str
    device_kind: str
    arms: dict[Arm, list[Row]]

    @property
    def full(self) -> bool:
        """Whether this is the paper's own setting."""
        return self.preset == self.paper.preset

    @property
    def title(self) -> str:
        """Of its network and data."""
        return self.paper.reduced.get(self.preset, self.paper.title)

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.arms.values() for row in rows]

    @property
    def settled(self) -> list[Arm]:
        """The arms of plain methods with enough seeds for a verdict."""
        return [arm for arm in self.plain() if len(self.arms[arm]) >= ENOUGH]

    @property
    def margin(self) -> float:
        """How much worse a matching score may be, in the units of `error_score`."""
        paper = self.paper
        margin = paper.margin if self.full else paper.margin_reduced or paper.margin
        return log(1 + margin) if paper.metric == "eval_perplexity" else margin

    @property
    def device(self) -> str:
        return "one GPU" if self.device_kind == "cuda" else "CPU"

    def only(self, arms: Container[Arm]) -> Setting:
        """The same setting with the rows of these arms alone."""
        return replace(self, arms={arm: rows for arm, rows in self.arms.items() if arm in arms})

    def plain(self, *grads: str) -> list[Arm]:
        """The arms of plain methods, only those of ``grads`` if given."""
        return [arm for arm in self.arms if arm.plain and (not grads or arm.grad in grads)]

    def arm(self, grad: str, k: int | None = None, gamma: float | None = None) -> list[Row]:
        """The rows of a plain method. For Highway-BP, the default gamma is the preset's."""
        if grad == "highway" and gamma is None:
            gamma = preset_gamma(self.preset)
        found = (
            self.arms[arm]
            for arm in self.plain(grad)
            if arm.k == k and (arm.gamma or 0.0) == (gamma or 0.0)
        )
        return next(found, [])

    def label(self, arm: Arm) -> str:
        """The arm's name; Highway-BP's includes gamma=0 where the preset has another gamma."""
        at_zero = arm.grad == "highway" and not arm.gamma and preset_gamma(self.preset)
        return str(arm._replace(gamma="0") if at_zero else arm)

    def ks(self, grad: str, gamma: float | None = None) -> list[int]:
        """All k for which a plain method has rows, in ascending order."""
        every = {arm.k for arm in self.plain(grad) if arm.k is not None}
        return sorted(k for k in every if self.arm(grad, k, gamma))

    @property
    def with_moments(self) -> list[Row]:
        """The runs of backpropagation that measured the gradient's error."""
        return [row for row in self.arm("bp") if "gradient_error" in row["curve"]]

    @property
    def learned(self) -> bool:
        """Whether backpropagation is clearly better than a guess; if not, nothing can be judged."""
        exact = [row for row in self.arm("bp") if not row["diverged"]]
        if not exact:
            return False
        if self.paper.classes is not None:
            guess = 100.0 / exact[0]["config"]["data"].get("classes", self.paper.classes)
            return fmean(map(score, exact)) >= guess + POINTS
        guess = log(exact[0]["config"]["data"]["vocabulary"])
        return fmean(row["eval_loss"] for row in exact) <= (1 - SHARE) * guess

    def __str__(self) -> str:
        return f"{self.title} ({self.preset}), {self.device}"


def settings_of(paper: PaperRow, rows: Iterable[Row]) -> tuple[list[Setting], list[str]]:
    """The settings of an experiment's rows, the best first, and why other rows belong to none.

    The paper's own setting comes first, then the reduced ones in their order. If a preset has rows
    from several kinds of device, the setting with the most plain methods of enough seeds comes
    first, then that with the most rows.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    refused = []
    for row in rows:
        preset, device = row["experiment"], row["device_kind"]
        if preset not in paper.presets:
            expected = " or ".join(paper.presets)
            refused.append(f"{name_of_run(row)} is of {preset}; expected {expected}")
        elif row["setup"] != preset_setup(preset, device):
            refused.append(f"{name_of_run(row)} is not what {preset} gives today; make it again")
        else:
            groups.setdefault((preset, device), []).append(row)
    found = [Setting(paper, *which, by_arm(group)) for which, group in groups.items()]
    found.sort(key=lambda s: (paper.presets.index(s.preset), -len(s.settled), -len(s.rows)))
    return found, refused


def error_score(row: Row) -> float:
    """A score where less is better, in the units of margins: points of error, bits, or log of
    perplexity. It is infinite for a run that diverged."""
    if row["diverged"]:
        return float("inf")
    match row["metric"]:
        case "eval_accuracy":
            return 100.0 - score(row)
        case "eval_perplexity":
            return log(score(row))
    return score(row)


def has_diverged(row: Row) -> bool:
    """Whether loss or gradient was not finite, or the last evaluation far worse than the best."""
    if row["diverged"]:
        return True
    losses = [v for v in row["curve"]["eval"]["eval_loss"] if v is not None and isfinite(v)]
    return row["eval_loss"] > (1 + RISE) * min(losses)


def half_interval(values: Sequence[float]) -> float:
    """Half the width of a mean's interval; nan for too few values, or if a run diverged."""
    if len(values) < ENOUGH or not all(map(isfinite, values)):
        return nan
    return float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stdev(values) / sqrt(len(values)))
