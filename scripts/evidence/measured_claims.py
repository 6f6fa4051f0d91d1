"""Claims that a measurement decides: theorems, sizes, times and memory."""

import re
from collections.abc import Callable
from statistics import fmean

from scripts.evidence.claim import Claim, holds_for, holds_if
from scripts.evidence.judge import NOT_MEASURED, Finding, Outcome
from scripts.evidence.paper import PaperRow, paper_rows
from scripts.evidence.results import Results
from scripts.evidence.theorem_check import largest_error

EXACT = 1e-12  # tolerance for float64 and a handful of operations


def parameter_counts(_: Results) -> Finding:
    rows = paper_rows().values()
    others = [p for p in rows if p.counted]
    lines = [f"{p.title}: {p.counted:,}, printed {p.parameters:,}" for p in others]
    lines.append(
        f"as printed in {len(rows) - len(others)} of {len(rows)} presets, to the last printed digit"
    )
    return Finding(lines, Outcome.UNDECIDED if others else Outcome.HOLDS, full=True)


def theorem(_: Results) -> Finding:
    error = largest_error()
    line = (
        "six layers, float64, computed for this page: at every k the sum over paths, at k = L "
        f"autograd's gradient, within {max(error, EXACT):.0e}; on many more architectures in "
        "tests/highway_bp/test_paths.py"
    )
    return Finding([line], holds_if(error <= EXACT), full=True)


def on_shapes(where: str, what: str, judge: Callable[..., tuple[str, list]]) -> Claim:
    """A claim on the paper's recurrent shapes, measured in float32, on a GPU if there is one.

    Undecided if it holds for some alone; times on a CPU decide nothing about a GPU. The setting is
    a reduced one: layers without their network, and Highway-BP's forward pass is torch.nn's.
    ``judge(paper, ms, speedup)`` returns text about a shape, and whether the claim holds there.
    """

    def on_all(results: Results) -> Finding:
        records = results.records("bench_rnn*.json").values()
        plain = [r for r in records if r.get("paper") and not r.get("tf32")]
        if not plain:
            return NOT_MEASURED
        record = min(plain, key=lambda r: "CPU" in r["environment"]["device"])
        device, lines, held = record["environment"]["device"], [], []
        for shape in record["paper"]:
            line, found = judge(paper_rows()[shape["row"]], shape["ms"], shape["speedup"])
            lines.append(f"{shape['shape']}: {line}")
            held += found
        outcome = Outcome.NOT_MEASURED if "CPU" in device else holds_for(held)
        return Finding([f"{what}, layers alone, on {device}:", *lines], outcome)

    command = "python scripts/bench_rnn.py --out results/bench_rnn_cuda.json, on a GPU"
    return Claim(where, on_all, command=command)


def speed_of_recurrence(paper: PaperRow, ms: dict, speedup: dict) -> tuple[str, list]:
    """Table 3's speed-ups over a loop of cells, and those over torch's own layer."""
    ratios = {k: ms["loop"] / ms[f"k{k}"] for k in paper.speedup}
    shown = ", ".join(
        f"k = {k}: {ratio:.1f} (paper {paper.speedup[k]:g}; over torch.nn {speedup[f'k{k}']:.2f})"
        for k, ratio in ratios.items()
    )
    return shown, [ratio >= paper.speedup[k] for k, ratio in ratios.items()]


def cost_beside_fixed_point(paper: PaperRow, ms: dict, _: dict) -> tuple[str, list]:
    """Table 6: a step of Highway-BP beside one of the fixed point at equal k, from one on."""
    table = paper.milliseconds
    ks = [k for k in table["highway"] if k and f"k{k}" in ms and f"fp{k}" in ms]
    ratios = [ms[f"k{k}"] / ms[f"fp{k}"] for k in ks]
    papers = [table["highway"][k] / table["fixed_point"][k] for k in ks]
    shown = (
        f"{min(ratios):.2f} to {max(ratios):.2f} times "
        f"(paper {min(papers):.2f} to {max(papers):.2f})"
    )
    return shown, [fmean(ratios) <= max(papers)]


def memory(results: Results) -> Finding:
    record = results.record("bench_engine")
    if record is None:
        return NOT_MEASURED
    name = "hidden_states_per_layer_above_bp_k2"
    found = {load: w["memory"][name] for load, w in record["workloads"].items()}
    lines = [f"hidden states per layer above backpropagation's peak, k = 2: {shown(found)}"]
    for record in [r for r in results.records("bench_rnn_cuda*.json").values() if "memory" in r]:
        above = {shape["shape"]: states_above(shape) for shape in record["memory"]}
        on = f"{record['environment']['device']}, {'TF32' if record.get('tf32') else 'float32'}"
        lines.append(f"per step above cuDNN's peak on {on}, k = 5: {shown(above)}")
        found |= {f"{shape}, {on}": states for shape, states in above.items()}
    return Finding(lines, holds_for([value <= 2.0 for value in found.values()]), full=True)


def shown(states: dict[str, float]) -> str:
    return "; ".join(f"{name} {value:.2f}" for name, value in states.items())


def states_above(shape: dict) -> float:
    """Hidden states per step, of one layer, by which the peak at k = 5 is above torch.nn's."""
    *_, B, L, H = map(int, re.findall(r"\d+", shape["shape"]))
    parts = 2 if shape["shape"].startswith("LSTM") else 1  # its state is (c, h)
    peak = {name: value["tensors_mb"] for name, value in shape["peak"].items()}
    return 1e6 * (peak["k5"] - peak["nn"]) / (4 * B * L * H * parts)


def shared_backward(results: Results) -> Finding:
    """The backward pass of layers on two processes beside that of one process."""
    record = results.record("bench_sharded")
    if record is None or not {"1", "2"} <= record["processes"].keys():
        return NOT_MEASURED
    one, two = (record["processes"][P]["seconds"] for P in ("1", "2"))
    ratios = {name: two[f"{name}_backward"] / one["bp_backward"] for name in ("bp", "k0", "k1")}
    line = (
        f"two processes on {record['environment']['device']}: backward pass over that of one "
        f"process: k = 0 {ratios['k0']:.2f}, k = 1, which is exact, {ratios['k1']:.2f}, "
        f"backpropagation {ratios['bp']:.2f}; not measured on GPUs"
    )
    return Finding([line], Outcome.NOT_MEASURED)
