"""Verdicts on the paper's claims from synthetic rows, and the page that shows them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.errors import UserError
from scripts import make_report, make_tables
from scripts.evidence import claims
from scripts.evidence.claims import NOT, NOT_SO_FAR, NOT_YET, PARTLY, REPRODUCED, TOO_SHORT
from scripts.evidence.every_source import Results
from scripts.evidence.evidence import Evidence, matches, read_evidence
from scripts.evidence.theorem_check import largest_errors
from tests.scripts.synthetic_runs import ROOT, row, write_rows

WHOLE = {
    "reduced": False,
    "experiment": "resnet32_cifar10",
    "data": "uoft-cs/cifar10",
    "parameters": 464_000,
    "batch_size": 128,
}


def resnet32(k3: float, seeds: int = 2, **changes: object) -> list[dict]:
    """Runs of backpropagation that end at 92.0 and 93.0 %, and of k = 3."""
    rows = [
        row("bp", None, seed, eval_accuracy=0.92 + 0.01 * seed, **changes) for seed in range(seeds)
    ]
    return rows + [
        row("highway", 3, seed, eval_accuracy=k3 + 0.01 * seed, **changes) for seed in range(seeds)
    ]


def evidence_of(**rows: list[dict]) -> Evidence:
    return Evidence(Results(Path(), rows, []), {})


def verdict(rows: list[dict]) -> str:
    return claims.matches_backprop("resnet32", 3)(evidence_of(resnet32=rows)).verdict


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (resnet32(0.925, **WHOLE), REPRODUCED),
        (resnet32(0.925), PARTLY),  # reduced
        (resnet32(0.925, reduced=False, experiment="resnet56_tiny_imagenet32"), PARTLY),
        (resnet32(0.88, **WHOLE), NOT),
        (resnet32(0.88), NOT_SO_FAR),
        (resnet32(0.908, **WHOLE), REPRODUCED),  # 1.2 below, two standard errors are 1.41
        (resnet32(0.908, seeds=1, **WHOLE), NOT),  # a single seed: half a point
        (resnet32(0.925)[:2], NOT_YET),  # backpropagation alone
    ],
)
def test_verdicts(rows: list[dict], expected: str) -> None:
    assert verdict(rows) == expected


def test_nothing_is_concluded_from_runs_that_have_not_learned() -> None:
    rows = [row("bp", None, eval_accuracy=0.14), row("highway", 3, eval_accuracy=0.13)]
    found = claims.matches_backprop("resnet32", 3)(evidence_of(resnet32=rows))
    assert found.verdict == TOO_SHORT and "hardly more than a guess" in found.measured[0]
    assert claims.five_iterations(evidence_of(resnet32=rows)).verdict == NOT_YET


def test_lower_is_better_for_losses() -> None:
    text = {"metric": "eval_bits_per_char"}
    exact = [row("bp", None, eval_bits_per_char=2.5, **text)]
    assert matches([row("highway", 1, eval_bits_per_char=2.4, **text)], exact).holds
    assert not matches([row("highway", 1, eval_bits_per_char=2.52, **text)], exact).holds


def test_schedules_windows_and_tolerances_judge_no_claim() -> None:
    exact = resnet32(0.925)[:2]
    for change in ({"schedule": "linear"}, {"group_size": 4}, {"tolerance": 0.1}):
        assert verdict([*exact, row("highway", 3, **change)]) == NOT_YET


def test_most_of_several_comparisons_is_partly() -> None:
    def evidence(better: list[int]) -> Evidence:
        rows = [row("highway", k, eval_accuracy=0.5 + 0.1 * (k in better)) for k in (1, 2, 3)]
        rows += [row("fixed_point", k, eval_accuracy=0.55) for k in (1, 2, 3)]
        return evidence_of(gru_chars=rows)

    assert claims.better_than_fixed_point(evidence([1, 2])).verdict == PARTLY
    assert claims.better_than_fixed_point(evidence([1])).verdict == NOT_SO_FAR
    assert "2 of 3" in claims.better_than_fixed_point(evidence([1, 2])).measured[-1]


def test_the_theorem_is_computed() -> None:
    sums, exact = largest_errors(L=4, width=3)
    assert max(sums, exact) < 1e-13


def test_every_claim_has_a_verdict_without_rows() -> None:
    nothing = evidence_of()
    found = {claim.text: claim.judge(nothing).verdict for claim in claims.CLAIMS[1:]}
    assert set(found.values()) == {NOT_YET}
    assert len(found) == len(claims.CLAIMS) - 1  # no text twice


def test_commands_of_claims_name_rows_and_files_that_exist() -> None:
    for claim in claims.CLAIMS:
        for key in re.findall(r"ROW=(\w+)", claim.command):
            assert key in claims.paper_rows()
        for script in re.findall(r"scripts/\w+\.py", claim.command):
            assert (ROOT / script).exists()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_rows(tmp_path / "resnet32.jsonl", resnet32(0.925))
    make_tables.main([str(tmp_path)])
    return tmp_path


def test_the_page_stands_alone(results: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(make_report, "print_pdf", lambda html: None)
    (results / "figures").mkdir()
    shutil.copy(ROOT / "results" / "figures" / "bounds.png", results / "figures" / "figure2.png")
    make_report.main([str(results)])
    html = (results / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert html.count("data:image/png;base64,") == 1
    assert "Highway k=3 93.00 (2 seeds); BP 92.50 (2 seeds)" in html
    assert "Not yet run: <code>make sweep ROW=resnet110</code>" in html
    assert html.count('class="verdict') == len(claims.CLAIMS) + len(claims.VERDICTS)
    assert "partly             ResNet-32 matches" in capsys.readouterr().out


def test_a_broken_file_is_told_and_left_out(results: Path, capsys: pytest.CaptureFixture) -> None:
    (results / "gpt2.jsonl").write_text("{")
    assert set(read_evidence(results).results.setups) == {"resnet32"}
    assert "gpt2.jsonl line 1 is not JSON" in capsys.readouterr().err


def test_the_page_says_what_it_had_to_leave_out(results: Path, monkeypatch) -> None:
    monkeypatch.setattr(make_report, "print_pdf", lambda html: None)
    (results / "gpt2.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"left out gpt2.jsonl; the page says so"):
        make_report.main([str(results)])
    assert "could not be read: gpt2.jsonl" in (results / "report.html").read_text()


def test_no_results_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_report.py", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: no *.jsonl in {tmp_path}; collect runs with scripts/collect_rows.py"
    ]


@pytest.mark.skipif(not any(map(shutil.which, make_report.BROWSERS)), reason="no Chromium here")
def test_a_browser_prints_the_page(results: Path) -> None:
    make_report.main([str(results)])
    assert (results / "report.pdf").read_bytes().startswith(b"%PDF")


def test_without_a_browser_there_is_no_pdf(results: Path, monkeypatch) -> None:
    monkeypatch.setattr(make_report, "BROWSERS", ("no-such-browser",))
    assert make_report.print_pdf(results / "report.html") is None
