"""Draw all figures from the committed rows.

    python scripts/make_figures.py results
    python scripts/make_figures.py results --only figure2 time

figure2 to figure6 are the paper's, time is loss against time for all of its experiments, schedules
what changing k during training reaches, scaling layers on several devices. Each is written to
results/figures as PNG, PDF and SVG, and beside it, in NAME.rows.txt, the rows that were used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts.evidence.results_io import Jobs, Results, make_all, run
from scripts.figures import gradient_errors, losses, scaling, schedules, scores


def jobs(results: Results) -> Jobs:
    return {
        name: job
        for program in (scores, losses, gradient_errors, schedules, scaling)
        for name, job in program.jobs(results).items()
    }


def main(argv: Sequence[str]) -> None:
    make_all(__doc__.splitlines()[0], "figures", jobs, argv)


if __name__ == "__main__":
    run(main)
