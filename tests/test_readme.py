"""README: its blocks run as they stand, its links lead somewhere, its numbers are the rows'."""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from scripts.evidence.claims import CLAIMS
from scripts.evidence.judge import Verdict
from scripts.evidence.results import read_results
from tests.train_cli import ROOT

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md"]


def fits(code: str) -> str:
    """With the one import before it that mends a torchvision of another build than torch."""
    works = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True)
    return code if works.returncode == 0 else "import models.torchvision_ops\n" + code


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_runs_in_a_fresh_process(code):
    command = [sys.executable, "-c", fits(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if "hb.advise" in code:
        assert "On this device: " in done.stdout


def test_it_is_short():
    assert len(README.splitlines()) <= 130 and len(BLOCKS) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_scores_of_the_pixels_are_those_of_the_rows():
    lines = (ROOT / "results" / "gru_pixels.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "NVIDIA" in row["device"]]
    assert len(rows) == 8
    for row in rows:
        assert f"{100 * row['eval_accuracy']:.1f}" in README.replace("\n", " "), row["arguments"]


def test_the_times_are_those_of_the_benchmarks():
    def record(name):
        return json.loads((ROOT / "results" / f"{name}.json").read_text())

    steps = record("steps_gru_cifar10_pixels.cuda")["seconds"]
    for name in ("bp", "k5", "k10"):
        assert f"{1000 * steps[name]:.1f} ms" in README
    assert f"{record('bench_trunk')['ratios']['k1_over_plain']:.2f} of a plain step" in README
    small = record("bench_rnn")["small"][0]["speedup"]
    assert f"1 / {small['k0']:.1f} and 1 / {small['k5']:.1f} of `nn.GRU`" in README


def test_the_tally_of_claims_is_the_reports():
    results = read_results(ROOT / "results")
    found = Counter(claim.judge(results).verdict for claim in CLAIMS)
    tally = ", ".join(f"{n} {verdict}" for verdict in Verdict if (n := found[verdict]))
    assert f"Of {len(CLAIMS)} claims of the paper: {tally}." in README.replace("\n", " ")
