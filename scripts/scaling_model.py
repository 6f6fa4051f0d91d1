"""Predicted time of a training step of layers spread over P devices, by strategy.

Costs are seconds of one layer for the whole batch; a stage is L / P layers. All strategies compute
the same forward pass. Highway-BP's gradient is approximate below k = P - 1, those of the others are
exact; data parallelism needs a batch of at least P examples, the others need P <= L.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2


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


def model_parallel(net: Network, P: int, link: Link) -> float:
    """Backpropagation, one stage after the other."""
    return net.step + 2 * (P - 1) * link.message(net.state)


def pipeline(net: Network, P: int, link: Link, micro: int) -> float:
    """GPipe and 1F1B, which takes as long with less memory: ``micro`` micro-batches."""
    slots = (micro + P - 1) / micro
    return slots * net.step / P + 2 * (P - 1) * link.message(net.state / micro)


def zero_bubble(net: Network, P: int, link: Link, micro: int) -> float:
    """ZB-H1 (Qi et al. 2023): gradients of parameters fill a part of 1F1B's bubble."""
    l = net.L / P  # noqa: E741  the paper's layers per stage
    bubble = max(0.0, (P - 1) * l * (net.forward + net.inputs - net.parameters) / micro)
    return net.step / P + bubble + 2 * (P - 1) * link.message(net.state / micro)


def data_parallel(net: Network, P: int, link: Link) -> float:
    """All layers on every device, the batch shared out; a ring sums gradients meanwhile."""
    ring = 2 * (P - 1) * link.latency + 2 * (P - 1) / P * net.L * net.weights / link.bandwidth
    backward = net.L * (net.inputs + net.parameters) / P
    return net.L * net.forward / P + max(backward, ring)


def highway(net: Network, P: int, link: Link, k: int, micro: int = 1) -> float:
    """Highway-BP with one group per device; the forward pass in ``micro`` micro-batches.

    Every iteration is one pass through a stage's inputs, a message to the neighbour, and a scan;
    the last pass also forms the gradients of the stage's parameters, of the first layer's too,
    which come after most of its w J.
    """
    l = net.L / P  # noqa: E741
    forward = (micro + P - 1) / micro * l * net.forward + (P - 1) * link.message(net.state / micro)
    if P == 1:
        return net.step
    iteration = l * net.inputs + link.message(net.state) + scan(net, P, link)
    last = l * (net.inputs + net.parameters)
    return forward + scan(net, P, link) + min(k, P - 1) * iteration + last


def scan(net: Network, P: int, link: Link) -> float:
    """The cheaper of log2 P rounds and of one collective."""
    rounds = ceil(log2(P))
    doubling = rounds * (link.message(net.state) + net.carry)
    gathered = rounds * link.latency + (P - 1) * (net.state / link.bandwidth + net.carry)
    return min(doubling, gathered)


STRATEGIES: dict[str, Callable[[Network, int, Link, int], float]] = {
    "model parallel": lambda net, P, link, micro: model_parallel(net, P, link),
    "GPipe, 1F1B": pipeline,
    "zero bubble (ZB-H1)": zero_bubble,
    "data parallel": lambda net, P, link, micro: data_parallel(net, P, link),
    "Highway k=0": lambda net, P, link, micro: highway(net, P, link, 0),
    "Highway k=1": lambda net, P, link, micro: highway(net, P, link, 1),
    "Highway k=0, pipelined forward": lambda net, P, link, micro: highway(net, P, link, 0, micro),
    "Highway k=1, pipelined forward": lambda net, P, link, micro: highway(net, P, link, 1, micro),
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
        L=layers, forward=forward, inputs=(products + 2 * attention) / flops,
        parameters=products / flops, state=2.0 * tokens * width, weights=2.0 * 12 * width**2,
        batch=batch,
    )  # fmt: skip
