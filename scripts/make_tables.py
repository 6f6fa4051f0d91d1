"""Write all tables from the committed rows and benchmarks.

    python scripts/make_tables.py results
    python scripts/make_tables.py results --only table2 resnet32

table2, table3 and table6 are the paper's, in Markdown and LaTeX, with its values beside ours; KEY
is that of one experiment, a table per setting; bench_rnn is that of a benchmark. Each is written
to results/tables.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts.evidence.results_io import Jobs, Results, make_all, run
from scripts.tables import of_benchmarks, of_paper, of_settings


def jobs(results: Results) -> Jobs:
    return {
        name: job
        for program in (of_paper, of_settings, of_benchmarks)
        for name, job in program.jobs(results).items()
    }


def main(argv: Sequence[str]) -> None:
    make_all(__doc__.splitlines()[0], "tables", jobs, argv)


if __name__ == "__main__":
    run(main)
