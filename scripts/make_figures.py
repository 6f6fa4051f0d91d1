"""Draw all figures from the committed rows.

    python scripts/make_figures.py results
    python scripts/make_figures.py results --only figure2 resnet32 resnet32.schedules

figure2 to figure6 are the paper's, time is loss against wall-clock time for all of its experiments;
NAME, NAME.gradient and NAME.schedules are those of one results file. Each is written to
results/figures as PNG, PDF and SVG, and beside it, in NAME.rows.txt, the rows that were used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts.evidence.every_source import jobs_of, make_all, run
from scripts.figures import (
    plot_gradient_errors,
    plot_paper,
    plot_results,
    plot_schedules,
    plot_training,
)

PROGRAMS = (plot_paper, plot_training, plot_gradient_errors, plot_results, plot_schedules)


def main(argv: Sequence[str]) -> None:
    make_all(__doc__.splitlines()[0], "figures", jobs_of(PROGRAMS), argv)


if __name__ == "__main__":
    run(main)
