"""Hours that runs take: as measured where there are rows, else steps times the time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from scripts.evidence.paper import PaperRow
from scripts.evidence.results_io import Results
from scripts.evidence.rows import Row


def measured(rows: Sequence[Row]) -> str:
    """For instance "3.4 h on CPU AMD EPYC, 1 threads": training alone, all rows together."""
    by_device: dict[str, float] = {}
    for row in rows:
        by_device[row["device"]] = by_device.get(row["device"], 0.0) + row["seconds"] / 3600
    return ", ".join(f"{hours:.2g} h on {device}" for device, hours in by_device.items())


def estimated(results: Results, paper: PaperRow) -> str:
    """Of one run of backpropagation in the paper's own setting, on one GPU."""
    for preset in (paper.preset, *paper.reduced):
        name = f"steps_{preset}.cuda"
        record = results.records(f"{name}.json").get(name)
        if record and "small" not in preset and "narrow" not in preset:
            seconds = record["seconds"]
            bp = paper.steps * seconds["bp"] / 3600
            ours = fmean(s for arm, s in seconds.items() if arm.startswith("k")) / seconds["bp"]
            device = record["environment"]["device"]
            return (
                f"in full about {bp:.1g} h a run of backpropagation and {ours:.1f} times that of "
                f"Highway-BP, estimated from steps on {device}"
            )
    return "in full: hours not estimated"
