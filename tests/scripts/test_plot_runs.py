"""The comparison of finished runs below a folder, on synthetic ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from experiments.errors import UserError
from scripts import plot_runs
from tests.scripts.synthetic_runs import ROOT, row, write_run


def assert_picture(path: Path) -> None:
    pixels = plt.imread(path)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 600
    assert pixels.std() > 0.01  # something is drawn


def test_plot_runs_writes_picture_and_table(
    run_folders: Path, capsys: pytest.CaptureFixture
) -> None:
    picture = run_folders / "demo.png"
    plot_runs.main([str(run_folders), "--out", str(picture)])
    assert_picture(picture)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:6]] == [
        "BP",
        "FP k=2",
        "Highway k=0",
        "Highway k=1",
        "Highway k=3",
    ]
    assert lines[3].split()[2:] == ["2", "87.20", "6.0", "0.60"]
    assert lines[-1] == f"picture: {picture}"


def test_table_without_bp_has_no_ratio() -> None:
    assert plot_runs.table([row("highway", 1)]).splitlines()[1].split()[-1] == "-"


def test_unfinished_runs_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_run(tmp_path, row("bp", None))
    (write_run(tmp_path, row("highway", 1)) / "DONE").unlink()
    plot_runs.main([str(tmp_path)])
    assert "Highway" not in capsys.readouterr().out
    assert_picture(tmp_path / "comparison.png")


def test_no_finished_runs_is_one_line(tmp_path: Path) -> None:
    program = ROOT / "scripts" / "plot_runs.py"
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: no finished runs under {tmp_path}; expected run folders that contain DONE"
    ]


def test_runs_that_cannot_be_compared_are_refused(run_folders: Path) -> None:
    write_run(run_folders, row("highway", 5, steps=100))
    with pytest.raises(UserError, match=r"mixes .* 100 steps of batch 64 and .* 300 steps"):
        plot_runs.main([str(run_folders)])


def test_a_broken_metrics_line_is_named(run_folders: Path) -> None:
    with (run_folders / "bpNone-0" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')
    with pytest.raises(UserError, match=r"metrics.jsonl line 304 is not JSON"):
        plot_runs.main([str(run_folders)])
