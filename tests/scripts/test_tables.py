"""Tables from synthetic rows and benchmarks, in Markdown and LaTeX."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.errors import UserError
from scripts import make_tables
from scripts.evidence.table import Table, latex, markdown
from tests.scripts.synthetic_runs import METHODS, ROOT, of_paper, row, write_rows

KS = (0, 1, 2, 3, 5, 10, 20)
NAMES = ("figure2", "table2", "table3", "table6")


def bench(folder: Path, name: str, keys: tuple[str, ...], device: str = "CPU x") -> None:
    """A record of the paper's shapes: k iterations take 100 + k ms, the loop 220."""
    ms = (
        {"nn": 110.0, "loop": 220.0}
        | {f"k{k}": 100.0 + k for k in KS}
        | {f"fp{k}": 90.0 + k for k in KS}
    )
    found = [
        {
            "row": key,
            "shape": key,
            "ms": ms,
            "speedup": {n: 110.0 / value for n, value in ms.items()},
        }
        for key in keys
    ]
    where = {"device": device, "torch": "2", "commit": "abcdef0123", "dirty": False}
    (folder / f"bench_rnn{name}.json").write_text(
        json.dumps({"environment": where, "repeats": 3, "paper": found})
    )


def page(folder: Path, name: str) -> str:
    make_tables.main([str(folder), "--only", name])
    return (folder / "tables" / f"{name}.md").read_text()


def check_latex(text: str) -> None:
    """What pdflatex would complain of first: braces, ends, cells per line, bare characters."""
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    plain = re.sub(r"\\[\\{}$&#_%]|\$[^$]*\$|\{%$", "", "\n".join(lines), flags=re.M)
    assert not re.search(r"[#_^~$%<>|±]", plain)
    assert "\n".join(lines).isascii()
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    begun, ended = (re.findall(rf"\\{word}{{(\w+)}}", text) for word in ("begin", "end"))
    assert begun == ["table", "tabular"] * (len(begun) // 2) and sorted(begun) == sorted(ended)
    for part in text.split(r"\begin{tabular}")[1:]:
        columns = re.match(r"\{((?:[lr]|p\{\d+em\})+)\}", part)[1]
        count = len(re.sub(r"\{\d+em\}", "", columns))
        body = part.split(r"\end{tabular}")[0]
        assert body.count(r"\toprule") == body.count(r"\midrule") == body.count(r"\bottomrule") == 1
        cells = [line for line in body.splitlines() if line.endswith(r" \\")]
        assert len(cells) > 1
        assert {len(re.findall(r"(?<!\\)&", line)) for line in cells} == {count - 1}


def test_one_table_has_two_renderings() -> None:
    table = Table(["name", "a_b"], [["50 % {x}", "1.0 ± 0.1"], ["p|q", "not measured"]], "Head")
    assert markdown(table).splitlines() == [
        "## Head",
        "",
        "| name | a_b |",
        "| --- | ---: |",
        "| 50 % {x} | 1.0 ± 0.1 |",
        r"| p\|q | not measured |",
    ]
    text = latex(table, "one", ["On a CPU."])
    assert r"\begin{tabular}{lr}" in text and r"name & a\_b \\" in text
    assert r"50 \% \{x\} & 1.0 $\pm$ 0.1 \\" in text
    assert r"\caption{On a CPU. Head.}" in text
    check_latex(text)


def test_wide_tables_are_scaled_and_long_cells_broken_in_latex() -> None:
    wide = Table(["a", "b", "c"], [["word " * 20, "x" * 35, "y" * 35]])
    assert r"\resizebox{\textwidth}{!}{%" in latex(wide, "wide")
    assert r"\begin{tabular}{p{20em}ll}" in latex(wide, "wide")
    check_latex(latex(wide, "wide"))


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="has 1 cells; expected 2"):
        Table(["a", "b"], [["1"]])


def test_tables_of_setups(results: Path) -> None:
    text = page(results, "tiny")
    title = "resnet20 (0.27M parameters) on digits, reduced run: 300 steps of batch 64"
    assert text.startswith(f"# {title}\n")
    assert "| Highway k=0 | 2 | 87.20 ± 0.28 | 20.0 | 0.60 | 15.0 | 400 | - | - |" in text
    assert "bpNone seed 1" in text


def test_passes_are_in_the_table_where_they_were_counted(tmp_path: Path) -> None:
    counted = {"block_passes": 600, "sequential_passes": 900}
    linear = {**row("highway", 0, schedule="linear start=0 end=5", **counted), "k": None}
    write_rows(tmp_path / "tiny.jsonl", [linear])
    assert re.search(
        r"\| Highway linear start=0 end=5 \| 1 \|.* \| 2.00 \| 3.00 \|", page(tmp_path, "tiny")
    )


def test_table_2_puts_the_paper_s_values_beside_ours(tmp_path: Path) -> None:
    write_rows(tmp_path / "resnet32.jsonl", [row(g, k, s) for g, k in METHODS for s in (0, 1)])
    write_rows(
        tmp_path / "resnet110.jsonl",
        [
            of_paper("resnet110", "bp", eval_accuracy=0.938),
            of_paper("resnet110", "highway", 4, eval_accuracy=0.94),
            of_paper("resnet110", "highway", 5, eval_accuracy=0.95),
        ],
    )
    write_rows(tmp_path / "roberta.jsonl", [of_paper("roberta", "highway", 3, gamma="auto")])
    text = page(tmp_path, "table2")
    assert (
        "| CIFAR-10 | pre-activation ResNet-32 | 15 | 9 | 464k | 270k | 0.58 | no | stand-in: "
        "resnet20, 0.27M parameters, trained on digits; reduced: 300 steps of 64, 2 seeds |"
    ) in text
    assert "| 54 | 54 | 1.7M | 1.7M | 1.00 | no | complete: 300 steps of 128, 1 seed |" in text
    assert (
        "| pre-activation ResNet-32, CIFAR-10 | accuracy (%) | 92.75 | 97.20 ± 0.28 | 1.05 | 3 "
        "| 92.68 | 94.70 ± 0.28 | 1.02 | -2.50 | stand-in, reduced |"
    ) in text
    # the paper prints k = 4 alone
    assert (
        "| ResNet-110, CIFAR-10 | accuracy (%) | 93.8 | 93.80 | 1.00 | 4 | 93.8 | 94.00 | 1.00 "
        "| +0.20 | complete |"
    ) in text
    assert "| - | not yet run | - | 3 (gamma=auto) | - | 94.50 | - | - | complete |" in text
    assert (
        "| 3-layer GRU, WikiText-103 | perplexity | - | not yet run | - | 0 | 50 | not yet run "
        "| - | - | not yet run |"
    ) in text
    assert "not yet run: python scripts/sweep.py gru_words" in text
    assert "Here: CPU, 2 threads." in text and "public review discussion" in text
    check_latex((tmp_path / "tables" / "table2.tex").read_text())


def test_old_rows_have_fields_that_were_not_recorded(tmp_path: Path) -> None:
    write_rows(tmp_path / "resnet32.jsonl", [row("bp", None, parameters=None, L=None)])
    assert "| 15 | not recorded | 464k | not recorded | - |" in page(tmp_path, "table2")


def test_tables_3_and_6_have_a_table_per_device_and_labelled_gaps(tmp_path: Path) -> None:
    write_rows(tmp_path / "tiny.jsonl", [row("bp", None)])
    bench(tmp_path, "_paper", ("gru_chars",))
    bench(tmp_path, "_gpu", ("gru_chars", "lstm_chars"), "GPU y")
    text = page(tmp_path, "table3")
    assert "Paper: one A100-class GPU" in text and "two devices" in text
    parts = text.split("## Here: ")[1:]
    assert [part.split(",")[0] for part in parts] == ["GPU y", "CPU x"]
    chars = "GRU, WikiText-103 characters"
    assert f"| {chars} | 5 | 1.8 | 2.10 | 1.16 | 1.05 |" in parts[1]
    assert "| LSTM, WikiText-103 characters | 0 | 3.0 | 2.20 | 0.73 | 1.10 |" in parts[0]
    assert "| LSTM, WikiText-103 characters | 0 | 3.0 | not measured | - |" in parts[1]
    text = page(tmp_path, "table6").split("## Here: ")[2]
    assert f"| {chars} | FPI | paper | 209 | - | 62 | 69 | 73 | 79 | 92 | 119 | 176 |" in text
    assert f"| {chars} | FPI | here | 220 | 110 | 90 | 91 | 92 | 93 | 95 | 100 | 110 |" in text
    assert f"| {chars} | Highway | ratio | 1.05 | - | 1.52 | 1.31 |" in text
    for name in ("table3", "table6"):
        check_latex((tmp_path / "tables" / f"{name}.tex").read_text())


def test_without_a_benchmark_tables_3_and_6_say_how_to_measure(results: Path) -> None:
    for name in ("table3", "table6"):
        text = page(results, name)
        assert "## Here: not measured; python scripts/bench_rnn.py --parts paper" in text
        assert "| not measured |" in text
        check_latex((results / "tables" / f"{name}.tex").read_text())


def test_a_broken_benchmark_is_told_and_all_else_is_written(
    results: Path, capsys: pytest.CaptureFixture
) -> None:
    bench(results, "", ("gru_chars",))
    (results / "bench_rnn_bad.json").write_text("{")
    (results / "bench_rnn_short.json").write_text('{"repeats": 3}')
    with pytest.raises(UserError, match="left out bench_rnn_bad, bench_rnn_short; all others"):
        make_tables.main([str(results)])
    bad, short = capsys.readouterr().err.splitlines()
    assert bad == f"error: {results / 'bench_rnn_bad.json'} is no benchmark's record; measure again"
    assert short.endswith("bench_rnn_short.json has no environment; measure again")
    assert "CPU x" in (results / "tables" / "table3.md").read_text()


def test_a_table_that_cannot_be_written_does_not_keep_the_others(
    results: Path, capsys: pytest.CaptureFixture
) -> None:
    (results / "tables" / "table2.md").mkdir(parents=True)
    with pytest.raises(UserError, match="left out table2; all others are done"):
        make_tables.main([str(results)])
    assert capsys.readouterr().err == (
        f"error: cannot write {results / 'tables' / 'table2.md'} (Is a directory)\n"
    )
    assert (results / "tables" / "tiny.md").exists()


def test_an_unwritable_output_is_one_line(results: Path) -> None:
    (results / "tables").write_text("a file where a folder should be")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_tables.py", results],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: cannot write {results / 'tables'}")


def test_no_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \*.jsonl"):
        make_tables.main([str(tmp_path)])


def test_signals_are_held_against_final_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    moment = {
        "step": 0,
        "seconds": 0.0,
        "gradient_error": [
            {
                "k": k,
                "cosine": 1 - 0.1**k,
                "relative_error": 0.5**k,
                "increment": 0.3**k,
                "layers": {},
            }
            for k in (0, 1, 3)
        ],
    }
    rows = [row("bp", None, eval_loss=0.5)]
    rows += [
        row("highway", k, seed, eval_loss=0.5 + 0.1 / (1 + k)) for k in (0, 1, 3) for seed in (0, 1)
    ]
    write_rows(tmp_path / "tiny.jsonl", rows, [moment])
    write_rows(tmp_path / "unmeasured.jsonl", rows)
    text = page(tmp_path, "signals")
    assert "| resnet20 | 1 | 0.5000 | 0.1000 | 0.0270 | 0.1000 |" in text
    assert text.count("| resnet20 |") == 3 and "- relative error: 1.00" in text
    (tmp_path / "tiny.jsonl").unlink()
    make_tables.main([str(tmp_path), "--only", "signals"])
    assert "no run in" in capsys.readouterr().out


def test_recipes_say_what_to_see_on_the_way(tmp_path: Path) -> None:
    rows = [row(grad, k, seed) for grad, k in METHODS for seed in (0, 1)]
    write_rows(tmp_path / "resnet32.jsonl", rows)
    make_tables.main([str(tmp_path), "--only", "recipes"])
    lines = (tmp_path / "tables" / "recipes.md").read_text().splitlines()
    bp, highway = (line.split(" | ") for line in lines if line.startswith("| pre-activation"))
    assert (bp[2], highway[2]) == ("BP", "Highway k=3")
    assert [float(loss) for loss in bp[3:6]] == sorted(map(float, bp[3:6]), reverse=True)
    assert bp[6] == "97.00 after 100" and bp[7].startswith("97.00 accuracy")
    assert float(bp[8]) == pytest.approx(10.0 / 10 / 3600, abs=0.005)
    assert not any(line.startswith("| ResNet-110") for line in lines)
