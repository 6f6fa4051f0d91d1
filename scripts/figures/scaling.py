"""Layers on several devices: measured steps beside a performance model, and what it predicts.

The left panel compares the model with scripts/bench_sharded.py's steps on processes of one machine.
The right panel is a prediction for GPUs, not a measurement. There are L layers, P devices and M
micro-batches. A layer takes f seconds for its forward pass, i for w J and p for its parameter
gradients; a message of a state takes m seconds, one of a layer's weights s. A step takes

    model parallelism   L (f + i + p) + 2 (P - 1) m
    GPipe, 1F1B         (M + P - 1) / M  L / P (f + i + p) + 2 (P - 1) m / M
    data parallelism    L / P (f + i + p) + 2 (P - 1) / P  L s
    Highway-BP at k     L f + L / P (i + p) + k L / P i + (P + k) m       (Eq. 13, in P groups)

With its forward pass in micro-batches, Highway-BP takes (M + P - 1) / M  L / P f instead of L f.
Processes that share a core work in turn. Memory, tensor parallelism and replicas are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes

from scripts.evidence.results import Results
from scripts.figures.panels import Drawing, caption, footer, gap, panels

GPU = 0.4 * 989e12  # bfloat16 operations per second of an H100, 40 % of its peak
LATENCY, BANDWIDTH = 5e-6, 450e9  # NVLink: seconds, bytes per second in one direction
DECODER = "7B decoder (32 layers, width 4096), 8 sequences of 4096"
STYLES = {  # colour, line, and the name in the record of measured steps
    "model parallel": ("black", ":", "model_parallel"),
    "GPipe, 1F1B": ("#E69F00", "--", "1f1b"),
    "data parallel": ("#009E73", "-.", "data_parallel"),
    "Highway k=0": ("#56B4E9", ":", "k0"),
    "Highway k=1": ("#0072B2", ":", "k1"),
    "Highway k=0, micro-batches": ("#56B4E9", "-", "k0_micro"),
    "Highway k=1, micro-batches": ("#0072B2", "-", "k1_micro"),
}


@dataclass(frozen=True)
class Costs:
    """The model's inputs: seconds of a layer's passes on the whole batch, and of messages.

    crowd: how many processes share a core.
    """

    L: int
    forward: float
    inputs: float
    parameters: float
    message: float
    weights: float
    crowd: float = 1.0

    @property
    def step(self) -> float:
        """Seconds of a step on one device."""
        return self.L * (self.forward + self.inputs + self.parameters)


def seconds(c: Costs, P: int, M: int) -> dict[str, float]:
    """Seconds of a step on P devices in M micro-batches, by strategy."""
    pipe = max((M + P - 1) / M, c.crowd)  # stages that wait for each other share a core for free
    found = {
        "model parallel": c.step + 2 * (P - 1) * c.message,
        "GPipe, 1F1B": pipe * c.step / P + 2 * (P - 1) * c.message / M,
        "data parallel": c.crowd * (c.step / P + 2 * (P - 1) / P * c.L * c.weights),
    }
    share = c.crowd * c.L / P
    for k in (0, 1):
        backward = share * (c.inputs + c.parameters) + k * share * c.inputs + (P + k) * c.message
        found[f"Highway k={k}"] = c.L * c.forward + backward
        found[f"Highway k={k}, micro-batches"] = pipe * c.L / P * c.forward + backward
    return found


def measured_costs(record: Mapping, P: int) -> Costs:
    costs = record["processes"][str(P)]["costs"]
    forward, inputs, backward = (costs[f"whole_{n}"] for n in ("forward", "inputs", "backward"))
    message, crowd = costs["exchange"], max(1.0, P / record["cores"])
    weights = message * record["weight_bytes"] / record["state_bytes"]
    return Costs(record["layers"], forward, inputs, backward - inputs, message, weights, crowd)


def predicted_costs(width: int = 4096, layers: int = 32, length: int = 4096, B: int = 8) -> Costs:
    """A decoder on GPUs: 12 width^2 parameters a layer, attention over ``length`` tokens."""
    tokens = B * length
    products, attention = 24 * width**2 * tokens, 4 * length * width * tokens
    message = LATENCY + 2 * tokens * width / BANDWIDTH
    times = (products + attention, products + 2 * attention, products)
    return Costs(layers, *(t / GPU for t in times), message, 24 * width**2 / BANDWIDTH)


def draw_measured(axes: Axes, record: Mapping) -> list[float]:
    """Draw measured (bars) and predicted (circles) seconds; return predicted over measured."""
    ratios, group = [], len(STYLES) + 2
    processes = [int(P) for P in record["processes"] if P != "1"]
    for place, P in enumerate(processes):
        predicted = seconds(measured_costs(record, P), P, record["micro_batches"])
        measured = record["processes"][str(P)]["seconds"]
        for x, (name, (colour, _, known)) in enumerate(STYLES.items(), start=place * group):
            found = measured[f"{known}_step"]
            axes.bar(x, found, color=colour, width=0.7, alpha=0.7)
            axes.plot(x, predicted[name], "o", mfc="white", mec="0.2", ms=5, zorder=3)
            ratios.append(predicted[name] / found)
    middles = [place * group + len(STYLES) / 2 for place in range(len(processes))]
    axes.set_xticks(middles, [f"{P} processes" for P in processes])
    axes.set_ylabel("seconds of a step")
    return ratios


def draw_predicted(axes: Axes) -> None:
    costs, Ps = predicted_costs(), (2, 4, 8, 16, 32)
    found = {P: seconds(costs, P, 8) for P in Ps}
    for name, (colour, line, _) in STYLES.items():
        # 8 sequences can be shared among at most 8 devices
        known = [P for P in Ps if name != "data parallel" or P <= 8]
        faster = [costs.step / found[P][name] for P in known]
        axes.plot(known, faster, line, color=colour, marker=".", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(Ps, Ps)
    axes.set_yticks((1, 2, 4, 8, 16), (1, 2, 4, 8, 16))
    axes.set_xlabel("devices P")
    axes.set_ylabel("times faster than one device")


def draw(results: Results) -> Drawing:
    record = results.record("bench_sharded")
    figure, (left, right) = panels(1, 2, 3.2, "Layers on several devices")
    notes = ["bars: measured; circles: the model, from the costs of layers and messages"]
    if record is None or record["processes"].keys() <= {"1"}:
        caption(left, "Measured", [])
        gap(left, "not measured\n\nmake bench")
    else:
        ratios = draw_measured(left, record)
        caption(left, "Measured", [f"{record['layers']} sublayers of width {record['width']}, CPU"])
        notes.append(f"predicted over measured: {min(ratios):.2f} to {max(ratios):.2f}")
    draw_predicted(right)
    caption(right, "Predicted, not measured", [DECODER, "H100, NVLink, 8 micro-batches"])
    footer(figure, [right], notes)
    return Drawing(figure)
