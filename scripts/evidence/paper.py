"""The paper's nine experiments, results/paper.yaml, and the runs planned for them, plan.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from math import log

from omegaconf import OmegaConf

from experiments.config import composed
from experiments.errors import UserError
from experiments.identity import identity, setup_hash
from experiments.provenance import REPOSITORY

PAPER, PLAN = (REPOSITORY / "results" / name for name in ("paper.yaml", "plan.yaml"))


@dataclass(frozen=True)
class PaperRow:
    """One row of Table 2; the fields are explained at the top of results/paper.yaml."""

    key: str
    title: str
    preset: str
    steps: int
    reduced: list[str]
    margin: float
    figure: int
    metric: str
    L: int
    parameters: int
    intermediate_losses: bool
    paired: bool = False
    margin_reduced: float | None = None
    margin_loss: float | None = None
    classes: int | None = None  # where the score is an accuracy
    published: dict = field(default_factory=dict)
    milliseconds: dict = field(default_factory=dict)
    speedup: dict[int, float] = field(default_factory=dict)

    @property
    def model(self) -> str:
        return self.title.rpartition(", ")[0]

    @property
    def dataset(self) -> str:
        return self.title.rpartition(", ")[2]

    @property
    def command(self) -> str:
        """What makes its rows."""
        gpu = all(one.gpu for one in plan() if one.key == self.key)
        return f"python scripts/run_plan.py {self.key}{' --gpu' if gpu else ''}"

    def margin_of(self, full: bool) -> float:
        """By how much a worse score still matches, in the units of `rows.badness`."""
        margin = self.margin if full else self.margin_reduced or self.margin
        return log(1 + margin) if self.metric == "eval_perplexity" else margin


@cache
def paper_rows() -> dict[str, PaperRow]:
    """The nine rows by key, in the order of Table 2."""
    return {
        key: PaperRow(key=key, **entry)
        for key, entry in OmegaConf.to_container(OmegaConf.load(PAPER)).items()
    }


def paper_row(key: str) -> PaperRow:
    """One of them; UserError naming all keys for an unknown one."""
    rows = paper_rows()
    if key not in rows:
        raise UserError(f"{key!r} is not one of the paper's rows; expected {', '.join(rows)}")
    return rows[key]


@cache
def preset_setup(preset: str, device_kind: str) -> str:
    """The setup of a preset's rows on a kind of device, freshly composed."""
    return setup_hash(identity(composed(f"experiment={preset}"), device_kind))


@cache
def preset_gamma(preset: str) -> float:
    """The gamma that Highway-BP has in a preset unless it is told otherwise."""
    return composed(f"experiment={preset}").gamma


@dataclass(frozen=True)
class PlannedRun:
    """One run: the experiment whose rows it belongs to, train.py's arguments, the seed."""

    key: str
    overrides: tuple[str, ...]
    seed: int
    gpu: bool = False

    @property
    def result(self) -> tuple:
        """What runs of one result have in common; measuring on the way changes none."""
        changing = tuple(o for o in self.overrides if not o.startswith("diagnostics"))
        return self.key, changing, self.seed

    def __str__(self) -> str:
        return f"{self.key}: {' '.join(self.overrides)} seed={self.seed}"


@cache
def plan() -> list[PlannedRun]:
    """All runs of results/plan.yaml, in their order."""
    return [
        PlannedRun(e["key"], (f"experiment={e['preset']}", *arm.split()), seed, e.get("gpu", False))
        for e in OmegaConf.to_container(OmegaConf.load(PLAN))
        for seed in e["seeds"]
        for arm in e["arms"]
    ]
