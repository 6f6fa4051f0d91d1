"""Times that may be compared: of one device, and not of how busy it was."""

from __future__ import annotations

import pytest

from scripts.evidence.clock import about_times, axis_of, one_device
from scripts.figures.draw import curve_of
from tests.scripts.synthetic_runs import row

QUIET = {"device": "CPU x, 1 threads", "seconds": 10.0, "cpu_seconds": 9.9}
BUSY = QUIET | {"seconds": 20.0}


def test_times_are_of_the_device_that_backpropagation_ran_on() -> None:
    here = [row("bp", None)]
    there = [row("highway", k, device="GPU") for k in (0, 1)]
    assert one_device(here + there) == (here, 2)
    assert one_device(there) == (there, 0)
    assert one_device([]) == ([], 0)


@pytest.mark.parametrize(
    ("rows", "axis", "said"),
    [
        ([QUIET, QUIET], "seconds", "CPU x, 1 threads"),
        ([QUIET, BUSY], "processor", "CPU x, 1 threads; processor time, as other work slowed runs"),
        (
            [BUSY, QUIET | {"cpu_seconds": None}],
            "seconds",
            "CPU x, 1 threads; other work slowed runs, up to 2.0 x",
        ),
        (
            [BUSY | {"device": "CPU x, 2 threads"}],
            "seconds",
            "CPU x, 2 threads; other work slowed runs, up to 2.0 x",
        ),
        ([BUSY | {"device": "GPU"}], "seconds", "GPU"),  # waits for the device
    ],
)
def test_processor_time_stands_in_where_other_work_slowed_runs(rows, axis, said) -> None:
    found = [row("bp", None, seed, **changes) for seed, changes in enumerate(rows)]
    assert axis_of(found) == axis
    assert about_times(found, 0) == said


def test_rows_of_other_devices_are_counted() -> None:
    rows = [row("bp", None, cpu_seconds=None)]
    assert about_times(rows, 2) == "CPU, 2 threads; 2 on other devices left out"


def test_processor_time_is_that_of_a_mean_step_times_the_steps() -> None:
    columns = {"step": [100, 300], "seconds": [1.0, 20.0], "eval_loss": [2.0, 1.0]}
    curve = curve_of(row("bp", None, **BUSY) | {"curve": {"eval": columns}}, "eval")
    assert curve["processor"].tolist() == pytest.approx([3.3, 9.9])
