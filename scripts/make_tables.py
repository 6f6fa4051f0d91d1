"""Write all tables from the committed rows and benchmarks.

    python scripts/make_tables.py results
    python scripts/make_tables.py results --only table2 resnet32

table2, table3 and table6 are the paper's tables in Markdown and LaTeX, with its values beside ours.
KEY (resnet32, ...) is the page of one experiment, with a table per setting. bench_rnn is the page
of that benchmark. All are written to results/tables.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts.evidence.paper import paper_rows
from scripts.evidence.results import make_all
from scripts.program import run
from scripts.tables.of_rows import experiment, table2
from scripts.tables.of_timings import bench_rnn, milliseconds, of_paper, speedups

SPEEDUPS = "Table 3: times faster than backpropagation"
TABLES = {
    "table2": table2,
    "table3": partial(of_paper, SPEEDUPS, speedups),
    "table6": partial(of_paper, "Table 6: milliseconds per step", milliseconds),
    **{key: partial(experiment, key) for key in paper_rows()},
    "bench_rnn": bench_rnn,
}


def main(argv: Sequence[str]) -> None:
    make_all(__doc__.splitlines()[0], "tables", TABLES, argv)


if __name__ == "__main__":
    run(main)
