"""Losses during training: the paper's Figures 3 and 5, and loss against time for every experiment.

Times are steps times the time of a step, which bench_steps.py measures side by side on a quiet
machine: those of the runs themselves shared theirs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from matplotlib.axes import Axes

from scripts.evidence.paper import PaperRow
from scripts.evidence.results_io import Jobs, Results
from scripts.evidence.rows import Arm
from scripts.evidence.settings import Setting
from scripts.figures.draw import SEEDS, draw_losses, open_panel, step_times
from scripts.figures.style import footer, gap, panels, save_with_rows

TITLES = {
    "figure3": ("gpt2", "Figure 3: evaluation loss of GPT-2 during training"),
    "figure5": ("gru_words", "Figure 5: evaluation loss of the 3-layer GRU against time"),
}


def arms_of(setting: Setting, methods: tuple[str, ...]) -> list[Arm]:
    return [arm for arm in setting.arms if arm.plain and arm.grad in methods]


def draw_pair(name: str, results: Results) -> Path:
    """Against steps (Figure 3) or time (Figure 5), and less backpropagation's at equal steps."""
    key, title = TITLES[name]
    paper, setting = next(chosen for chosen in results.chosen if chosen[0].key == key)
    figure, (left, right) = panels(1, 2, 2.9, title)
    if open_panel(left, paper, setting):
        arms = arms_of(setting, ("bp", "highway"))
        if name == "figure3":
            draw_losses(left, setting, arms)
        else:
            against_time(left, results.folder, setting, arms)
        exact = next((arm for arm in arms if arm.grad == "bp"), None)
        draw_losses(right, setting, arms, less=exact)
    else:
        right.set_visible(False)
    footer(figure, [left, right], [SEEDS])
    used = setting.rows if setting else []
    return save_with_rows(figure, results.folder / "figures" / f"{name}.png", used)


def against_time(axes: Axes, folder: Path, setting: Setting, arms: list[Arm]) -> None:
    seconds = step_times(folder, setting)
    if seconds is None:
        gap(axes, f"times not measured\n\npython scripts/bench_steps.py\n{setting.preset}")
    else:
        draw_losses(axes, setting, arms, seconds)


def draw_time(results: Results) -> Path:
    """A panel per experiment that has learned, without the fixed point."""
    shown = [(p, s) for p, s in results.chosen if s and s.learned]
    columns = min(3, max(1, len(shown)))
    lines = max(1, -(-len(shown) // columns))
    figure, axes = panels(lines, columns, 2.7 * lines + 0.2, "Evaluation loss against time")
    for part, (paper, setting) in zip(axes, shown, strict=False):
        draw_time_panel(part, results.folder, paper, setting)
    for part in axes[len(shown) :]:
        part.set_visible(False)
    footer(
        figure,
        axes,
        [
            "time: steps times the time of a step, all methods measured side by side"
            f" on a quiet machine; {SEEDS}"
        ],
    )
    used = [row for _, setting in shown for row in setting.rows]
    return save_with_rows(figure, results.folder / "figures" / "time.png", used)


def draw_time_panel(axes: Axes, folder: Path, paper: PaperRow, setting: Setting) -> None:
    if open_panel(axes, paper, setting):
        against_time(axes, folder, setting, arms_of(setting, ("bp", "highway")))


def jobs(results: Results) -> Jobs:
    pairs = {name: partial(draw_pair, name, results) for name in TITLES}
    return pairs | {"time": partial(draw_time, results)}
