"""Write the recurrent benchmark as Markdown: speed-ups, where plain BPTT wins, memory.

    python scripts/bench_table.py results

results/bench_rnn.json (and bench_rnn_NAME.json of other devices) gives tables/bench_rnn.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

TITLES = {
    "small": "Long sequences of small steps",
    "paper": "The paper's shapes (Table 6)",
    "grid": "Where it pays, and where plain BPTT wins",
}


def speed_table(rows: list[dict]) -> str:
    """Times faster than torch.nn's layer; where that is faster, the number is bold."""
    names = [name for name in rows[0]["speedup"] if name != "nn"]
    lines = ["| shape | nn, ms | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        values = [row["speedup"][name] for name in names]
        cells = [f"{v:.2f}" if v >= 1 else f"**{v:.2f}**" for v in values]
        lines.append(f"| {row['shape']} | {row['ms']['nn']:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory_table(rows: list[dict]) -> str:
    names = list(rows[0]["peak"])
    lines = ["| shape | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = [f"{row['peak'][name]['tensors_mb']:.0f}" for name in names]
        lines.append(f"| {row['shape']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(record: dict) -> str:
    environment = record["environment"]
    state = "dirty" if environment["dirty"] else "clean"
    parts = [
        "# Recurrent layers beside torch.nn's",
        f"Forward and backward, times faster than `nn.GRU` or `nn.LSTM` in the same process; bold "
        f"where they are faster. kN is Highway-BP with k = N, kNwS with windows of S steps, fpN "
        f"the fixed point, bpttS truncated BPTT. {environment['device']}, torch "
        f"{environment['torch']}, commit {environment['commit'][:7]} ({state}), median of "
        f"{record['repeats']}.",
    ]
    for part in (name for name in TITLES if name in record):
        parts += [f"## {TITLES[part]}", speed_table(record[part])]
    parts += ["## Peak memory of a step, MB of tensors", memory_table(record["memory"])]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder with bench_rnn*.json")
    args = parser.parse_args(argv)
    (args.results / "tables").mkdir(exist_ok=True)
    for source in sorted(args.results.glob("bench_rnn*.json")):
        path = args.results / "tables" / f"{source.stem}.md"
        path.write_text(page(json.loads(source.read_text())))
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
