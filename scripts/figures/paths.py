"""The eight paths of a chain of three layers, by number of blocks."""

from itertools import combinations

from matplotlib.axes import Axes

from scripts.evidence.results import Results
from scripts.figures.panels import Drawing
from scripts.figures.style import GREY, WIDTH, plt

L = 3
UP = 0.45  # how far a residual path rises, as a share of a layer's width
BLUES = plt.cm.viridis([0.0, 0.3, 0.55, 0.75])  # of a path, by its number of blocks
LABELS = [
    "k = 0: residual paths alone",
    "k = 1 adds",
    "k = 2 adds",
    "k = 3 = L adds the last, exact",
]


def arrow(axes: Axes, m: int, through_block: bool, **style: object) -> None:
    """Draw an arrow from state m to m - 1, through the block or along the residual path."""
    bend = f"arc3,rad={0 if through_block else UP}"
    look = {"arrowstyle": "-|>", "connectionstyle": bend, "shrinkA": 7, "shrinkB": 7}
    axes.annotate("", (m - 1, 0), (m, 0), arrowprops=look | style)


def draw_path(axes: Axes, blocks: tuple[int, ...]) -> None:
    for i in range(L + 1):
        axes.plot(i, 0, "o", ms=13, mfc="white", mec=GREY, mew=0.8, zorder=3)
        axes.text(i, 0, f"$w_{i}$", ha="center", va="center", fontsize=7, zorder=4)
    for m in range(1, L + 1):
        for through_block in (True, False):
            arrow(axes, m, through_block, color="0.88", lw=1)
    for m in range(1, L + 1):
        arrow(axes, m, m in blocks, color=BLUES[len(blocks)], lw=2)
    factors = " ".join(f"{'J' if m in blocks else 'K'}_{m}" for m in range(L, 0, -1))
    axes.set_title(f"$b_{L}\\ {factors}$", fontsize=8)


def draw(results: Results) -> Drawing:
    figure = plt.figure(figsize=(WIDTH, 2.7), layout="constrained")
    grid = figure.subplots(L + 1, L + 1, width_ratios=[1.1, 1, 1, 1])
    for axes in grid.flat:
        axes.set(xlim=(-0.25, L + 0.25), ylim=(-0.2, 0.2))
        axes.axis("off")
    for size, row in enumerate(grid):
        row[0].text(1.0, 0.5, LABELS[size], ha="right", va="center", transform=row[0].transAxes)
        for axes, blocks in zip(row[1:], combinations(range(1, L + 1), size), strict=False):
            draw_path(axes, blocks)
    return Drawing(figure)
