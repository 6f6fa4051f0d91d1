"""A finished run as one flat row: how it is made, and what it must be to be read again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.errors import UserError

SCHEMA = 2  # 1: rows without a field "schema"; scripts/upgrade_rows.py makes 2 of them


@dataclass(frozen=True)
class Field:
    """What a field of a row holds: its types in JSON (None: may be null), and its meaning."""

    types: tuple[type | None, ...]
    meaning: str


TEXT, NUMBER, WHOLE, YES_NO = (str,), (float, int), (int,), (bool,)

FIELDS: dict[str, Field] = {
    "schema": Field(WHOLE, "version of this list"),
    "experiment": Field((str, None), "preset of configs/experiment, null where none was named"),
    "model": Field(TEXT, "choice of configs/model"),
    "parameters": Field((int, None), "trained parameters"),
    "L": Field((int, None), "layers of the longest chain; of a recurrent network, time steps"),
    "grad": Field(TEXT, "gradient method: bp, truncated_bptt, fixed_point, mgrit, highway"),
    "k": Field((int, None), "iterations; null for methods without, and with a schedule"),
    "schedule": Field((str, None), "schedule of k and its numbers; null for one k throughout"),
    "tolerance": Field((float, int, None), "change below which iterations stop early"),
    "gamma": Field((float, int, str, None), 'share of the residual path in the block, or "auto"'),
    "group_size": Field((int, None), "layers or time steps that count as one, exact inside"),
    "window": Field((int, None), "window of truncated BPTT"),
    "data": Field(TEXT, "training data, and those it is scored on if others"),
    "validation": Field((float, int, None), "part of the training data held out for the score"),
    "steps": Field(WHOLE, "training steps"),
    "epochs": Field(NUMBER, "training steps by steps per epoch"),
    "batch_size": Field(WHOLE, "examples or sequences per step"),
    "lr": Field(NUMBER, "largest learning rate"),
    "seed": Field(WHOLE, "of the weights, batches and augmentation"),
    "config_hash": Field(TEXT, "of the resolved configuration without seed, paths and device"),
    "setup": Field(
        (str, None),
        "the same without gradient method and schedule: rows that share "
        "it may be compared; null in rows of schema 1",
    ),
    "reduced": Field(YES_NO, "fewer steps than the recipe's"),
    "metric": Field(TEXT, "the score that stands for the run: one of the eval_ fields"),
    "train_loss": Field(NUMBER, "of the last step, nats"),
    "eval_loss": Field(NUMBER, "at the end, nats"),
    "seconds": Field(NUMBER, "wall-clock seconds of training steps; no evaluation, no checkpoints"),
    "seconds_per_step": Field(NUMBER, "seconds / steps"),
    "cpu_seconds": Field((float, int, None), "processor seconds of the same, all threads"),
    "block_passes": Field((int, None), "passes through all blocks, summed over the steps"),
    "sequential_passes": Field(
        (int, None), "those that wait for each other when every layer has its own device"
    ),
    "peak_memory_mb": Field(NUMBER, "of the process, or allocated on the GPU; 1e6 bytes"),
    "commit": Field(TEXT, "of this repository"),
    "dirty": Field(YES_NO, "tracked files differed from that commit, or it is unknown"),
    "device": Field(TEXT, "processor and threads, or GPU"),
    "python": Field(TEXT, "version"),
    "torch": Field(TEXT, "version"),
    "versions": Field((dict,), "versions of packages that may change a result"),
}
SCORES: dict[str, Field] = {
    "eval_accuracy": Field(NUMBER, "right answers / all, 0 to 1"),
    "eval_perplexity": Field(NUMBER, "exp of the loss per token"),
    "eval_bits_per_char": Field(NUMBER, "loss per character of text, bits"),
}
SOMETIMES: dict[str, Field] = {
    "mgrit": Field(TEXT, "numbers of grad=mgrit, which has no k"),
    "continued_from": Field(TEXT, "config_hash and step of the run this one has gone on from"),
    "processes": Field(WHOLE, "of this run; this and the next three with parallel=layers alone"),
    "sizes": Field((list,), "layers of the chain that each process of a replica has"),
    "replicas": Field(WHOLE, "of those processes, with a part of every batch each"),
    "micro_batches": Field(WHOLE, "parts of a batch that follow one another through the layers"),
}
CURVE: dict[str, Field] = {
    "curve": Field(
        (dict,),
        "columns over training (train, eval) and, if measured, the gradient's "
        "error (gradient_error); in results files alone",
    ),
}


def check_row(row: Any, where: str) -> None:
    """A row of this schema passes; fields of SCORES and SOMETIMES may lack, but for its own metric.

    Raises:
        UserError: naming ``where`` and what is missing, unknown or of a wrong type.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a row; expected a JSON object")
    if row.get("schema", 1) != SCHEMA:
        raise UserError(
            f"{where} is of schema {row.get('schema', 1)}, expected {SCHEMA}; "
            "scripts/upgrade_rows.py brings schema 1 up to date"
        )
    known = FIELDS | SCORES | SOMETIMES | CURVE
    complaints = [f"{name} is missing" for name in FIELDS if name not in row]
    complaints += [f"{name} is unknown" for name in row if name not in known]
    complaints += [
        f"{name} is {row[name]!r}, expected {_named(field)}"
        for name, field in known.items()
        if name in row and not _fits(row[name], field)
    ]
    if not complaints and row["metric"] not in row.keys() & SCORES.keys():
        complaints = [f"metric is {row['metric']!r}, expected the name of a score in the row"]
    if complaints:
        raise UserError(f"{where}: {'; '.join(complaints)}")


def _fits(value: Any, field: Field) -> bool:
    # type, not isinstance: true is no whole number
    return (None if value is None else type(value)) in field.types


def _named(field: Field) -> str:
    return " or ".join("null" if kind is None else kind.__name__ for kind in field.types)
