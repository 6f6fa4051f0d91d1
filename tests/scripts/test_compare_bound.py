"""The comparison of bounds with measured errors: networks trained here, a GRU unrolled, a run."""

import json
from functools import partial

import pytest
import torch

import highway_bp as hb
from experiments.data.topics import load_topics
from experiments.errors import UserError
from highway_bp.diagnostics import spectral
from models.rnn import RNNLanguageModel
from scripts import compare_bound
from tests.scripts.test_compare_gammas import TINY_GPT
from tests.train_cli import only_run


@pytest.fixture(autouse=True)
def few_iterations(monkeypatch):
    monkeypatch.setattr(spectral, "STEPS", 12)
    monkeypatch.setattr(compare_bound, "KS", (0, 1, 2, 6))


def test_a_gru_s_steps_as_layers_are_the_gru():
    gru = hb.GRU(3, 4)
    x = torch.randn(7, 2, 3)
    (out, last), (h, h_n) = compare_bound.GRUSteps(gru)(x), gru(x)
    torch.testing.assert_close(out, h)
    torch.testing.assert_close(last, h_n)
    weights = list(gru.parameters())
    loss = [(t * torch.arange(t.numel()).view(t.shape)).sum() for t in (h, out)]
    for found, wanted in zip(*(torch.autograd.grad(t, weights) for t in loss), strict=True):
        torch.testing.assert_close(found, wanted)


def test_networks_are_trained_and_judged(tmp_path, monkeypatch):
    small = compare_bound.Small(
        partial(load_topics, "characters", 50, 6),
        partial(RNNLanguageModel, cell="gru", hidden=5),
        1e-2,
        4,
    )
    monkeypatch.setattr(compare_bound, "SMALL", {"tiny GRU": small})
    out = tmp_path / "bound.json"
    compare_bound.main(["--out", str(out), "--steps", "2", "--samples", "2"])
    (network,) = json.loads(out.read_text())["networks"]
    assert network["name"] == "tiny GRU, 2 training steps"
    assert [row["k"] for row in network["errors"]] == [0, 1, 2, 6]
    for row in network["errors"][:-1]:
        assert 1e-6 < row["measured"] <= min(row["bound"], row["residual_bound"]), row
    assert network["errors"][0]["increment_estimate"] is None
    assert network["errors"][-1]["bound"] == 0.0
    page = out.with_suffix(".md").read_text()
    assert "## tiny GRU" in page and page.count("\n| 6 | 0 |") == 1
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_is_judged(train, runs, tmp_path):
    assert train(*TINY_GPT, "grad=bp").code == 0
    out = tmp_path / "run.json"
    compare_bound.main([str(only_run(runs)), "--out", str(out), "--samples", "2"])
    (network,) = json.loads(out.read_text())["networks"]
    assert network["trained"]["model"] == "gpt2_small"
    rows = network["errors"]
    assert rows[0]["measured"] > 0.01 and rows[-1]["measured"] < 1e-5  # 6 sublayers
    assert all(row["measured"] <= row["residual_bound"] * 1.01 + 1e-6 for row in rows)


def test_wrong_input_is_refused():
    with pytest.raises(UserError, match="--samples 0; expected a whole number, at least 1"):
        compare_bound.main(["--samples", "0"])
    with pytest.raises(UserError, match="expected one layer, one direction, time first"):
        compare_bound.GRUSteps(hb.GRU(3, 4, num_layers=2))
    with pytest.raises(UserError, match="is no finished run"):
        compare_bound.main(["/nowhere"])
