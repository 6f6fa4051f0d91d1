"""Figures from synthetic rows: what is drawn, what is said of it, and what is missing."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from experiments.errors import UserError
from scripts import make_figures
from scripts.evidence.rows import METHOD_NAMES, mean_and_deviation, read_rows
from scripts.figures import figure_style, plot_gradient_errors, plot_schedules
from scripts.figures.draw import draw_losses, draw_scores, mean_curves
from tests.scripts.synthetic_runs import METHODS, ROOT, of_paper, row, write_rows

MOMENTS = [
    {
        "step": step,
        "seconds": 0.0,
        "gradient_error": [
            {
                "k": k,
                "cosine": 1 - 0.4 ** (k + 1),
                "relative_error": 0.5**k,
                "increment": 0.5**k,
                "layers": {"chain.0": [0.9, 0.1]},
            }
            for k in (0, 1, 3)
        ],
    }
    for step in (0, 150, 300)
]


class Drawn(dict):
    """The figures that would be saved, by name; they stay open for a look."""

    def make(self, folder: Path, *names: str) -> Figure | None:
        only = ["--only", *names] if names else []
        make_figures.main([str(folder), *only])
        return self.get(names[0]) if names else None


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch):
    figures = Drawn()
    monkeypatch.setattr(
        figure_style, "save", lambda figure, path: figures.update({path.stem: figure})
    )
    yield figures
    plt.close("all")


def titles(figure: Figure) -> list[str]:
    """Of the panels that are seen."""
    return [axes.get_title("left").replace("\n", " ") for axes in figure.axes if axes.get_visible()]


def panel(figure: Figure, title: str) -> Axes:
    return next(a for a in figure.axes if a.get_title("left").replace("\n", " ") == title)


def words(axes: Axes) -> str:
    """All free text of a panel in one line."""
    return " ".join(text.get_text() for text in axes.texts).replace("\n", " ")


def below(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts).replace("\n", " ")


def labels(axes: Axes) -> set[str]:
    return set(axes.get_legend_handles_labels()[1])


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


def points(axes: Axes, label: str) -> dict:
    """Mean by k of a series with error bars."""
    (found,) = [c for c in axes.containers if c.get_label() == label]
    return dict(zip(*map(list, found.lines[0].get_data()), strict=True))


def bars(axes: Axes, label: str) -> list[float]:
    """Lengths of its error bars, above and below; nan where there is none."""
    (found,) = [c for c in axes.containers if c.get_label() == label]
    return [
        ends[1][1] - ends[0][1] if len(ends) else math.nan
        for ends in found.lines[2][0].get_segments()
    ]


def level(axes: Axes, label: str) -> float:
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return found.get_ydata()[0]


def test_a_figure_is_saved_in_three_formats_with_its_rows_and_the_same_bytes_again(
    results: Path,
) -> None:
    def files() -> dict[str, bytes]:
        return {file.suffix: file.read_bytes() for file in (results / "figures").iterdir()}

    make_figures.main([str(results), "--only", "tiny"])
    first = files()
    assert set(first) == {".png", ".pdf", ".svg", ".txt"}
    pixels = plt.imread(results / "figures" / "tiny.png")
    assert pixels.shape[0] > 500 and pixels.shape[1] == 1540 and pixels.std() > 0.01
    assert first[".pdf"].startswith(b"%PDF") and b"CreationDate" not in first[".pdf"]
    assert b"/Type3" not in first[".pdf"]  # journals refuse it
    assert b"<svg" in first[".svg"] and b"<dc:date>" not in first[".svg"]
    lines = first[".txt"].decode().splitlines()
    assert lines[:2] == [
        "rows of tiny in tiny.png:",
        "bpNone seed 0: BP, commit abc123 (clean), CPU, 2 threads, torch 2.13.0",
    ]
    assert len(lines) == 11
    make_figures.main([str(results), "--only", "tiny"])
    assert files() == first


def test_figure_2_has_the_rows_points_and_labelled_gaps(tmp_path: Path, drawn: Drawn) -> None:
    rows = [row(grad, k, seed) for grad, k in METHODS for seed in (0, 1)]
    write_rows(tmp_path / "resnet32.jsonl", [*rows, row("highway", 5)])
    figure = drawn.make(tmp_path, "figure2")
    assert titles(figure) == [
        "pre-activation ResNet-32, CIFAR-10",
        "ResNet-110, CIFAR-10",
        "ResNet-56, ImageNet32",
        "GPT-2, WikiText-103",
        "RoBERTa-base, MNLI",
    ]
    axes = figure.axes[0]
    assert points(axes, "Highway") == pytest.approx(
        {0: 87.2, 1: 92.2, 3: 94.7, 5: 100 * (0.97 - 0.1 / 6)}
    )
    assert points(axes, "FP") == pytest.approx({2: 100 * (0.77 - 0.1 / 3 + 0.002)})
    assert level(axes, "BP") == pytest.approx(97.2)
    *several, single = bars(axes, "Highway")
    assert several == pytest.approx([2 * 0.4 / math.sqrt(2)] * 3) and math.isnan(single)
    assert axes.get_xticks().tolist() == [0, 1, 2, 3, 4, 5]  # the sweep's, run or not
    assert "reduced: 300 steps of 64, 1-2 seeds" in words(axes)
    assert "paper, in full: BP 92.75, k=5 92.64" in words(axes)
    assert not labels(axes) & {"paper, BP", "paper, Highway"}
    for gap, key in zip(
        figure.axes[1:5], ("resnet110", "resnet56", "gpt2", "roberta"), strict=True
    ):
        assert words(gap).endswith(f" not yet run  python scripts/sweep.py {key}")
        assert not gap.lines and not gap.containers
    assert "(1 with reduced runs or stand-ins, 4 not yet run)" in figure.get_suptitle()
    assert "paper, in full: BP 93.8, k=4 93.8" in words(figure.axes[1])
    assert "public review discussion" in below(figure)


def test_published_values_are_drawn_beside_the_paper_s_experiment_alone(
    tmp_path: Path, drawn: Drawn
) -> None:
    rows = [of_paper("resnet32", "bp"), of_paper("resnet32", "highway", 3)]
    write_rows(tmp_path / "resnet32.jsonl", rows)
    axes = drawn.make(tmp_path, "figure2").axes[0]
    assert level(axes, "paper, BP") == 92.75
    (line,) = [line for line in axes.lines if line.get_label() == "paper, Highway"]
    assert dict(zip(*line.get_data(), strict=True))[0] == 82.38
    assert line.get_markerfacecolor() == "none"
    assert "complete: 300 steps of 128, 1 seed" in words(axes) and "paper" not in words(axes)
    assert labels(drawn.make(tmp_path, "resnet32").axes[0]) >= {"paper, BP", "BP", "Highway"}
    write_rows(tmp_path / "resnet32.jsonl", [{**r, "batch_size": 64} for r in rows])
    assert "paper, BP" not in labels(drawn.make(tmp_path, "resnet32").axes[0])


def test_gammas_are_lines_of_their_own_and_variants_are_left_out(
    tmp_path: Path, drawn: Drawn
) -> None:
    rows = [of_paper("gpt2", "bp")]
    rows += [of_paper("gpt2", "highway", k, gamma=g) for k in (0, 1) for g in (0.0, 0.2, "auto")]
    rows += [
        of_paper("gpt2", "highway", 3, group_size=4, config_hash="groups"),
        of_paper("gpt2", "highway", 3, tolerance=0.1, config_hash="tolerance"),
        {**of_paper("gpt2", "highway", 3, schedule="linear", config_hash="x"), "k": None},
    ]
    write_rows(tmp_path / "gpt2.jsonl", rows)
    axes = panel(drawn.make(tmp_path, "figure2"), "GPT-2, WikiText-103")
    names = {"Highway", "Highway, gamma=0.2", "Highway, gamma=auto"}
    assert labels(axes) == {"BP", *names}
    assert all(set(points(axes, name)) == {0, 1} for name in names)
    looks = [
        (c.lines[0].get_color(), c.lines[0].get_marker(), c.lines[0].get_linestyle())
        for c in axes.containers
    ]
    assert all(len(set(part)) == 3 for part in zip(*looks, strict=True))


def test_figure_4_has_the_fixed_point_and_says_what_is_missing(
    tmp_path: Path, drawn: Drawn
) -> None:
    rows = [of_paper("gru_pixels", "highway", 10), of_paper("gru_pixels", "fixed_point", 10)]
    write_rows(tmp_path / "gru_pixels.jsonl", rows)
    figure = drawn.make(tmp_path, "figure4")
    assert len(titles(figure)) == 4
    axes = panel(figure, "GRU, CIFAR-10 pixels")
    assert labels(axes) == {"FP", "Highway"} and set(legend(figure)) == {"FP", "Highway"}
    assert "not yet run: BP" in words(axes)
    assert axes.get_xticks().tolist() == [0, 1, 2, 3, 5, 10, 20]
    assert "square-root" in axes.get_xlabel()
    used = (tmp_path / "figures" / "figure4.rows.txt").read_text().splitlines()
    assert used[0] == "rows of gru_pixels in figure4.png:" and len(used) == 3


@pytest.mark.usefixtures("drawn")
def test_rows_of_a_figure_name_the_setup_that_was_chosen(tmp_path: Path) -> None:
    own = of_paper("resnet110", "bp")
    fuller = of_paper("resnet110", "bp", steps=900, setup="x", config_hash="x", data="digits")
    write_rows(tmp_path / "resnet110.jsonl", [own, fuller])
    make_figures.main([str(tmp_path), "--only", "figure2"])
    text = (tmp_path / "figures" / "figure2.rows.txt").read_text()
    assert text.startswith("rows of resnet110.2 in figure2.png:\nbpNone")


def test_figure_3_draws_validation_losses_against_steps_and_seconds(
    tmp_path: Path, drawn: Drawn
) -> None:
    rows = [
        of_paper("gpt2", "bp", None, seed, seconds_per_step=0.1 * (1 + seed)) for seed in (0, 1)
    ]
    rows += [of_paper("gpt2", "highway", k) for k in (0, 1)]
    rows += [of_paper("gpt2", "highway", 0, gamma=0.2)]
    rows += [of_paper("gpt2", "highway", 5, device="GPU")]
    write_rows(tmp_path / "gpt2.jsonl", rows)
    left, right = drawn.make(tmp_path, "figure3").axes
    names = ["BP", "Highway k=0", "Highway k=1"]  # one gamma, one device
    assert [line.get_label() for line in left.lines] == names
    assert left.lines[0].get_xdata().tolist() == [100, 200, 300]
    assert right.lines[0].get_xdata() == pytest.approx([15, 30, 45])  # the mean of two seeds
    assert left.lines[0].get_color() == "black"
    assert "CPU, 2 threads; 1 on other devices left out" in words(right)
    assert "gamma = 0.0, others in gpt2.png" in words(right)


def test_figure_5_is_a_gap_until_there_are_rows(tmp_path: Path, drawn: Drawn) -> None:
    write_rows(tmp_path / "resnet32.jsonl", [row("bp", None)])
    figure = drawn.make(tmp_path, "figure5")
    assert all("sweep.py gru_words" in words(axes) for axes in figure.axes)
    used = tmp_path / "figures" / "figure5.rows.txt"
    assert used.read_text() == "no rows in figure5.png\n"
    assert "not yet run" in figure.get_suptitle()
    write_rows(tmp_path / "gru_words.jsonl", [of_paper("gru_words", "bp")])
    left, right = drawn.make(tmp_path, "figure5").axes
    assert "training" in left.get_ylabel() and "validation" in right.get_ylabel()
    assert len(right.lines[0].get_xdata()) == 3 and len(left.lines[0].get_xdata()) == 60


def test_time_has_a_panel_per_experiment_of_one_device_each(tmp_path: Path, drawn: Drawn) -> None:
    write_rows(
        tmp_path / "gru_chars.jsonl",
        [
            of_paper("gru_chars", "bp", seconds=20.0, cpu_seconds=10.0),
            of_paper("gru_chars", "highway", 1, gamma="auto"),
            of_paper("gru_chars", "fixed_point", 1),
            of_paper("gru_chars", "highway", 3, device="GPU"),
        ],
    )
    figure = drawn.make(tmp_path, "time")
    assert len(titles(figure)) == 9
    axes = panel(figure, "GRU, WikiText-103 characters")
    assert [line.get_label() for line in axes.lines] == ["BP", "Highway k=1"]
    for said in ("CPU, 2 threads; 1 on", "gamma = auto", "other work slowed runs, up to 2.0 x"):
        assert said in words(axes).replace("  ", " ")
    assert "8 not yet run" in figure.get_suptitle()


def test_a_run_that_other_work_slowed_looks_no_slower(tmp_path: Path, drawn: Drawn) -> None:
    one = {"device": "CPU x, 1 threads", "cpu_seconds": 10.0}
    write_rows(
        tmp_path / "gru_words.jsonl",
        [
            of_paper("gru_words", "bp", seconds=30.0, seconds_per_step=0.1, **one),
            of_paper("gru_words", "highway", 1, seconds=11.0, **one),
        ],
    )
    drawn.make(tmp_path)
    for axes in (
        panel(drawn["time"], "3-layer GRU, WikiText-103"),
        drawn["figure5"].axes[0],
        drawn["gru_words"].axes[1],
    ):
        assert axes.get_xlabel() == "processor time of training (s)"
        assert [line.get_xdata()[-1] for line in axes.lines] == pytest.approx([10.0, 10.0])
    assert "processor time, as other" in words(drawn["figure5"].axes[1])
    assert "processor time, as other work slowed runs" in below(drawn["gru_words"])


def test_a_figure_s_text_is_legible_in_print_and_its_legend_covers_no_data(
    results: Path, drawn: Drawn
) -> None:
    (results / "resnet32.jsonl").write_text((results / "tiny.jsonl").read_text())
    for name in ("figure2", "time", "tiny"):
        figure = drawn.make(results, name)
        assert figure.get_figwidth() == 7.0
        figure.draw_without_rendering()
        sizes = [t.get_fontsize() for t in figure.findobj(Text) if t.get_text().strip()]
        assert min(sizes) >= 7.0
        (box,) = [found.get_window_extent() for found in figure.legends]
        seen = [axes for axes in figure.axes if axes.get_visible()]
        assert box.y1 <= min(axes.get_tightbbox().y0 for axes in seen) + 1
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_larger_k_are_darker_and_have_other_markers() -> None:
    looks = [figure_style.look_of_k(row("highway", k)) for k in (0, 1, 2, 3, 4, 5, 10, 20)]
    lightness = [sum(look["color"][:3]) for look in looks]
    assert lightness == sorted(lightness, reverse=True)
    assert len({look["marker"] for look in looks}) == 8
    assert figure_style.look_of_k(row("fixed_point", 3))["ls"] != looks[3]["ls"]


def test_a_method_to_come_has_a_look_as_soon_as_it_has_a_name(monkeypatch) -> None:
    monkeypatch.setitem(METHOD_NAMES, "magic", "Magic")
    _, axes = plt.subplots()
    draw_scores(axes, [{**row("highway", k), "grad": "magic"} for k in (1, 2)])
    assert labels(axes) == {"Magic"}
    assert figure_style.look_of_k({**row("highway", 1), "grad": "magic"})["marker"] == "s"
    plt.close("all")


def test_curves_are_means_over_seeds_at_the_steps_that_all_have(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [row("bp", None), row("bp", None, 1, train_loss=1.05)])
    short = row("bp", None, 2, steps=2)
    write_rows(tmp_path / "b.jsonl", [short])
    first, second = read_rows(tmp_path / "a.jsonl")
    (mean,) = mean_curves([first, second], "eval")
    assert mean["eval_loss"].tolist()[-1] == pytest.approx(0.55 + 2.3 * math.exp(-5))
    (other,) = read_rows(tmp_path / "b.jsonl")
    other["curve"]["eval"] = {name: [1.0] for name in other["curve"]["eval"]}
    assert len(mean_curves([first, other], "eval")) == 2  # no step in common


def test_a_method_without_k_has_a_band_only_with_several_seeds() -> None:
    _, axes = plt.subplots()
    draw_scores(axes, [row("bp", None)])
    assert not axes.patches
    draw_scores(axes, [row("bp", None, seed) for seed in (0, 1)])
    assert len(axes.patches) == 1
    plt.close("all")


def test_every_window_of_truncated_bptt_is_a_level_of_its_own() -> None:
    _, axes = plt.subplots()
    windows = [{**row("bp", None, window=w), "grad": "truncated_bptt"} for w in (4, 16)]
    draw_scores(axes, windows)
    assert labels(axes) == {"Truncated BPTT 4", "Truncated BPTT 16"}
    plt.close("all")


def test_a_run_that_diverged_is_drawn_as_far_as_it_goes(tmp_path: Path) -> None:
    away = {"eval_perplexity": math.inf, "eval_loss": math.nan, "train_loss": math.nan}
    write_rows(
        tmp_path / "gpt2.jsonl",
        [
            of_paper("gpt2", "bp"),
            of_paper("gpt2", "highway", 0, **away),
            of_paper("gpt2", "highway", 1),
        ],
    )
    make_figures.main([str(tmp_path), "--only", "figure3", "gpt2"])
    assert (tmp_path / "figures" / "gpt2.png").exists()
    _, axes = plt.subplots()
    draw_scores(axes, read_rows(tmp_path / "gpt2.jsonl"))
    assert words(axes) == "diverged" and axes.texts[0].get_position()[0] == 0
    assert not math.isfinite(points(axes, "Highway")[0])
    seeds = [of_paper("gpt2", "highway", 1, 0), of_paper("gpt2", "highway", 1, 1, **away)]
    assert mean_and_deviation(seeds) == (math.inf, None)
    plt.close("all")


def test_a_single_record_and_an_empty_curve_are_drawn() -> None:
    _, axes = plt.subplots()
    columns = {"step": [1], "seconds": [0.5], "train_loss": [2.0]}
    empty = {name: [] for name in columns}
    draw_losses(
        axes,
        [
            row("bp", None) | {"curve": {"train": columns}},
            row("highway", 1) | {"curve": {"train": empty}},
        ],
    )
    assert axes.lines[0].get_ydata().tolist() == [2.0]
    plt.close("all")


def test_setups_of_one_file_are_pictures_of_their_own(tmp_path: Path, drawn: Drawn) -> None:
    write_rows(
        tmp_path / "tiny.jsonl",
        [
            row("bp", None),
            row("highway", 1),
            row("bp", None, steps=400, setup="two", config_hash="two", device="GPU"),
            row("highway", 1, steps=400, setup="two", config_hash="three"),
        ],
    )
    drawn.make(tmp_path)
    assert "400 steps" in drawn["tiny"].get_suptitle()
    assert "300 steps" in drawn["tiny.2"].get_suptitle()
    left, right = drawn["tiny"].axes
    assert labels(left) == {"BP", "Highway"} and labels(right) == {"BP"}  # times of one device
    assert "1 on other devices left out" in below(drawn["tiny"])


def test_figure_6_is_drawn_from_the_moments_of_the_runs_that_measured(
    tmp_path: Path, drawn: Drawn
) -> None:
    rows = [row("bp", None, seed) for seed in (0, 1)]
    write_rows(tmp_path / "tiny.jsonl", rows, MOMENTS)
    write_rows(tmp_path / "gpt2.jsonl", rows[:1], MOMENTS)
    write_rows(tmp_path / "other.jsonl", rows)
    table = plot_gradient_errors.moments(read_rows(tmp_path / "tiny.jsonl"))
    assert table.loc[(0.5, 1), "cosine"] == pytest.approx(0.84)
    drawn.make(tmp_path)
    left, right, _ = drawn["tiny.gradient"].axes  # the third is the bar of moments
    assert [line.get_ydata()[1] for line in left.lines] == pytest.approx([0.84] * 3)
    assert right.get_yscale() == "log"
    assert "networks trained by BP, 2 seeds" in below(drawn["tiny.gradient"])
    assert "bpNone seed 1" in (tmp_path / "figures" / "tiny.gradient.rows.txt").read_text()
    assert "other.gradient" not in drawn
    figure = drawn["figure6"]
    assert [title for title in titles(figure) if title] == [
        "GPT-2, WikiText-103",
        "resnet20, digits",
    ]
    assert "with reduced runs" in figure.get_suptitle()
    assert "beyond the paper" in words(figure.axes[1])


def test_figure_6_goes_on_below_where_there_are_many_networks(tmp_path: Path, drawn: Drawn) -> None:
    for number in range(5):
        write_rows(tmp_path / f"net{number}.jsonl", [row("bp", None)], MOMENTS)
    figure = drawn.make(tmp_path, "figure6")
    assert len([axes for axes in figure.axes if axes.get_visible() and axes.lines]) == 10


def test_without_measured_runs_figure_6_is_a_gap(results: Path, drawn: Drawn) -> None:
    figure = drawn.make(results, "figure6")
    assert words(figure.axes[0]) == "not yet run  python train.py grad=bp diagnostics=figure6"


def test_schedules_are_compared_by_their_passes(tmp_path: Path, drawn: Drawn) -> None:
    counted = {"block_passes": 600, "sequential_passes": 900}
    linear = {
        **row("highway", 0, schedule="linear start=0 end=5 exact_from=0.9", **counted),
        "k": None,
        "config_hash": "linear",
    }
    rows = [
        row("bp", None, **counted),
        row("highway", 1, **counted),
        row("highway", 3, **counted),
        linear,
    ]
    write_rows(tmp_path / "tiny.jsonl", rows)
    figure = drawn.make(tmp_path, "tiny.schedules")
    assert set(legend(figure)) == {"BP", "Highway, one k throughout", "linear end=5"}
    assert points(figure.axes[0], "linear end=5") == pytest.approx({3.0: 87.0})
    assert plot_schedules.passes_per_step(rows[0]) == 3.0
    assert plot_schedules.draw([rows[0], rows[1]], "one", tmp_path) is None
    assert plot_schedules.draw([rows[0], linear], "no_fixed_k", tmp_path) is None


@pytest.mark.usefixtures("drawn")
def test_a_broken_file_is_told_and_the_others_are_drawn(
    results: Path, capsys: pytest.CaptureFixture
) -> None:
    (results / "gpt2.jsonl").write_text('{"schema": 2')
    with pytest.raises(UserError, match=r"^left out gpt2.jsonl; all others are done$"):
        make_figures.main([str(results)])
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        f"error: {results / 'gpt2.jsonl'} line 1 is not JSON; expected one record"
    ]
    for name in ("figure2", "figure3", "figure4", "figure5", "figure6", "time", "tiny"):
        assert str(results / "figures" / f"{name}.png") in told.out


def test_a_picture_that_cannot_be_written_does_not_keep_the_others(
    results: Path, capsys: pytest.CaptureFixture
) -> None:
    (results / "figures" / "tiny.png").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^left out tiny; all others are done$"):
        make_figures.main([str(results), "--only", "tiny", "figure5"])
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        f"error: cannot write {results / 'figures' / 'tiny.png'} (Is a directory)"
    ]
    assert "figure5.png" in told.out
    assert not plt.get_fignums()


def test_wrong_arguments_are_one_line_each(results: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "tiny.jsonl").write_text((results / "tiny.jsonl").read_text())
    (tmp_path / "file" / "figures").touch()
    program = ROOT / "scripts" / "make_figures.py"
    for arguments, said in (
        ([tmp_path / "empty"], "no *.jsonl in"),
        ([tmp_path / "file"], f"cannot write {tmp_path / 'file' / 'figures'} (File exists)"),
        ([results, "--only", "figure7"], "--only figure7; expected names among figure2"),
    ):
        done = subprocess.run(
            [sys.executable, program, *map(str, arguments)], capture_output=True, text=True
        )
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ") and said in line
