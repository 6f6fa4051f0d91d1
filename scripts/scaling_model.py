"""Predicted time of a training step of layers spread over P devices, by strategy.

Costs are seconds of one layer for the whole batch, in the pieces that a strategy cuts it into; a
stage is L / P layers. All strategies compute the same forward pass. Highway-BP's gradient is
approximate below k = P - 1, those of the others are exact; data parallelism needs a batch of at
least P examples, the others need P <= L.

``cores`` is how many processes' work a machine does at once that all P of them share; None gives
every device its own, and messages that need none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, inf, log2


@dataclass(frozen=True)
class Link:
    """A message of n bytes takes latency + n / bandwidth (seconds, bytes per second)."""

    latency: float
    bandwidth: float

    def message(self, size: float) -> float:
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Network:
    """L equal layers on one batch.

    Attributes:
        forward, inputs, parameters: seconds of a layer's forward pass, of w J, and of the gradient
            of its parameters.
        carry: seconds of w K; 0 for the identity.
        state, weights: bytes of a state h of the whole batch, and of a layer's parameters.
        batch: examples.
    """

    L: int
    forward: float
    inputs: float
    parameters: float
    state: float
    weights: float
    batch: int
    carry: float = 0.0

    @property
    def step(self) -> float:
        """On one device."""
        return self.L * (self.forward + self.inputs + self.parameters)


Strategy = Callable[[Network, int, Link, int], float]  # seconds of a step on P devices


def stretch(active: int, cores: float | None) -> float:
    """How many times longer ``active`` processes take that work at once."""
    return 1.0 if cores is None else max(1.0, active / cores)


def slots(P: int, micro: int, cores: float | None) -> float:
    """Time for micro-batches to follow one another through P stages; a stage takes one at once.

    In slot t the stages s with 0 <= t - s < micro are at work.
    """
    return sum(
        stretch(min(t + 1, P, micro, micro + P - 1 - t), cores) for t in range(micro + P - 1)
    )


def model_parallel(net: Network, P: int, link: Link) -> float:
    """Backpropagation, one stage after the other."""
    return net.step + 2 * (P - 1) * link.message(net.state)


def pipeline(net: Network, P: int, link: Link, micro: int, cores: float | None = None) -> float:
    """GPipe and 1F1B, which takes as long with less memory: ``micro`` micro-batches.

    GPipe's are all forward slots, then all backward ones. 1F1B keeps as many stages at work.
    """
    messages = 2 * (P - 1) * link.message(net.state / micro)
    return slots(P, micro, cores) * net.step / P / micro + messages


def zero_bubble(net: Network, P: int, link: Link, micro: int) -> float:
    """ZB-H1 (Qi et al. 2023): gradients of parameters fill a part of 1F1B's bubble."""
    l = net.L / P  # noqa: E741  the paper's layers per stage
    bubble = max(0.0, (P - 1) * l * (net.forward + net.inputs - net.parameters) / micro)
    return net.step / P + bubble + 2 * (P - 1) * link.message(net.state / micro)


def data_parallel(net: Network, P: int, link: Link, cores: float | None = None) -> float:
    """All layers on every device, the batch shared out; a ring sums gradients.

    Meanwhile devices compute; cores that share a machine move the messages themselves.
    """
    ring = 2 * (P - 1) * link.latency + 2 * (P - 1) / P * net.L * net.weights / link.bandwidth
    forward, backward = net.L * net.forward / P, net.L * (net.inputs + net.parameters) / P
    if cores is None:
        return forward + max(backward, ring)
    return stretch(P, cores) * (forward + backward + ring)


def highway(
    net: Network, P: int, link: Link, k: int, micro: int = 1, cores: float | None = None
) -> float:
    """Highway-BP with one group per device; everything in ``micro`` micro-batches.

    Every iteration is one pass through a stage's inputs, a message to the neighbour, and a scan;
    iteration m leaves out the last m states, which are exact already. The gradient at the input
    is not formed.
    """
    passes = sum(
        net.L / P * net.inputs * stretch(P - 1 - m, cores)
        + link.message(net.state / micro)
        + scan(net, P, link)
        for m in range(min(k, P - 1))
    )
    ends = forward_pass(net, P, link, micro, cores) + last_pass(net, P, cores)
    return ends + inner_losses(net, P, link) + scan(net, P, link) + passes


def sharded_backprop(
    net: Network, P: int, link: Link, micro: int = 1, cores: float | None = None
) -> float:
    """Backpropagation through the states; a stage that has handed its w on does its last pass.

    The first pass through a stage is alone on the machine, all else shares it.
    """
    once, last = net.L / P * net.inputs, last_pass(net, P, None)
    in_turn = (P - 1) * once + last
    shared = once + ((P - 2) * once + P * last) / (cores or inf)
    messages = (P - 1) * link.message(net.state / micro) + inner_losses(net, P, link)
    return forward_pass(net, P, link, micro, cores) + max(in_turn, shared) + messages


def forward_pass(net: Network, P: int, link: Link, micro: int, cores: float | None) -> float:
    """Through all stages; every device then gets the last state, to compute the loss from it."""
    through = slots(P, micro, cores) * net.L / P * net.forward / micro
    messages = (P - 1) * link.message(net.state / micro)
    broadcast = ceil(log2(P)) * link.latency + (net.state / link.bandwidth if P > 1 else 0.0)
    return through + messages + broadcast


def last_pass(net: Network, P: int, cores: float | None) -> float:
    """Gradients of a stage's parameters from w at its end, through the inputs of its layers.

    Of all of them: the first layer's parameters, too, come after most of its w J.
    """
    return net.L / P * (net.inputs + net.parameters) * stretch(P, cores)


def inner_losses(net: Network, P: int, link: Link) -> float:
    """Cotangents of states inside a stage, here zero, go to the stage before."""
    return link.message(net.state) if P > 1 else 0.0


def scan(net: Network, P: int, link: Link) -> float:
    """The cheaper of log2 P rounds and of one collective."""
    rounds = ceil(log2(P))
    doubling = rounds * (link.message(net.state) + net.carry)
    gathered = rounds * link.latency + (P - 1) * (net.state / link.bandwidth + net.carry)
    return min(doubling, gathered)


def replicated(seconds: Strategy, net: Network, P: int, D: int, link: Link, micro: int) -> float:
    """A strategy in ``D`` replicas on P / D devices each, with 1 / D of the batch.

    The gradients of a stage are summed by a ring, while it goes backwards. The slowest stage has
    L D / P layers, rounded up.
    """
    stages = P // D
    l = ceil(net.L / stages)  # noqa: E741
    part = replace(
        net,
        L=stages * l,
        batch=net.batch // D,
        state=net.state / D,
        forward=net.forward / D,
        inputs=net.inputs / D,
        parameters=net.parameters / D,
    )
    ring = 2 * (D - 1) * link.latency + 2 * (D - 1) / D * l * net.weights / link.bandwidth
    return max(seconds(part, stages, link, micro), l * part.forward + ring)


STRATEGIES: dict[str, Strategy] = {
    "model parallel": lambda net, P, link, micro: model_parallel(net, P, link),
    "GPipe, 1F1B": pipeline,
    "zero bubble (ZB-H1)": zero_bubble,
    "Highway k=0": lambda net, P, link, micro: highway(net, P, link, 0),
    "Highway k=1": lambda net, P, link, micro: highway(net, P, link, 1),
    "Highway k=0, micro-batches": lambda net, P, link, micro: highway(net, P, link, 0, micro),
    "Highway k=1, micro-batches": lambda net, P, link, micro: highway(net, P, link, 1, micro),
}


def transformer(layers: int, width: int, length: int, batch: int, flops: float) -> Network:
    """A decoder's layers on a device that does ``flops`` per second, bfloat16 states.

    A layer of width d has 12 d^2 parameters; attention adds 2 s d multiplications per token each
    way. Embedding and classifier are left out.
    """
    tokens = batch * length
    products = 2 * 12 * width**2 * tokens
    attention = 2 * 2 * length * width * tokens
    forward = (products + attention) / flops
    return Network(
        L=layers,
        forward=forward,
        inputs=(products + 2 * attention) / flops,
        parameters=products / flops,
        state=2.0 * tokens * width,
        weights=2.0 * 12 * width**2,
        batch=batch,
    )
