"""The benchmark of layers on processes: all strategies right and timed, or none timed."""

import json
from dataclasses import replace
from math import inf, nan

import pytest
import torch
from torch import nn

from experiments.errors import UserError
from scripts import bench_sharded
from scripts.bench_sharded import TOLERANCE, gradient_error
from scripts.sharded_strategies import Setting, Strategy, strategies

pytestmark = pytest.mark.slow

TINY, ARGUMENTS = Setting(4, 8, 4, 4, 2), ["--repeats", "2", "--processes", "2"]
EXACT = {"bp", "k1", "bp_micro", "k1_micro", "model_parallel", "gpipe", "1f1b", "data_parallel"}
IN_ONE_GO = {"model_parallel", "gpipe", "1f1b"}


def one_wrong(setting: Setting) -> dict[str, Strategy]:
    ways = strategies(setting)
    return ways | {"gpipe": replace(ways["k0"], exact=True)}


def test_all_strategies_are_right_and_timed(tmp_path) -> None:
    bench_sharded.main([*ARGUMENTS, "--out", str(tmp_path / "bench.json")], TINY)
    record = json.loads((tmp_path / "bench.json").read_text())
    assert (record["layers"], record["width"], record["micro_batches"]) == (4, 8, 2)
    assert record["state_bytes"] == 4 * 4 * 4 * 8
    found = record["processes"]["2"]
    assert found["gradient_error"].keys() == EXACT
    assert max(found["gradient_error"].values()) < TOLERANCE
    every = EXACT | {"k0", "k0_micro"}
    assert found["backward_over_bp"].keys() == every - IN_ONE_GO
    times = {f"{name}_step" for name in every} | {
        f"{name}_{part}" for name in every - IN_ONE_GO for part in ("forward", "backward")
    }
    assert found["seconds"].keys() == times
    costs = {"whole_forward", "whole_inputs", "whole_backward", "exchange"}
    assert found["costs"].keys() == costs
    seconds = found["seconds"]
    assert seconds["bp_step"] > max(seconds["bp_forward"], seconds["bp_backward"]) > 0


def test_a_wrong_gradient_is_not_timed(tmp_path) -> None:
    out = tmp_path / "bench.json"
    with pytest.raises(UserError, match=r"differ.*: gpipe \(.*\); nothing was timed"):
        bench_sharded.main([*ARGUMENTS, "--out", str(out)], TINY, one_wrong)
    assert not out.exists()


@pytest.mark.parametrize("found", [None, nan])
def test_no_gradient_and_no_number_are_wrong(found) -> None:
    p = nn.Parameter(torch.ones(3))

    def step() -> None:
        p.grad = None if found is None else torch.full((3,), found)

    assert gradient_error(Strategy(step, {"p": p}), {"p": torch.ones(3)}) == inf
