"""Draw all figures from the committed rows.

    python scripts/make_figures.py results
    python scripts/make_figures.py results --only figure2 time

figure2 to figure6 are the paper's figures, time has losses against time, schedules has scores of
schedules of k, scaling has layers on several devices, and paths has the paths of a small chain. All
are written to results/figures as PNG, PDF and SVG; NAME.rows.txt lists the rows that are shown.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts.evidence.results import make_all
from scripts.figures import gradient_errors, losses, paths, scaling, schedules, scores
from scripts.program import run

DEEP = "Figure 2: final score against k, deep networks"
GPT2 = "Figure 3: evaluation loss of GPT-2 during training"
RECURRENT = "Figure 4: final score against k, recurrent networks"
GRU = "Figure 5: evaluation loss of the 3-layer GRU against time"
FIGURES = {
    "figure2": partial(scores.draw, 2, DEEP, 3),
    "figure3": partial(losses.draw_pair, "gpt2", GPT2, "steps"),
    "figure4": partial(scores.draw, 4, RECURRENT, 2),
    "figure5": partial(losses.draw_pair, "gru_words", GRU, "time"),
    "figure6": gradient_errors.draw,
    "time": losses.draw_time,
    "schedules": schedules.draw,
    "scaling": scaling.draw,
    "paths": paths.draw,
}


def main(argv: Sequence[str]) -> None:
    make_all(__doc__.splitlines()[0], "figures", FIGURES, argv)


if __name__ == "__main__":
    run(main)
