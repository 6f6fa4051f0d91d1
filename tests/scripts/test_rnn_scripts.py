"""The benchmark of recurrent layers and its tables, on tiny networks."""

import json
from functools import partial

import pytest
import torch

from scripts import bench_rnn
from scripts.bench_rnn import CellLoop, Shape, network
from scripts.evidence.paper import paper_rows
from scripts.evidence.results import Results
from scripts.tables import of_timings

pytestmark = pytest.mark.slow

TINY = Shape("LSTM", batch=2, length=5, hidden=3, layers=2)
METHODS = dict(k3="Highway(k=3", k1w16="group_size=16", fp5="FixedPoint(k=5", bptt16="window=16")


@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_all_networks_compute_the_same_outputs(cell):
    shape = Shape(cell, 2, 5, 3)
    plain, x = network(shape, "nn"), torch.randn(5, 2, 3)
    weights = plain.state_dict()
    loop = CellLoop(shape)
    loop.cells[0].load_state_dict({n.removesuffix("_l0"): w for n, w in weights.items()})
    torch.testing.assert_close(loop(x)[0], plain(x)[0])
    for name, method in METHODS.items():
        ours = network(shape, name)
        ours.load_state_dict(weights)
        assert method in str(ours.method)
        torch.testing.assert_close(ours(x)[0], plain(x)[0])


def test_a_record_has_times_relative_to_torchs_faster_one_and_memory(monkeypatch, tmp_path):
    monkeypatch.setitem(bench_rnn.SHAPES, "paper", [TINY])
    monkeypatch.setitem(bench_rnn.NAMES, "paper", ["nn", "nn1", "k1", "loop"])
    monkeypatch.setitem(bench_rnn.PAPER, "lstm_chars", TINY)
    monkeypatch.setattr(bench_rnn, "memory", partial(bench_rnn.memory, names=["k0"]))
    monkeypatch.setattr(bench_rnn, "PROCESSES", 1)
    out = tmp_path / "results" / "bench_rnn.json"
    bench_rnn.main(["--parts", "paper", "--repeats", "3", "--out", str(out)])
    record = json.loads(out.read_text())
    (times,), (memory,) = record["paper"], record["memory"]
    assert (times["row"], times["shape"]) == ("lstm_chars", "LSTM x2, batch 2, L 5, hidden 3")
    assert times["ms"].keys() == times["speedup"].keys() == {"nn", "nn1", "k1", "loop"}
    assert max(times["speedup"][name] for name in bench_rnn.BASELINES) == 1.0
    assert min(times["speedup"][name] for name in bench_rnn.BASELINES) < 1.0
    for name, ms in times["ms"].items():
        assert 0 < times["least_ms"][name] <= ms <= times["most_ms"][name]
    assert memory["peak"]["k0"]["tensors_mb"] > 0


def test_the_benchmarks_page_marks_where_torch_wins(tmp_path):
    times = {"shape": "GRU, batch 8", "ms": {"nn": 95.0, "nn1": 90.0, "k0": 30.0, "k5": 100.0}}
    times["speedup"] = {"nn": 0.95, "nn1": 1.0, "k0": 3.0, "k5": 0.9}
    memory = {"shape": "GRU, batch 8", "peak": {"nn": {"tensors_mb": 23.0}}}
    environment = {"device": "CPU x", "torch": "2", "commit": "abcdef0123", "dirty": False}
    record = {"environment": environment, "repeats": 7}
    ends = {"least_ms": {"nn": 94.0, "nn1": 88.0}, "most_ms": {"nn": 99.0, "nn1": 92.5}}
    record |= {"small": [times], "grid": [times | ends], "memory": [memory]}
    (tmp_path / "bench_rnn.json").write_text(json.dumps(record))
    page = of_timings.bench_rnn(Results(tmp_path, {})).write(tmp_path, "bench_rnn")
    text = page.read_text()
    assert "| GRU, batch 8 | 95.0 | 90.0 | 3.00 | **0.90** |" in text
    apart = "95.0 (94.0 to 99.0) | 90.0 (88.0 to 92.5)"
    assert f"| GRU, batch 8 | {apart} | 3.00 | **0.90** |" in text
    assert "| GRU, batch 8 | 23 |" in text and "commit abcdef0123" in text


def test_the_paper_s_shapes_are_those_of_its_recurrent_networks():
    recurrent = [paper for paper in paper_rows().values() if paper.milliseconds]
    assert list(bench_rnn.PAPER) == [paper.key for paper in recurrent]
    assert [shape.length for shape in bench_rnn.PAPER.values()] == [p.L for p in recurrent]
    ks = recurrent[0].milliseconds["highway"]
    names = {"nn", "loop", *(f"{m}{k}" for m in ("k", "fp") for k in ks)}
    assert set(bench_rnn.NAMES["paper"]) == names
