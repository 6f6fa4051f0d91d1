"""The benchmark of recurrent layers and the comparison of carries, on tiny networks."""

import json

import pytest
import torch

from experiments.errors import UserError
from scripts import bench_rnn
from scripts.bench_rnn import CellLoop, Shape, compare, network
from scripts.evidence.paper import paper_rows
from scripts.evidence.results import Results
from scripts.tables import of_timings

TINY = Shape("LSTM", batch=2, length=5, hidden=3, layers=2)


@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_all_contestants_compute_the_same_outputs(cell):
    shape = Shape(cell, 2, 5, 3)
    plain = network(shape, "nn")
    weights = plain.state_dict()
    x = torch.randn(5, 2, 3)
    loop = CellLoop(shape)
    loop.cells[0].load_state_dict({n.removesuffix("_l0"): w for n, w in weights.items()})
    torch.testing.assert_close(loop(x)[0], plain(x)[0])
    names = {
        "k3": "Highway(k=3",
        "k1w16": "group_size=16",
        "fp5": "FixedPoint(k=5",
        "bptt16": "window=16",
    }
    for name, method in names.items():
        ours = network(shape, name)
        ours.load_state_dict(weights)
        assert method in str(ours.method)
        torch.testing.assert_close(ours(x)[0], plain(x)[0])


def test_a_comparison_is_relative_to_the_first():
    found = compare(TINY, ["nn", "loop", "k1"], repeats=3)
    assert found["shape"] == "LSTM x2, batch 2, L 5, hidden 3"
    assert found["speedup"]["nn"] == 1.0 and set(found["ms"]) == {"nn", "loop", "k1"}
    assert all(ms > 0 for ms in found["ms"].values())


def test_memory_is_measured_in_a_fresh_process():
    found = bench_rnn.memory(TINY, ["k0"])
    assert found["peak"]["k0"]["process_mb"] > found["peak"]["k0"]["tensors_mb"] > 0


def test_the_benchmarks_page_marks_where_torch_wins(tmp_path):
    rows = [
        {
            "shape": "GRU, batch 8",
            "ms": {"nn": 90.0, "k0": 30.0, "k5": 100.0},
            "speedup": {"nn": 1.0, "k0": 3.0, "k5": 0.9},
        }
    ]
    peak = {"nn": {"tensors_mb": 23.0, "process_mb": 300.0}}
    environment = {"device": "CPU x", "torch": "2", "commit": "abcdef0123", "dirty": False}
    memory = [{"shape": "GRU, batch 8", "peak": peak}]
    record = {"environment": environment, "repeats": 7}
    record |= {"small": rows, "grid": rows, "memory": memory}
    (tmp_path / "bench_rnn.json").write_text(json.dumps(record))
    page = of_timings.bench_rnn(Results(tmp_path, {})).write(tmp_path, "bench_rnn")
    text = page.read_text()
    assert text.count("| GRU, batch 8 | 90.0 | 3.00 | **0.90** |") == 2
    assert "| GRU, batch 8 | 23 |" in text and "commit abcdef0123" in text


def test_the_paper_s_shapes_are_those_of_its_recurrent_networks():
    recurrent = [paper for paper in paper_rows().values() if paper.milliseconds]
    assert list(bench_rnn.PAPER) == [paper.key for paper in recurrent]
    assert [shape.length for shape in bench_rnn.PAPER.values()] == [p.L for p in recurrent]
    names = bench_rnn.names_for("paper")
    assert names[:2] == ["nn", "loop"]
    assert set(names[2:]) == {f"{kind}{k}" for kind in ("k", "fp") for k in bench_rnn.KS["paper"]}


@pytest.fixture
def tiny_paper(monkeypatch):
    """Two tiny shapes for the paper's, two methods, and a count of what is measured."""
    shapes = {"lstm_chars": TINY, "gru_chars": Shape("GRU", 2, 5, 3)}
    monkeypatch.setattr(bench_rnn, "PAPER", shapes)
    monkeypatch.setitem(bench_rnn.SHAPES, "paper", list(shapes.values()))
    monkeypatch.setattr(bench_rnn, "names_for", lambda part: ["nn", "k0"])
    monkeypatch.setattr(bench_rnn, "memory", lambda shape, names: {"shape": str(shape), "peak": {}})
    measured = []
    monkeypatch.setattr(
        bench_rnn,
        "compare",
        lambda shape, *rest: (measured.append(str(shape)), compare(shape, *rest))[1],
    )
    return measured


def test_a_benchmark_goes_on_where_it_was_stopped(tiny_paper, tmp_path, capsys):
    out = tmp_path / "results" / "bench_rnn_paper.json"
    arguments = ["--parts", "paper", "--repeats", "1", "--out", str(out)]
    bench_rnn.main([*arguments, "--rows", "gru_chars"])
    bench_rnn.main([*arguments, "--resume"])
    assert tiny_paper == ["GRU, batch 2, L 5, hidden 3", str(TINY)]
    assert "paper, GRU, batch 2, L 5, hidden 3: there already" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert [entry["row"] for entry in record["paper"]] == ["lstm_chars", "gru_chars"]  # in order
    assert len(record["memory"]) == 2 and all(entry["commit"] for entry in record["paper"])
    bench_rnn.main(arguments)
    assert len(tiny_paper) == 4  # without --resume all anew


def test_a_record_of_another_machine_is_not_gone_on_with(tiny_paper, tmp_path):
    out = tmp_path / "bench_rnn_paper.json"
    arguments = ["--parts", "paper", "--repeats", "1", "--out", str(out)]
    bench_rnn.main([*arguments, "--rows", "gru_chars"])
    record = json.loads(out.read_text())
    record["environment"] |= {"device": "GPU y", "commit": "another"}
    out.write_text(json.dumps(record))
    with pytest.raises(UserError, match="was measured with device GPU y, this is CPU"):
        bench_rnn.main([*arguments, "--resume"])
    with pytest.raises(UserError, match="was measured with repeats 1, this is 2"):
        record["environment"] = bench_rnn.environment(bench_rnn.DEVICE)
        out.write_text(json.dumps(record))
        bench_rnn.main([*arguments, "--repeats", "2", "--resume"])
