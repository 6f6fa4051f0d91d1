"""Figures, tables and the page, from made-up rows."""

import json
import re
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from experiments.errors import UserError
from scripts import make_report, make_results
from scripts.evidence.paper import paper_rows
from scripts.evidence.results import Results
from scripts.evidence.rows import by_arm, curve
from scripts.evidence.settings import Setting
from tests.scripts.synthetic_runs import diverged, moments, records, row, seeds, write_rows

pytestmark = pytest.mark.slow

GPT = "gpt2_narrow_wikipedia2015"


def measured(key: str, **changes) -> dict:
    """A run of backpropagation that measured the gradient's error."""
    one = row(key, **changes)
    errors = moments([0.7, 0.9, 1.0], [0.6, 0.8, 0.9], [0.5, 0.7, 0.9])
    return one | {"curve": curve(one, records(one) + errors)}


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_results(tmp_path)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Rows, and what is made of them."""
    folder = write_results(tmp_path_factory.mktemp("results"))
    make_results.main(["figures", str(folder)])
    make_results.main(["tables", str(folder)])
    return folder


def write_results(folder: Path) -> Path:
    """Rows of six experiments: full, reduced, not learned, diverged, with schedules, without BP."""
    found = {
        "gru_pixels": [
            measured("gru_pixels", value=0.48),
            *seeds("gru_pixels", "bp", None, [0.48, 0.481, 0.479])[1:],
            *seeds("gru_pixels", "highway", 0, [0.46, 0.461, 0.459]),
            *seeds("gru_pixels", "highway", 10, [0.48, 0.482, 0.478]),
            *seeds("gru_pixels", "fixed_point", 10, [0.38, 0.381, 0.379]),
            *seeds("gru_pixels", "highway", None, [0.47, 0.471, 0.472], schedule="linear start=0"),
        ],
        "gpt2": [
            measured("gpt2", preset=GPT, value=140.0),
            row("gpt2", "highway", 1, value=150.0, preset=GPT, gamma=0.2),
            diverged("gpt2", "highway", 3, preset=GPT, gamma=0.0),
        ],
        "gru_words": [row("gru_words", value=120.0), row("gru_words", "highway", 1, value=121.0)],
        "resnet110": [row("resnet110", value=0.12), row("resnet110", "highway", 3, value=0.11)],
        "resnet56": [row("resnet56", "highway", 3, value=0.5)],
        "resnet32": [row("resnet32", value=0.93), row("resnet32", "highway", 3, value=0.925)],
    }
    for key, rows in found.items():
        write_rows(folder, key, rows)
    ms = {f"{m}{k}": 10.0 + k for m in ("k", "fp") for k in (0, 1, 2, 3, 5, 10, 20)}
    ms |= {"nn": 15.0, "loop": 100.0}
    shape = {"row": "gru_chars", "shape": "GRU, batch 128", "ms": ms}
    shape["speedup"] = {name: 15.0 / value for name, value in ms.items()}
    environment = {"device": "a GPU", "torch": "2.13", "commit": "abcdef012345"}
    records = {
        "steps_gru_cifar10_pixels.cpu": {"overrides": [], "seconds": {"bp": 0.02, "k10": 0.03}},
        "bench_rnn": {"environment": environment, "repeats": 7, "paper": [shape], "small": [shape]},
    }
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


def test_all_figures_are_drawn_with_their_captions(results):
    names = {p.stem for p in (results / "figures").glob("*.png")}
    assert names == {*(f"figure{n}" for n in range(2, 7)), "time", "schedules", "scaling", "paths"}
    for name in names:
        pixels = plt.imread(results / "figures" / f"{name}.png")
        assert pixels.shape[1] > 600 and pixels.std() > 0.01
        assert (results / "figures" / f"{name}.pdf").exists()
    assert "make bench" in texts(results / "figures" / "scaling.svg")
    four = texts(results / "figures" / "figure4.svg")
    assert "the paper's own setting, CPU" in four and "300 steps of 128, 3 seeds" in four
    assert "not run" in four and "python scripts/run_plan.py\nlstm_chars" in four
    two = texts(results / "figures" / "figure2.svg")
    assert "not learned" in two and "paper, Highway" in two and "diverged" in two
    assert "no run of backpropagation" in two
    assert "reduced: gpt2 narrow wikipedia2015," in two and "narrow GPT-2, Wikipedia" in two
    five = texts(results / "figures" / "figure5.svg")
    assert "3-layer GRU against steps" in five and "python scripts/bench_steps.py" in five
    assert "linear" in texts(results / "figures" / "schedules.svg")
    used = (results / "figures" / "figure6.rows.txt").read_text()
    assert used.startswith("rows in figure6.png:\n") and used.count(", BP, ") == 2


def test_rows_and_seeds_beside_a_figure_are_those_drawn(results):
    figures = results / "figures"
    assert "linear" not in (figures / "figure4.rows.txt").read_text()
    drawn = (figures / "time.rows.txt").read_text()
    assert "Highway k=10" in drawn and "FP" not in drawn and "gru_wikitext103_words" not in drawn
    assert "300 steps of 128, 1 seed" in texts(figures / "figure6.svg")
    assert "step not measured: Highway k=0" in texts(figures / "time.svg")


def texts(picture: Path) -> str:
    """The text of a picture: matplotlib keeps that of every glyph run as a comment."""
    return "\n".join(re.findall(r"<!-- (.*?) -->", picture.read_text(), re.S))


def test_the_same_rows_give_the_same_bytes(results):
    before = {p: p.read_bytes() for p in (results / "figures").iterdir()}
    make_results.main(["figures", str(results), "--only", "figure4", "figure6"])
    assert before == {p: p.read_bytes() for p in (results / "figures").iterdir()}


def test_an_experiment_with_schedules_alone_has_a_panel(tmp_path):
    only = seeds("gru_pixels", "highway", None, [0.47], schedule="linear start=0")
    write_rows(tmp_path, "gru_pixels", only)
    make_results.main(["figures", str(tmp_path), "--only", "figure4"])
    assert "no run of backpropagation" in texts(tmp_path / "figures" / "figure4.svg")


def test_tables_have_the_papers_values_beside_ours(results):
    tables = results / "tables"
    pixels = (tables / "gru_pixels.md").read_text()
    assert "## GRU, CIFAR-10 pixels (gru_cifar10_pixels), CPU: the paper's own setting" in pixels
    assert "| Highway k=10 | 3 | 48.00 ± 0.50 | 30.0 | 1.50 | 10.00 | 10.0 |" in pixels
    two = (tables / "table2.md").read_text()
    assert "| 92.75 | 93.00 | 3 | 92.68 | 92.50 | 1.00 | in full |" in two
    assert "| 93.8 | not learned | 3 | - | not learned | - | in full; not learned |" in two
    three, six = ((tables / f"table{n}.md").read_text() for n in (3, 6))
    assert "| GRU, WikiText-103 characters | 5 | 1.8 | 6.67 | 1.00 |" in three
    assert "LSTM, WikiText-103" not in three  # not measured
    line = "| GRU, WikiText-103 characters | Highway | here | 100.0 | 15.0 | 10.0 | 11.0 |"
    assert line in six
    latex = (tables / "table2.tex").read_text()
    assert r"\toprule" in latex and r"\label{tab:table2-2}" in latex and r"\%" in latex
    assert "| GRU, batch 128 | 15.0 | " in (tables / "bench_rnn.md").read_text()


def test_the_page_has_every_claim_with_verdict_rows_and_commands(results, capsys):
    make_report.main([str(results)])
    printed = capsys.readouterr().out
    page = (results / "report.html").read_text()
    assert page.count('class="claim"') == len(make_report.CLAIMS)
    assert "reproduced                     the GRU on pixels matches" in printed
    assert "reproduced                     fixed-point iteration fails on pixels" in printed
    assert "not learned                    ResNet-110 matches" in printed
    assert "not enough runs                ResNet-32 matches" in printed
    assert "python train.py experiment=gru_cifar10_pixels grad=highway k=10 seed=0" in page
    assert "python scripts/run_plan.py gru_pixels" in page
    assert "+0 [-" in page and "margin 1.5" in page
    assert page.count("<img") == 8 and "src=&#34;" not in page
    assert "<th>over torch.nn, here</th>" in page
    assert "http" not in re.sub(r"data:image[^\"]*", "", page)  # nothing is fetched


def test_a_file_that_cannot_be_read_is_reported_and_the_others_are_made(rows, capsys):
    (rows / "gru_words.jsonl").write_text("{")
    with pytest.raises(
        UserError, match="some rows were left out; all files are made of the others"
    ):
        make_results.main(["tables", str(rows)])
    assert "gru_words.jsonl line 1 is not a JSON object" in capsys.readouterr().err
    assert (rows / "tables" / "gru_pixels.md").exists()
    with pytest.raises(UserError, match="some rows were left out"):
        make_report.main([str(rows)])
    assert "gru_words.jsonl line 1" in (rows / "report.html").read_text()


def test_records_that_lack_something_are_left_out(rows):
    """Layers on one process alone; no memory; no object."""
    environment = {"device": "a GPU"}
    (rows / "bench_sharded.json").write_text(json.dumps({"processes": {"1": {}}}))
    (rows / "bench_rnn_cuda.json").write_text(json.dumps({"environment": environment}))
    (rows / "bench_engine.json").write_text(json.dumps({"workloads": {}}))
    make_results.main(["figures", str(rows), "--only", "scaling"])
    assert "make bench" in texts(rows / "figures" / "scaling.svg")
    make_results.main(["tables", str(rows), "--only", "claims"])
    (rows / "bench_sharded.json").write_text("[]")
    with pytest.raises(UserError, match="some rows were left out"):
        make_results.main(["figures", str(rows), "--only", "scaling"])


def test_a_full_disk_keeps_the_old_files(rows, monkeypatch):
    def write() -> None:
        make_results.main(["figures", str(rows), "--only", "paths"])
        make_results.main(["tables", str(rows), "--only", "table2"])

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    write()
    before = {p: p.read_bytes() for p in rows.rglob("*.*")}
    monkeypatch.setattr("os.fsync", full)
    for kind, name in (("figures", "paths.png"), ("tables", "table2.md")):
        with pytest.raises(UserError, match=rf"cannot write \S+/{name} .*No space left"):
            make_results.main([kind, str(rows), "--only", name.partition(".")[0]])
    assert before == {p: p.read_bytes() for p in rows.rglob("*.*")}


def test_wrong_names_and_folders_are_reported_in_one_line(rows, tmp_path):
    with pytest.raises(SystemExit):
        make_results.main(["figures", str(rows), "--only", "figure9"])
    with pytest.raises(UserError, match=r"no KEY\.jsonl in"):
        make_results.main(["figures", str(tmp_path / "nowhere")])


def test_a_shorter_training_has_the_steps_of_the_longer_one(tmp_path):
    """Not where its precision is another: 20 epochs are bfloat16 on a CPU too."""
    short = "resnet32_cifar10_20epochs"
    for kind, expected in (("cuda", {"BP": 0.02, "Highway k=3": 0.03}), ("cpu", {})):
        record = {"overrides": [], "seconds": {"bp": 0.02, "k3": 0.03}}
        (tmp_path / f"steps_resnet32_cifar10.{kind}.json").write_text(json.dumps(record))
        arms = [row("resnet32", preset=short), row("resnet32", "highway", 3, preset=short)]
        setting = Setting(paper_rows()["resnet32"], short, kind, by_arm(arms))
        seconds = Results(tmp_path, {}).step_seconds(setting)
        assert {str(arm): s for arm, s in seconds.items()} == expected


def test_step_times_of_another_model_are_not_used(tmp_path):
    setting = Setting(
        paper_rows()["resnet32"], "resnet32_cifar10", "cpu", by_arm([row("resnet32")])
    )
    for overrides, used in (["trainer.threads=1"], 1), (["model.depth=20"], 0):
        record = {"overrides": overrides, "seconds": {"bp": 0.02}}
        (tmp_path / "steps_resnet32_cifar10.cpu.json").write_text(json.dumps(record))
        assert len(Results(tmp_path, {}).step_seconds(setting)) == used
