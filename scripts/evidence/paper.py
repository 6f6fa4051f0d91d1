"""The paper's nine experiments and printed figures, from results/paper.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf

from experiments.errors import UserError

REPOSITORY = Path(__file__).parents[2]
PAPER = REPOSITORY / "results" / "paper.yaml"


@dataclass(frozen=True)
class PaperRow:
    """One row of Table 2; the fields are explained at the top of results/paper.yaml."""

    key: str
    title: str
    preset: str
    data: str
    stand_ins: list[str]
    figure: int
    metric: str
    L: int
    parameters: int
    batch_size: int
    intermediate_losses: bool
    sweep: dict[str, list[int]]
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
        return f"python scripts/sweep.py {self.key}"


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
        raise UserError(f"row {key!r} is not one of the paper's; expected {', '.join(rows)}")
    return rows[key]
