"""Read a results folder: rows and the records of benchmarks."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from scripts.evidence.paper import PaperRow, paper_rows, preset_gamma, step_setup
from scripts.evidence.rows import Arm, read_rows
from scripts.evidence.settings import Setting, settings_of


@dataclass(frozen=True)
class Results:
    """What a results folder holds.

    Attributes:
        settings: by experiment, the settings that its rows belong to, the paper's own first.
        left_out: a line for everything that cannot be read, or belongs to no preset.
    """

    folder: Path
    settings: dict[str, list[Setting]]
    left_out: list[str] = field(default_factory=list)

    @property
    def chosen(self) -> list[tuple[PaperRow, Setting | None]]:
        """The best setting of every experiment, in the order of Table 2."""
        return [
            (paper, next(iter(self.settings[key]), None)) for key, paper in paper_rows().items()
        ]

    def record(self, name: str) -> Any:
        """The benchmark record NAME.json; None without it."""
        return self.records(f"{name}.json").get(name)

    def records(self, pattern: str) -> dict[str, Any]:
        """Benchmark records by file name without .json; what is no JSON object is left out."""
        found = {}
        for file in sorted(self.folder.glob(pattern)):
            try:
                found[file.stem] = {**json.loads(file.read_text())}
            except (ValueError, TypeError) as error:
                self.left_out.append(f"{file.name} is no JSON object ({error}); measure again")
        return found

    def step_seconds(self, setting: Setting) -> dict[Arm, float]:
        """Seconds of a step of plain methods, measured by bench_steps.py; empty if not measured.

        If the preset was not measured, another one of the experiment with the same step is used.
        """
        kind, step = setting.device_kind, step_setup(setting.preset, setting.device_kind)
        same = [p for p in setting.paper.presets if step_setup(p, kind) == step]
        found = {p: self.record(f"steps_{p}.{kind}") for p in (setting.preset, *same)}
        known = (
            record["seconds"]
            for preset, record in found.items()
            if record and step_setup(preset, kind, *record["overrides"]) == step
        )
        measured = next(known, {})
        gamma = preset_gamma(setting.preset)
        names = {arm: step_name(arm, gamma) for arm in setting.plain()}
        return {arm: measured[name] for arm, name in names.items() if name in measured}


def step_name(arm: Arm, gamma: float) -> str:
    """A plain arm's name in the records of bench_steps.py; ``gamma`` is the preset's."""
    match arm.grad:
        case "bp":
            return "bp"
        case "fixed_point":
            return f"fp{arm.k}"
    return f"k{arm.k}" + ("" if arm.gamma == gamma else f"g{arm.gamma}".removesuffix(".0"))


def read_results(folder: Path) -> Results:
    """Read KEY.jsonl of all experiments; report and leave out what cannot be used.

    Raises:
        UserError: the folder has no such file.
    """
    found: dict[str, list[Setting]] = {}
    left_out = []
    for key, paper in paper_rows().items():
        file, rows = folder / f"{key}.jsonl", []
        try:
            rows = read_rows(file)
        except UserError as error:
            left_out.append(str(error))
        found[key], refused = settings_of(paper, rows)
        left_out += [f"{file.name}: {line}" for line in refused]
    if not any((folder / f"{key}.jsonl").exists() for key in found):
        raise UserError(f"no KEY.jsonl in {folder}; collect runs with scripts/collect_rows.py")
    for line in left_out:
        print(f"error: {line}", file=sys.stderr)
    return Results(folder, found, left_out)
