"""The performance model in its limits, and the page and picture made of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from scripts import scaling
from scripts.scaling_model import (
    Link,
    Network,
    data_parallel,
    highway,
    model_parallel,
    pipeline,
    replicated,
    scan,
    sharded_backprop,
    transformer,
    zero_bubble,
)
from scripts.sharding.prospects import ahead
from tests.scripts.synthetic_runs import ROOT

FREE = Link(0.0, inf)
NET = Network(L=24, forward=1.0, inputs=1.0, parameters=1.0, state=1e6, weights=1e6, batch=64)


@pytest.mark.parametrize("cores", [None, 1])
def test_on_one_device_all_take_as_long(cores) -> None:
    for seconds in (
        model_parallel(NET, 1, FREE),
        pipeline(NET, 1, FREE, 4, cores),
        NET.step,
        zero_bubble(NET, 1, FREE, 4),
        data_parallel(NET, 1, FREE, cores),
        highway(NET, 1, FREE, 0, 4, cores),
        sharded_backprop(NET, 1, FREE, 4, cores),
    ):
        assert seconds == 72.0


def test_with_free_messages_the_backward_pass_is_shared_out() -> None:
    # 24 forward; then each of 4 devices does 6 layers backward, inputs and parameters
    assert highway(NET, 4, FREE, 0) == 24 + 12
    assert highway(NET, 4, FREE, 2) == 24 + 12 + 2 * 6
    assert highway(NET, 4, FREE, 99) == highway(NET, 4, FREE, 3)  # exact at P - 1
    assert highway(NET, 4, FREE, 0, micro=8) == 24 / 4 * 11 / 8 + 12
    assert sharded_backprop(NET, 4, FREE) == highway(NET, 4, FREE, 3)
    assert data_parallel(NET, 4, FREE) == pytest.approx(72 / 4)
    assert pipeline(NET, 4, FREE, 8) == 72 / 4 * 11 / 8
    assert zero_bubble(NET, 4, FREE, 8) < pipeline(NET, 4, FREE, 8)


def test_two_cores_for_four_processes() -> None:
    # 1 2 3 4 3 2 1 stages at work in the slots of a pipeline: 9 slots of time, not 7
    assert pipeline(NET, 4, FREE, 4, cores=2) == 9 * 72 / 4 / 4
    assert highway(NET, 4, FREE, 0, cores=2) == 24 + 2 * 12
    assert highway(NET, 4, FREE, 0, 4, cores=2) == 9 * 24 / 4 / 4 + 2 * 12
    # iterations of 3, 2 and 1 stages
    assert highway(NET, 4, FREE, 3, cores=2) == 24 + 2 * 12 + 1.5 * 6 + 6 + 6
    # one pass of 6 alone, then two of 6 and four of 12 on both cores
    assert sharded_backprop(NET, 4, FREE, cores=2) == 24 + 6 + 60 / 2
    assert data_parallel(NET, 4, FREE, cores=2) == 72 / 2


def test_one_core_does_all_work_in_turn() -> None:
    assert pipeline(NET, 4, FREE, 8, cores=1) == 72
    assert data_parallel(NET, 4, FREE, cores=1) == 72
    assert highway(NET, 4, FREE, 0, 8, cores=1) == 72
    assert highway(NET, 4, FREE, 1, cores=1) == 72 + 3 * 6
    assert sharded_backprop(NET, 4, FREE, cores=1) == 72 + 3 * 6


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("cores", [1, 2, 3, 8])
def test_both_pipelines_take_what_the_slots_say(schedule, cores) -> None:
    for P, micro in ((2, 4), (4, 4), (4, 8)):
        net = Network(
            L=P, forward=micro, inputs=micro, parameters=micro, state=0.0, weights=0.0, batch=64
        )
        played = play([orders(schedule, s, P, micro) for s in range(P)], cores)
        assert pipeline(net, P, FREE, micro, cores) == pytest.approx(played)


def orders(schedule: str, s: int, P: int, micro: int) -> list[tuple[str, int]]:
    """What stage s does, as torch's schedules have it."""
    first = micro if schedule == "gpipe" else min(micro, P - s)
    rest = [task for m in range(micro - first) for task in (("B", m), ("F", first + m))]
    return [("F", m) for m in range(first)] + rest + [("B", m) for m in range(micro - first, micro)]


def play(stages: list[list[tuple[str, int]]], cores: int) -> float:
    """Seconds until all is done: a forward task takes 1, a backward one 2, cores are shared."""
    todo = [[[kind, m, 1.0 if kind == "F" else 2.0] for kind, m in stage] for stage in stages]
    now, done, last = 0.0, set(), len(stages) - 1

    def ready(s: int) -> bool:
        kind, m, _ = todo[s][0]
        if kind == "F":
            return s == 0 or ("F", s - 1, m) in done
        return (("F", s, m) if s == last else ("B", s + 1, m)) in done

    while any(todo):
        active = [s for s, tasks in enumerate(todo) if tasks and ready(s)]
        step = min(todo[s][0][2] for s in active)
        now += step * max(1.0, len(active) / cores)
        for s in active:
            todo[s][0][2] -= step
            if todo[s][0][2] < 1e-9:
                kind, m, _ = todo[s].pop(0)
                done.add((kind, s, m))
    return now


def test_messages_cost_latency_and_bytes() -> None:
    slow = Link(0.5, 1e6)
    assert model_parallel(NET, 4, slow) == 72 + 6 * 1.5
    assert scan(NET, 4, slow) == min(2 * 1.5, 2 * 0.5 + 3 * 1.0)
    # the state to the next stage and to all, losses inside stages, the scan: 1.5 each
    assert highway(NET, 2, slow, 0) == 24 + 24 + 4 * 1.5


def test_gradients_are_summed_meanwhile_but_not_for_free_on_shared_cores() -> None:
    ring = 2 * 3 / 4 * 24
    assert data_parallel(NET, 4, Link(0.0, 1e6)) == 6 + ring
    assert data_parallel(NET, 4, Link(0.0, 1e6), cores=4) == 18 + ring


def test_replicas_share_the_batch_and_sum_their_gradients() -> None:
    def strategy(net, P, link, micro):
        return highway(net, P, link, 0, micro)

    assert replicated(strategy, NET, 4, 1, FREE, 8) == highway(NET, 4, FREE, 0, 8)
    assert replicated(strategy, NET, 8, 2, FREE, 8) == highway(NET, 4, FREE, 0, 8) / 2
    # 24 layers on 16 devices: the slowest stage has 2
    wide = replace(NET, L=32)
    assert replicated(strategy, NET, 16, 1, FREE, 8) == highway(wide, 16, FREE, 0, 8)
    # 6 forward of a half batch per stage, then a ring of 2 for 12 layers of 1 MB at 1 MB/s
    slow = Link(0.0, 1e6)
    assert replicated(lambda *_: 0.0, NET, 4, 2, slow, 8) == 6 + 12


def test_a_transformer_counts_its_products() -> None:
    net = transformer(layers=2, width=10, length=5, batch=3, flops=1.0)
    assert net.parameters == 2 * 12 * 100 * 15
    assert net.forward == net.parameters + 4 * 5 * 10 * 15
    assert net.state == 2 * 15 * 10


def test_a_cell_says_who_is_ahead() -> None:
    faster = {
        "model parallel": 1.0,
        "data parallel": 2.0,
        "zero bubble (ZB-H1)": 1.5,
        "Highway k=0": 1.0,
        "Highway k=0, micro-batches": 2.5,
        "Highway k=1": 1.2,
        "Highway k=1, micro-batches": 1.1,
    }
    assert ahead(faster) == "DP **1.25** 0.60"
    assert ahead({"data parallel": 2.0}) == "DP - -"


def record() -> dict:
    """Two processes, and four on two cores; layers in micro-batches are dearer."""
    costs = {
        f"{cut}_{name}": times * seconds
        for cut, seconds in (("whole", 0.04), ("micro", 0.05), ("share", 0.02))
        for name, times in (("forward", 1), ("inputs", 1), ("backward", 2))
    }
    costs |= {"exchange": 0.002, "exchange_one": 0.002, "alone": 1.0}
    two = {"bp_step": 3.0, "k0_step": 1.92, "k0_micro_step": 2.0, "gpipe_step": 2.25}
    four = {"k1_step": 2.5, "1f1b_step": 1.0}
    return {
        "environment": {"device": "CPU x", "torch": "2", "commit": "abcdef0123"},
        "cores": 2,
        "layers": 24,
        "width": 256,
        "batch": 8,
        "length": 256,
        "micro_batches": 4,
        "state_bytes": 1.0,
        "weight_bytes": 1.0,
        "processes": {
            "2": {"oversubscribed": False, "seconds": two, "costs": costs | {"together": 1.0}},
            "4": {"oversubscribed": True, "seconds": four, "costs": costs | {"together": 2.0}},
        },
    }


def test_the_page_holds_measured_against_predicted(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(record()))
    scaling.main([str(tmp_path / "bench.json"), "--out", str(tmp_path)])
    text = (tmp_path / "tables" / "scaling.md").read_text()
    # two: 0.96 + 0.48 + 0.96 and four messages of 2 ms
    assert "| 2 processes, sharded backpropagation | 3.000 | 2.408 | 0.80 |" in text
    # 5 slots of 3.6 / 2 / 4 and two messages
    assert "| 2 processes, GPipe | 2.250 | 2.254 | 1.00 |" in text
    assert "| 2 processes, Highway k=0 | 1.920 | 1.928 | 1.00 |" in text
    # 5 slots of 1.2 / 2 / 4, then 1.2, and four messages
    assert "| 2 processes, Highway k=0, micro-batches | 2.000 | 1.958 | 0.98 |" in text
    # 0.96 + 2 * 0.48 + 1.5 * 0.24; forward 5 messages, losses inside 1, two scans of 2, one on
    assert "| 4 processes (oversubscribed), Highway k=1 | 2.500 | 2.302 | 0.92 |" in text
    assert "4 of 6 predictions are within 10%" in text
    assert (
        "| 2 | GPipe: 2.250 | Highway k=0: 1.920, **1.17** | - |" in text
        and "| 4 | 1F1B: 1.000 | - | Highway k=1: 2.500, 0.40 |" in text
    )
    assert "not measured" in text and "### Who is ahead" in text
    assert (tmp_path / "figures" / "scaling.png").exists()


def test_without_a_record_it_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "scaling.py", tmp_path / "none.json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "scripts/bench_sharded.py makes it" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_record_without_costs_is_refused(tmp_path: Path) -> None:
    old = record()
    del old["processes"]["4"]["costs"]
    (tmp_path / "bench.json").write_text(json.dumps(old))
    with pytest.raises(scaling.UserError, match=r"scripts/bench_sharded\.py makes one"):
        scaling.main([str(tmp_path / "bench.json"), "--out", str(tmp_path)])
