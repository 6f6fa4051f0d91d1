"""`Claim`: a statement of the paper, and the function that judges it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scripts.evidence.judge import Finding, Outcome
from scripts.evidence.paper import paper_rows
from scripts.evidence.results import Results

Judge = Callable[[Results], Finding]


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


def holds_if(held: bool) -> Outcome:
    return Outcome.HOLDS if held else Outcome.FAILS


def holds_for(held: Sequence[bool]) -> Outcome:
    """Undecided if it holds for some alone."""
    return Outcome.UNDECIDED if any(held) and not all(held) else holds_if(all(held))
