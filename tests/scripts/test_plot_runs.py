"""The comparison of finished runs below a folder, on made-up ones."""

import runpy

import pytest
from matplotlib import pyplot as plt

from experiments.errors import UserError
from scripts import plot_runs
from scripts.evidence.rows import by_arm
from tests.scripts.synthetic_runs import ROOT, diverged, row, write_run

pytestmark = pytest.mark.slow


@pytest.fixture
def folders(tmp_path):
    for arm in (("bp",), ("fixed_point", 2), ("highway", 0), ("mine.Half", 3)):
        for seed in (0, 1):
            write_run(tmp_path, row("gru_pixels", *arm, seed=seed, value=0.8))
    return tmp_path


def test_plot_runs_writes_picture_and_table(folders, capsys):
    picture = folders / "demo.png"
    plot_runs.main([str(folders), "--out", str(picture)])
    pixels = plt.imread(picture)
    assert pixels.shape[1] > 600 and pixels.std() > 0.01
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("  ")[0] for line in lines[1:5]]
    assert names == ["BP", "FP k=2", "Highway k=0", "mine.Half k=3"]
    assert lines[3].split()[2:] == ["2", "80.00", "6.0", "0.60"]
    assert lines[-1] == f"picture: {picture}"


def test_table_without_bp_has_no_ratio():
    lines = plot_runs.table(by_arm([row("gru_pixels", "highway", 1)])).splitlines()
    assert lines[1].split()[-1] == "-"


def test_unfinished_runs_are_left_out(tmp_path, capsys, monkeypatch):
    (write_run(tmp_path, row("gru_pixels", "highway", 1)) / "DONE").unlink()
    monkeypatch.setattr("sys.argv", ["plot_runs.py", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:  # whose message Python prints
        runpy.run_path(ROOT / "scripts" / "plot_runs.py", run_name="__main__")
    assert ended.value.code == (
        f"error: no finished runs under {tmp_path}; expected run folders that contain DONE"
    )
    write_run(tmp_path, row("gru_pixels"))
    plot_runs.main([str(tmp_path)])
    assert "Highway" not in capsys.readouterr().out
    assert (tmp_path / "comparison.png").exists()


def test_a_run_that_diverged_at_once_has_no_records(tmp_path):
    (write_run(tmp_path, diverged("gru_pixels")) / "metrics.jsonl").write_text("")
    write_run(tmp_path, row("gru_pixels", "highway", 1))
    plot_runs.main([str(tmp_path)])


def test_runs_that_cannot_be_compared_are_refused(folders):
    write_run(folders, row("gru_pixels", "highway", 5, steps=100))
    with pytest.raises(UserError, match=r"mixes .* 100 steps of 128 and .* 300 steps"):
        plot_runs.main([str(folders)])
