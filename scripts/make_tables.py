"""Write all tables from the committed rows and benchmarks.

    python scripts/make_tables.py results
    python scripts/make_tables.py results --only table2 resnet32

table2, table3 and table6 are the paper's, in Markdown and LaTeX, with its values beside ours; NAME
is the table of one results file, recipes says what to see on the way, bench_rnn is that of a
benchmark, signals holds gradient errors against final losses. Each is written to results/tables.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts.evidence.every_source import jobs_of, make_all, run
from scripts.tables import (
    bench_table,
    compare_signals,
    tables_of_paper,
    tables_of_recipes,
    tables_of_setups,
)

PROGRAMS = (tables_of_paper, tables_of_recipes, tables_of_setups, bench_table, compare_signals)


def main(argv: Sequence[str]) -> None:
    make_all(__doc__.splitlines()[0], "tables", jobs_of(PROGRAMS), argv)


if __name__ == "__main__":
    run(main)
