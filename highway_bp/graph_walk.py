"""A walk through autograd's graph, from outputs towards leaves."""

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Edge = tuple  # (node, number of its input)


def edges_of(tensors: Iterable[Tensor]) -> list[Edge]:
    """The edges at which the graphs of tensors begin; that of a leaf has its gradient alone."""
    return [get_gradient_edge(t)[:2] for t in tensors if t.requires_grad]


def walk(edges: Iterable[Edge], stops: Callable[[Edge], bool]) -> dict[object, tuple[Edge, ...]]:
    """For each node that ``edges`` lead to, the edges that it sends gradients to.

    Args:
        stops: whether the walk leaves out the node of an edge.
    """
    graph: dict[object, tuple[Edge, ...]] = {}
    found = list(edges)
    while found:
        edge = found.pop()
        if edge[0] is not None and edge[0] not in graph and not stops(edge):
            graph[edge[0]] = edge[0].next_functions
            found += edge[0].next_functions
    return graph
