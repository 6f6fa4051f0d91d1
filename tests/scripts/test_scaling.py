"""The performance model in its limits, and the page and picture made of it."""

from __future__ import annotations

import json
import subprocess
import sys
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
    scan,
    transformer,
    zero_bubble,
)
from tests.scripts.synthetic_runs import ROOT

FREE = Link(0.0, inf)
NET = Network(L=24, forward=1.0, inputs=1.0, parameters=1.0, state=1e6, weights=1e6, batch=64)


def test_on_one_device_all_take_as_long() -> None:
    for seconds in (model_parallel(NET, 1, FREE), pipeline(NET, 1, FREE, 4), NET.step,
                    zero_bubble(NET, 1, FREE, 4), data_parallel(NET, 1, FREE),
                    highway(NET, 1, FREE, 0)):  # fmt: skip
        assert seconds == 72.0


def test_with_free_messages_the_backward_pass_is_shared_out() -> None:
    # 24 forward; then each of 4 devices does 6 layers backward, inputs and parameters
    assert highway(NET, 4, FREE, 0) == 24 + 12
    assert highway(NET, 4, FREE, 2) == 24 + 12 + 2 * 6
    assert highway(NET, 4, FREE, 99) == highway(NET, 4, FREE, 3)  # exact at P - 1
    assert highway(NET, 4, FREE, 0, micro=8) == 24 / 4 * 11 / 8 + 12
    assert data_parallel(NET, 4, FREE) == pytest.approx(72 / 4)
    assert pipeline(NET, 4, FREE, 8) == 72 / 4 * 11 / 8
    assert zero_bubble(NET, 4, FREE, 8) < pipeline(NET, 4, FREE, 8)


def test_messages_cost_latency_and_bytes() -> None:
    slow = Link(0.5, 1e6)
    assert model_parallel(NET, 4, slow) == 72 + 6 * 1.5
    assert scan(NET, 4, slow) == min(2 * 1.5, 2 * 0.5 + 3 * 1.0)


def test_a_transformer_counts_its_products() -> None:
    net = transformer(layers=2, width=10, length=5, batch=3, flops=1.0)
    assert net.parameters == 2 * 12 * 100 * 15
    assert net.forward == net.parameters + 4 * 5 * 10 * 15
    assert net.state == 2 * 15 * 10


def test_the_page_holds_measured_against_predicted(tmp_path: Path) -> None:
    seconds = {"bp_forward": 1.0, "bp_backward": 2.0, "k0_forward": 1.0, "k0_backward": 1.0}
    record = {
        "environment": {"device": "CPU x", "torch": "2", "commit": "abcdef0123"},
        "layers": 24, "batch": 8, "processes": {"2": {"seconds": seconds}},
        "costs": {"forward": 0.04, "inputs": 0.04, "parameters": 0.04, "state_bytes": 1.0,
                  "weight_bytes": 1.0, "latency": 0.0, "bandwidth": 1e9},
    }  # fmt: skip
    (tmp_path / "bench.json").write_text(json.dumps(record))
    scaling.main([str(tmp_path / "bench.json"), "--out", str(tmp_path)])
    text = (tmp_path / "tables" / "scaling.md").read_text()
    assert "| 2 processes, bp | 3.000 | 2.400 | 0.80 |" in text
    assert "not measured" in text
    assert (tmp_path / "figures" / "scaling.png").exists()


def test_without_a_record_it_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "scaling.py", tmp_path / "none.json"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1 and "scripts/bench_sharded.py makes it" in done.stderr
    assert done.stderr.count("\n") == 1
