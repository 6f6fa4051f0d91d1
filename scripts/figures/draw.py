"""What figures draw into a panel: final scores against k, losses against steps or time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isfinite, nan

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter, StrMethodFormatter

from scripts.evidence.rows import (
    Row,
    by_method,
    has_k,
    mean_and_deviation,
    method_name,
    metric_of,
    series_name,
)
from scripts.figures.figure_style import PUBLISHED, SMALL, look, look_of_k

SMOOTHING_SPAN = 8
LONG = 10  # k from which on the axis is one of square roots, so that small ones stay apart
BARS = "bars and band: standard deviation over seeds; single seeds have none"
SEEDS = "losses: means over seeds at equal steps"
SMOOTHED = f"training losses: exponential averages over {SMOOTHING_SPAN} records, means over seeds"
AXES = {
    "seconds": "training time (s)",
    "processor": "processor time of training (s)",
    "step": "training steps",
}
LOSSES = {"train": "training loss (nats)", "eval": "validation loss (nats)"}


def draw_scores(axes: Axes, rows: Sequence[Row], ks: Iterable[int] = ()) -> None:
    """Final score against k: a line per series, BP as a horizontal line with its deviation.

    Args:
        ks: ticks beside those of the rows, to show what is missing.
    """
    lines: dict[str, list[list[Row]]] = {}
    for group in by_method(rows).values():
        lines.setdefault(series_name(group[0]), []).append(group)
    for name, groups in lines.items():
        if has_k(groups[0][0]):
            draw_series(axes, groups, name)
        else:
            for group in groups:
                draw_level(axes, group)
    draw_k_axis(axes, {row["k"] for row in rows if has_k(row)} | set(ks))
    axes.margins(y=0.08)
    axes.set_ylabel(f"final {metric_of(rows).label}")


def draw_series(axes: Axes, groups: Sequence[list[Row]], name: str) -> None:
    """A line over k, a point per group, with a bar where there are several seeds."""
    style = look(groups[0][0])
    ks = [group[0]["k"] for group in groups]
    means, deviations = zip(*map(mean_and_deviation, groups), strict=True)
    axes.errorbar(
        ks,
        means,
        [nan if deviation is None else deviation for deviation in deviations],
        **style,
        label=name,
    )
    for k, mean in zip(ks, means, strict=True):
        if not isfinite(mean):  # a gap that is none of rows
            axes.text(
                k,
                0.03,
                "diverged",
                rotation=90,
                ha="center",
                va="bottom",
                fontsize=SMALL,
                color=style["color"],
                transform=axes.get_xaxis_transform(),
            )


def draw_level(axes: Axes, group: list[Row]) -> None:
    """A method without k: a line across, with a band where there are several seeds."""
    style = look(group[0])
    mean, deviation = mean_and_deviation(group)
    axes.axhline(mean, color=style["color"], ls=style["ls"], label=method_name(group[0]))
    if deviation is not None:
        axes.axhspan(mean - deviation, mean + deviation, color="0.88", lw=0, zorder=0)


def draw_k_axis(axes: Axes, ks: set[int]) -> None:
    largest = max(ks, default=0)
    if largest >= LONG:
        axes.set_xscale("function", functions=(_root, _square))
    axes.set_xticks(sorted(ks), sorted(ks))
    axes.set_xlim(-0.04 if largest >= LONG else -0.25, 1.05 * largest + 0.05)
    axes.set_xlabel(f"iterations k{' (square-root scale)' if largest >= LONG else ''}")


def _root(k: np.ndarray) -> np.ndarray:
    return np.sign(k) * np.sqrt(np.abs(k))


def _square(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.square(x)


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
    rows: Sequence[Row],
    part: str = "train",
    x: str = "seconds",
    name: Callable[[Row], str] = method_name,
) -> None:
    """A line per method and k, the mean over its seeds: ``part`` (train, eval) against ``x``.

    Args:
        x: one of AXES.
    """
    for group in by_method(rows).values():
        style = look_of_k(group[0])
        if part == "train" and not has_k(group[0]):
            style["marker"] = ""
        for number, line in enumerate(mean_curves(group, part)):
            known = line[np.isfinite(line[f"{part}_loss"])]
            axes.plot(
                known[x],
                known[f"{part}_loss"],
                **style,
                ms=3,
                label=None if number else name(group[0]),
                markevery=0.13 if part == "train" and len(known) else None,
            )
    log_axis(axes)
    axes.set_xlabel(AXES[x])
    axes.set_ylabel(LOSSES[part])


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


def mean_curves(group: Sequence[Row], part: str) -> list[pd.DataFrame]:
    """The mean over seeds at the steps that all have; each seed alone where they share none."""
    curves = [curve_of(row, part) for row in group]
    steps = pd.concat(curves).groupby("step")
    mean = steps.mean()[steps.size() == len(curves)].reset_index()
    return curves if mean.empty else [mean]


def curve_of(row: Row, part: str) -> pd.DataFrame:
    """A row's curve with a column of processor time, a step's mean times the steps.

    A batch's loss is too noisy to compare runs by, so the training loss is averaged over records.
    """
    curve = pd.DataFrame(row["curve"][part])
    curve["processor"] = curve["step"] * (row["cpu_seconds"] or nan) / row["steps"]
    if part == "train":
        curve["train_loss"] = curve["train_loss"].ewm(span=SMOOTHING_SPAN).mean()
    return curve
