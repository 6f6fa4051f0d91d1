"""Draw the figures, or write the tables, of the committed rows and benchmarks.

    python scripts/make_results.py figures results
    python scripts/make_results.py tables results --only table2 resnet32

figure2 to figure6 are the paper's figures, time has losses against time, schedules has scores of
schedules of k, scaling has layers on several devices, and paths has the paths of a small chain. All
are written to results/figures as PNG, PDF and SVG; NAME.rows.txt lists the rows that are shown.

table2, table3 and table6 are the paper's tables in Markdown and LaTeX, with its values beside ours.
KEY (resnet32, ...) is the page of one experiment, with a table per setting. bench_rnn is the page
of that benchmark, claims the table of claims and verdicts. All are written to results/tables.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.errors import UserError
from scripts.evidence.paper import paper_rows
from scripts.evidence.results import Results, read_results
from scripts.figures import gradient_errors, losses, paths, scaling, schedules, scores
from scripts.program import run
from scripts.tables.of_claims import claims
from scripts.tables.of_rows import experiment, table2
from scripts.tables.of_timings import bench_rnn, milliseconds, of_paper, speedups

DEEP = "Figure 2: final score against k, deep networks"
GPT2 = "Figure 3: evaluation loss of GPT-2"
RECURRENT = "Figure 4: final score against k, recurrent networks"
GRU = "Figure 5: evaluation loss of the 3-layer GRU"
SPEEDUPS = "Table 3: times faster than backpropagation"
# Each returns an object whose write(folder, name) writes files NAME.*, or None without data for it.
MAKERS: Mapping[str, Mapping[str, Callable[[Results], Any]]] = {
    "figures": {
        "figure2": partial(scores.draw, 2, DEEP, 3),
        "figure3": partial(losses.draw_pair, "gpt2", GPT2, "steps"),
        "figure4": partial(scores.draw, 4, RECURRENT, 2),
        "figure5": partial(losses.draw_pair, "gru_words", GRU, "time"),
        "figure6": gradient_errors.draw,
        "time": losses.draw_time,
        "schedules": schedules.draw,
        "scaling": scaling.draw,
        "paths": paths.draw,
    },
    "tables": {
        "table2": table2,
        "table3": partial(of_paper, SPEEDUPS, speedups),
        "table6": partial(of_paper, "Table 6: milliseconds per step", milliseconds),
        **{key: partial(experiment, key) for key in paper_rows()},
        "bench_rnn": bench_rnn,
        "claims": claims,
    },
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, makers in MAKERS.items():
        given = kinds.add_parser(kind)
        given.add_argument("results", type=Path, help="folder with KEY.jsonl files")
        given.add_argument("--only", nargs="+", choices=makers, metavar="NAME", default=makers)
    args = parser.parse_args(argv)
    results, folder = read_results(args.results), args.results / args.kind
    folder.mkdir(exist_ok=True)
    for name in args.only:
        if made := MAKERS[args.kind][name](results):
            print(made.write(folder, name))
    if results.left_out:
        raise UserError("some rows were left out; all files are made of the others")


if __name__ == "__main__":
    run(main)
