"""Folders of synthetic runs and of their collected rows."""

from pathlib import Path

import pytest

from scripts import collect_rows
from tests.scripts.synthetic_runs import METHODS, row, write_run


@pytest.fixture
def run_folders(tmp_path: Path) -> Path:
    """Run folders of five methods, two seeds each."""
    root = tmp_path / "runs"
    for grad, k in METHODS:
        for seed in (0, 1):
            write_run(root, row(grad, k, seed))
    return root


@pytest.fixture
def results(tmp_path: Path, run_folders: Path) -> Path:
    """A results folder with their rows, tiny.jsonl."""
    collect_rows.main([str(run_folders), str(tmp_path / "results" / "tiny.jsonl")])
    return tmp_path / "results"
