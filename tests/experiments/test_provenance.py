"""Where a result comes from, without saying whose machine it was."""

import getpass
import json
import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import provenance
from experiments.provenance import environment, peak_memory_mb

CPU = torch.device("cpu")


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "tracked").write_text("1")
    git(tmp_path, "add", "tracked")
    git(tmp_path, "commit", "-q", "-m", "one")
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    return tmp_path


def test_commit_is_the_head_and_only_changes_to_tracked_files_make_it_dirty(repository):
    found = environment(CPU)
    assert found["commit"] == git(repository, "rev-parse", "HEAD")
    assert found["dirty"] is False
    (repository / "untracked").write_text("2")
    assert environment(CPU)["dirty"] is False
    (repository / "tracked").write_text("2")
    assert environment(CPU)["dirty"] is True


@pytest.mark.parametrize("missing", ["repository", "git"])
def test_without_a_repository_or_git_the_commit_is_unknown(tmp_path, monkeypatch, missing):
    if missing == "repository":
        monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    else:
        monkeypatch.setenv("PATH", "")
    found = environment(CPU)
    assert (found["commit"], found["dirty"]) == ("unknown", True)  # no commit describes it


def test_versions_are_those_in_use(monkeypatch):
    found = environment(CPU)
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["versions"]["numpy"] == np.__version__
    assert set(found["versions"]) == {"torch", "numpy", "datasets", "hydra-core", "transformers"}
    monkeypatch.setattr(provenance, "PACKAGES", ["nobodys-package"])
    assert environment(CPU)["versions"] == {"nobodys-package": "absent"}


def test_device_is_the_processor_and_its_threads(monkeypatch):
    device = environment(CPU)["device"]
    assert device.startswith("CPU ") and device.endswith(f", {torch.get_num_threads()} threads")
    monkeypatch.setattr(Path, "exists", lambda self: False)  # there is no /proc/cpuinfo
    monkeypatch.setattr(platform, "processor", lambda: "abacus")
    assert environment(CPU)["device"].startswith("CPU abacus, ")


def test_it_says_nothing_of_the_user_the_host_or_the_paths():
    text = json.dumps(environment(CPU))
    for secret in (platform.node(), str(Path.home()), str(Path.cwd()), f'"{getpass.getuser()}"'):
        assert secret not in text


def test_peak_memory_grows_with_what_was_touched():
    before = peak_memory_mb(CPU)
    size_mb = before + 50  # above any peak so far, whatever is in use now
    touched = torch.ones(int(size_mb * 1e6 / 4))
    assert peak_memory_mb(CPU) >= size_mb
    assert touched[-1] == 1
