"""The paper's nine experiments, results/paper.yaml, and the runs planned for them, plan.yaml."""

from dataclasses import dataclass, field
from functools import cache

from omegaconf import OmegaConf

from experiments.config import composed
from experiments.identity import identity, setup_hash
from experiments.provenance import REPOSITORY

RESULTS = REPOSITORY / "results"


@dataclass(frozen=True)
class PaperRow:
    """One row of Table 2; the fields are explained at the top of results/paper.yaml."""

    key: str
    title: str
    preset: str
    steps: int
    reduced: dict[str, str]
    margin: float
    figure: int
    metric: str
    L: int
    parameters: int
    intermediate_losses: bool
    counted: int | None = None
    paired: bool = False
    margin_reduced: float | None = None
    margin_loss: float | None = None
    classes: int | None = None  # where the score is an accuracy
    published: dict = field(default_factory=dict)
    milliseconds: dict = field(default_factory=dict)
    speedup: dict[int, float] = field(default_factory=dict)

    @property
    def presets(self) -> list[str]:
        """The presets whose rows belong to the experiment, the paper's own first."""
        return [self.preset, *self.reduced]

    @property
    def command(self) -> str:
        """The command that makes the rows."""
        gpu = all(one.gpu for one in plan() if one.key == self.key)
        return f"python scripts/run_plan.py {self.key}{' --gpu' if gpu else ''}"


@cache
def paper_rows() -> dict[str, PaperRow]:
    """The nine rows by key, in the order of Table 2."""
    entries = OmegaConf.to_container(OmegaConf.load(RESULTS / "paper.yaml"))
    return {key: PaperRow(key=key, **entry) for key, entry in entries.items()}


@cache
def preset_setup(preset: str, device_kind: str) -> str:
    """The setup hash that a preset gives today for rows on a kind of device."""
    return setup_hash(identity(composed(f"experiment={preset}"), device_kind))


@cache
def step_setup(preset: str, device_kind: str, *overrides: str) -> str:
    """A hash of the fields that a step's time depends on (the number of steps is left out)."""
    fields = identity(composed(f"experiment={preset}", *overrides), device_kind)
    same = ("optim.batch_size", "optim.algorithm", "optim.clip")
    return setup_hash({n: v for n, v in fields.items() if n in same or not n.startswith("optim.")})


@cache
def preset_model(preset: str) -> dict:
    """The fields of a preset's model."""
    fields = identity(composed(f"experiment={preset}"), "cuda")
    return {name: value for name, value in fields.items() if name.startswith("model.")}


@cache
def preset_gamma(preset: str) -> float:
    """Highway-BP's default gamma in a preset."""
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
        """A key: equal for runs of equal result. Diagnostics and CUDA graphs do not change it."""
        same = ("diagnostics", "trainer.cuda_graph=")
        changing = tuple(o for o in self.overrides if not o.startswith(same))
        return self.key, changing, self.seed

    @property
    def full(self) -> bool:
        """Whether the run is in the paper's own setting."""
        return self.overrides[0] == f"experiment={paper_rows()[self.key].preset}"

    def __str__(self) -> str:
        return f"{self.key}: {' '.join(self.overrides)} seed={self.seed}"


@cache
def plan() -> list[PlannedRun]:
    """All runs of results/plan.yaml, in their order."""
    return [
        PlannedRun(e["key"], (f"experiment={e['preset']}", *arm.split()), seed, e.get("gpu", False))
        for e in OmegaConf.to_container(OmegaConf.load(RESULTS / "plan.yaml"))
        for seed in e["seeds"]
        for arm in e["arms"]
    ]
