"""The paper's Figures 2 and 4: final score against k, a panel per experiment."""

from collections.abc import Sequence
from math import isfinite
from statistics import fmean

from matplotlib.axes import Axes

from scripts.evidence.paper import PaperRow
from scripts.evidence.results import Results
from scripts.evidence.rows import METRICS, Arm, score
from scripts.evidence.settings import Setting, half_interval
from scripts.figures.panels import INTERVALS, Drawing, footer, k_axis, one_each
from scripts.figures.style import PUBLISHED, SMALL, look


def draw(number: int, title: str, columns: int, results: Results) -> Drawing:
    shown = [
        (paper, setting and setting.only(setting.plain() or setting.arms))
        for paper, setting in results.chosen
        if paper.figure == number
    ]

    def notes(paper: PaperRow, setting: Setting | None) -> list[str]:
        others = results.settings[paper.key][1:]
        return [*published_in_full(paper, setting), *not_drawn(setting, others)]

    figure, axes = one_each(title, shown, columns, draw_panel, notes)
    sources = [f"{p.title}: {p.published['source']}" for p, _ in shown if p.published]
    meaning = f"small dots: single runs; white: one run alone; band: interval of BP; {INTERVALS}"
    footer(figure, axes, [meaning, f"values of the paper: {'. '.join(sources)}"])
    return Drawing(figure, [row for _, setting in shown if setting for row in setting.rows])


def draw_panel(axes: Axes, setting: Setting) -> None:
    """Draw a line per series of plain methods, and backpropagation as a horizontal line."""
    series: dict[Arm, dict[int, list[float]]] = {}
    for arm, rows in setting.arms.items():
        values = [score(row) for row in rows]
        if arm.k is None:
            draw_level(axes, arm, values)
        else:
            series.setdefault(arm.series, {})[arm.k] = values
    for arm, by_k in series.items():
        draw_series(axes, arm, by_k)
    k_axis(axes, {arm.k for arm in setting.arms if arm.k is not None})
    axes.margins(y=0.08)
    axes.set_ylabel(f"final {METRICS[setting.paper.metric].label}")
    if setting.full:
        draw_published(axes, setting.paper.published)


def draw_level(axes: Axes, arm: Arm, values: Sequence[float]) -> None:
    """Draw a method without k: a horizontal line, with a band if there are enough seeds."""
    style = look(arm)
    mean, half = fmean(values), half_interval(values)
    axes.axhline(mean, color=style["color"], ls=style["ls"], label=str(arm))
    if isfinite(half):
        axes.axhspan(mean - half, mean + half, color="0.88", lw=0, zorder=0)


def draw_series(axes: Axes, arm: Arm, by_k: dict[int, list[float]]) -> None:
    style = look(arm)
    colour = {"color": style["color"]}
    for k, values in sorted(by_k.items()):
        known = [value for value in values if isfinite(value)]
        axes.plot([k] * len(known), known, ".", ms=2.5, alpha=0.6, **colour)
        if len(known) < len(values):
            place = {"rotation": 90, "ha": "center", "transform": axes.get_xaxis_transform()}
            axes.text(k, 0.03, "diverged", fontsize=SMALL, **place, **colour)
    ks, bars = sorted(by_k), [half_interval(by_k[k]) for k in sorted(by_k)]
    axes.errorbar(ks, [fmean(by_k[k]) for k in ks], bars, **style, label=str(arm))
    alone = {k: values[0] for k, values in by_k.items() if len(values) == 1}
    axes.plot(list(alone), list(alone.values()), style["marker"], mfc="white", zorder=3, **colour)


def draw_published(axes: Axes, published: dict) -> None:
    """Draw the paper's printed scores in grey, with open markers."""
    if "bp" in published:
        axes.axhline(published["bp"], color=PUBLISHED, ls=":", label="paper, BP")
    if scores := published.get("highway"):
        style = {"mfc": "none", "color": PUBLISHED, "zorder": 4}
        axes.plot(list(scores), list(scores.values()), "o", **style, label="paper, Highway")


def not_drawn(setting: Setting | None, others: Sequence[Setting]) -> list[str]:
    """Notes with the scores of methods that ran on another device only, and of BP there."""
    found, digits = [], METRICS[setting.paper.metric].digits if setting else 0
    for other in others:
        lacking = [arm for arm in other.plain() if arm.k is not None and arm not in setting.arms]
        if lacking and other.preset == setting.preset:
            arms = [*other.plain("bp"), *lacking]
            scores = (f"{a} {fmean(map(score, other.arms[a])):.{digits}f}" for a in arms)
            found.append(f"{other.device}: {', '.join(scores)}")
    return found


def published_in_full(paper: PaperRow, setting: Setting | None) -> list[str]:
    """A note with the published values, if they are not drawn: no runs in the paper's setting."""
    published = paper.published
    if not published or (setting and setting.full):
        return []
    parts = [f"BP {published['bp']:g}"] if "bp" in published else []
    k, value = list(published["highway"].items())[-1]
    return [f"paper, in full: {', '.join([*parts, f'k={k} {value:g}'])}"]
