"""The text of an `Advice`: a table, what was left out, a recommendation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from highway_bp.diagnostics.step_times import StepTimes
from highway_bp.methods import Highway

if TYPE_CHECKING:
    from highway_bp.diagnostics.advice import Advice, Choice, Trial


def text_of(advice: Advice) -> str:
    lines = [_time_line(advice.times), "", *_table(advice), ""]
    return "\n".join([*lines, *_left_out(advice), *_verdicts(advice)])


def _time_line(times: StepTimes) -> str:
    return (
        f"A step: backprop {times.backprop:.3g} s, of which forward {times.forward:.3g} s; "
        f"Highway {times.here(Highway(0)):.3g} s at k = 0, each iteration "
        f"{times.iteration:.2g} s more (lower quartiles of {times.rounds})."
    )


def _table(advice: Advice) -> list[str]:
    """A row for every k and cut, of the gamma with the larger cosine."""
    times, devices = advice.times, _devices(advice)
    best: dict[tuple[int, int], Trial] = {}
    for trial in sorted(advice.trials, key=lambda t: t.cosine):
        best[-trial.method.group_size, trial.method.k] = trial
    rows = [["groups", "k", "gamma", "cosine", "error", "time here", *(f"on {P}" for P in devices)]]
    for (_, k), trial in sorted(best.items()):
        method = trial.method
        rows.append(
            [
                _groups(times, method),
                str(k),
                str(method.gamma),
                f"{trial.cosine:.3f}",
                f"{trial.relative_error:.3f}",
                f"{times.here(method) / times.backprop:.2f}",
                *(f"{times.backprop / times.on_devices(method, P):.2f}" for P in devices),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return [
        *lines,
        "time here: of a step, in steps of backprop"
        + ("; on P: expected speed-up on P devices" if devices else ""),
    ]


def _left_out(advice: Advice) -> list[str]:
    """What the time did not suffice for."""
    if not advice.left_out:
        return []
    measured = {(t.method.group_size, t.method.k) for t in advice.trials}
    ks: dict[str, dict[int, None]] = {}
    for m in advice.left_out:
        gamma = f", gamma {m.gamma}" if (m.group_size, m.k) in measured else ""
        ks.setdefault(f"{_groups(advice.times, m)} groups{gamma}", {})[m.k] = None
    listed = "; ".join(f"{where}: k = {', '.join(map(str, ks[where]))}" for where in sorted(ks))
    might = any(advice.may_win(m) for m in advice.left_out)
    return [
        f"Not measured, as the time was up: {listed}. "
        f"{'More seconds might' if might else 'None of them could'} change the advice."
    ]


def _verdicts(advice: Advice) -> list[str]:
    times, devices = advice.times, _devices(advice)
    lines = ["Cosines and errors are of the weights as they are, and change during training."]
    lines += [f"On this device: {_verdict(times, advice.here)}"]
    lines += [f"On {P} devices: {_verdict(times, advice.for_devices(P))}" for P in devices]
    if devices:
        lines.append(
            "Several devices: expected, with consecutive layers on each, beside backprop through "
            "the same devices, communication left out (hb.shard spreads layers over processes). "
            "Data parallelism may use them better."
        )
    return lines


def _verdict(times: StepTimes, choice: Choice) -> str:
    method = choice.method
    if not isinstance(method, Highway):
        return f"stay with backprop ({choice.reason})."
    groups = "" if times.layers is None else f" in {_groups(times, method)} groups"
    return (
        f"Highway, k = {method.k}{groups}, gamma = {method.gamma}: "
        f"{choice.speed_up:.2f} times as fast ({choice.reason})."
    )


def _devices(advice: Advice) -> Sequence[int]:
    return () if advice.times.layers is None else advice.devices


def _groups(times: StepTimes, method: Highway) -> str:
    return "no" if times.layers is None else str(times.groups(method))
