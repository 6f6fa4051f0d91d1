"""Times that may be compared: of one device, and not of how busy it was with other work."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.evidence.rows import Row

SHARED = 1.2  # wall-clock by processor time from which on other work slowed a run


def one_device(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """The rows of one device, backpropagation's if it was run, and how many are of others."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["device"], []).append(row)
    kept = max(
        groups.values(),
        default=[],
        key=lambda group: (any(row["grad"] == "bp" for row in group), len(group)),
    )
    return kept, len(rows) - len(kept)


def slowed(rows: Sequence[Row]) -> float:
    """The largest wall-clock by processor time among runs on a CPU; 0 where none is known."""
    return max(
        (
            row["seconds"] / row["cpu_seconds"]
            for row in rows
            if row["cpu_seconds"] and row["device"].startswith("CPU")
        ),
        default=0.0,
    )


def axis_of(rows: Sequence[Row]) -> str:
    """The time to draw losses against: "seconds", wall-clock, as long as nothing else ran.

    Where other work slowed some of the runs, "processor": with one thread on a CPU it is what
    wall-clock would have been. It needs the processor time of all of them.
    """
    known = all(
        row["cpu_seconds"]
        and row["device"].startswith("CPU")
        and row["device"].endswith(" 1 threads")
        for row in rows
    )
    return "processor" if known and slowed(rows) > SHARED else "seconds"


def about_times(rows: Sequence[Row], others: int) -> str:
    """The device, and what else a reader must know of the times of ``rows``."""
    said = [f"{others} on other devices left out"] * bool(others)
    if axis_of(rows) == "processor":
        said.append("processor time, as other work slowed runs")
    elif slowed(rows) > SHARED:
        said.append(f"other work slowed runs, up to {slowed(rows):.1f} x")
    return "; ".join([rows[0]["device"], *said])
