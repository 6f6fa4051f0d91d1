"""What figures draw into a panel: final scores against k, losses against steps or time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from math import isfinite, sqrt
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter, StrMethodFormatter
from scipy import stats

from scripts.evidence.judge import LEVEL
from scripts.evidence.paper import PaperRow, preset_gamma
from scripts.evidence.rows import METRICS, Arm, Row, score
from scripts.evidence.settings import ENOUGH, Setting, seeds_of
from scripts.figures.style import PUBLISHED, SMALL, caption, gap, look, look_of_k

LONG = 10  # k from which on the axis is one of square roots, so that small ones stay apart
INTERVALS = (
    f"small dots: single runs; bars and band: {LEVEL:.0%} interval of the mean, "
    f"from {ENOUGH} seeds on"
)
SEEDS = "losses: means over seeds at equal steps"


def open_panel(axes: Axes, paper: PaperRow, setting: Setting | None, lines: Sequence[str] = ()):
    """A panel's title and the setting below it; returns whether there is something to draw."""
    if setting is None:
        caption(axes, paper.title, [])
        gap(axes, f"not run\n\n{paper.command}")
        return False
    rows = setting.rows
    where = "the paper's own setting" if setting.full else f"reduced: {spaced(setting.preset)}"
    about = [
        f"{where}, {'one GPU' if setting.device_kind == 'cuda' else 'CPU'}",
        f"{rows[0]['steps']} steps of {rows[0]['batch_size']}, {seeds_of(setting.arms.values())}",
    ]
    caption(axes, paper.title, [*about, *lines])
    if not setting.learned:
        gap(axes, "not learned: backpropagation is\nhardly better than a guess")
    return setting.learned


def spaced(preset: str) -> str:
    """A name that can be broken into lines."""
    return preset.replace("_", " ")


def interval(values: Sequence[float]) -> float | None:
    """Half of the interval of a mean, of enough values."""
    if len(values) < ENOUGH or not all(map(isfinite, values)):
        return None
    return float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stdev(values) / sqrt(len(values)))


def draw_scores(axes: Axes, setting: Setting, arms: Iterable[Arm]) -> None:
    """Final score against k: a line per series, backpropagation as a horizontal line."""
    series: dict[Arm, dict[int, list[float]]] = {}
    for arm in arms:
        values = [score(row) for row in setting.arms[arm]]
        if arm.k is None:
            draw_level(axes, arm, values)
        else:
            series.setdefault(arm.series, {})[arm.k] = values
    for arm, by_k in series.items():
        draw_series(axes, arm, by_k)
    draw_k_axis(axes, {arm.k for arm in setting.arms if arm.k is not None})
    axes.margins(y=0.08)
    axes.set_ylabel(f"final {METRICS[setting.paper.metric].label}")


def draw_series(axes: Axes, arm: Arm, by_k: dict[int, list[float]]) -> None:
    style = look(arm)
    ks = sorted(by_k)
    for k in ks:
        known = [v for v in by_k[k] if isfinite(v)]
        axes.plot([k] * len(known), known, ".", ms=2.5, color=style["color"], alpha=0.6)
        if len(known) < len(by_k[k]):
            place = axes.get_xaxis_transform()
            axes.text(
                k,
                0.03,
                "diverged",
                rotation=90,
                ha="center",
                fontsize=SMALL,
                color=style["color"],
                transform=place,
            )
    means = [fmean(by_k[k]) for k in ks]
    bars = [interval(by_k[k]) or np.nan for k in ks]
    axes.errorbar(ks, means, bars, **style, label=str(arm))


def draw_level(axes: Axes, arm: Arm, values: Sequence[float]) -> None:
    """A method without k: a line across, with a band where there are enough seeds."""
    style = look(arm)
    mean, half = fmean(values), interval(values)
    axes.axhline(mean, color=style["color"], ls=style["ls"], label=str(arm))
    if half is not None:
        axes.axhspan(mean - half, mean + half, color="0.88", lw=0, zorder=0)


def draw_k_axis(axes: Axes, ks: set[int]) -> None:
    if not ks:
        axes.set(xticks=[], xlabel="no run with iterations")
        return
    largest = max(ks)
    if largest >= LONG:
        axes.set_xscale("function", functions=(_root, np.square))
    axes.set_xticks(sorted(ks), sorted(ks))
    axes.set_xlim(-0.04 if largest >= LONG else -0.25, 1.05 * largest + 0.1)
    axes.set_xlabel(f"iterations k{' (square-root scale)' if largest >= LONG else ''}")


def _root(k: np.ndarray) -> np.ndarray:
    return np.sign(k) * np.sqrt(np.abs(k))


def draw_published(axes: Axes, published: dict) -> None:
    """The paper's printed scores, open and grey."""
    if "bp" in published:
        axes.axhline(published["bp"], color=PUBLISHED, ls=":", label="paper, BP")
    scores = published.get("highway", {})
    if scores:
        axes.plot(
            list(scores),
            list(scores.values()),
            "o",
            mfc="none",
            color=PUBLISHED,
            zorder=4,
            label="paper, Highway",
        )


def draw_losses(
    axes: Axes,
    setting: Setting,
    arms: Iterable[Arm],
    seconds: Callable[[Arm], float | None] | None = None,
    less: Arm | None = None,
) -> None:
    """Evaluation loss of every arm against steps.

    Args:
        seconds: of a step of an arm; then against time.
        less: an arm whose loss at the same step is subtracted.
    """
    base = None if less is None else mean_curve(setting.arms[less])
    for arm in arms:
        curve = mean_curve(setting.arms[arm])
        if base is not None:
            curve = (curve - base).dropna()
        factor = 1.0 if seconds is None else seconds(arm)
        if factor is not None and arm != less:
            axes.plot(
                curve.index * factor, curve, **look_of_k(arm), ms=3, markevery=0.13, label=str(arm)
            )
    axes.set_xlabel("training steps" if seconds is None else "training time (s)")
    axes.set_ylabel("evaluation loss (nats)" if less is None else f"loss less {less}'s (nats)")
    if base is None:
        log_axis(axes)
    else:
        axes.axhline(0.0, color="black", lw=1)


def mean_curve(rows: Sequence[Row]) -> pd.Series:
    """The mean evaluation loss over seeds, by step."""
    curves = [pd.DataFrame(row["curve"]["eval"]).set_index("step")["eval_loss"] for row in rows]
    return pd.concat(curves, axis=1).astype(float).mean(axis=1, skipna=False).dropna()


def log_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 4 * low:
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def step_times(folder: Path, setting: Setting) -> Callable[[Arm], float | None] | None:
    """Seconds of a step of an arm, as bench_steps.py measured them; None where it did not."""
    file = folder / f"steps_{setting.preset}.{setting.device_kind}.json"
    if not file.exists():
        return None
    measured = json.loads(file.read_text())["seconds"]

    def seconds(arm: Arm) -> float | None:
        if arm.grad == "bp":
            return measured.get("bp")
        if arm.grad == "fixed_point":
            return measured.get(f"fp{arm.k}")
        own = arm.gamma == preset_gamma(setting.preset)
        return measured.get(f"k{arm.k}" if own else f"k{arm.k}g{arm.gamma:g}")

    return seconds
