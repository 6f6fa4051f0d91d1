"""What the running call of `torch.autograd.grad` or ``backward()`` was given: losses and inputs.

Autograd shows a node neither. A chain needs both: the gradient of an input is given out before the
node behind it runs, and paths from the losses that lead to no input are not run at all. So they are
read from the Python frame of the call; calls from C++ have none.
"""

import itertools
import sys
import threading
from collections.abc import Callable
from types import FrameType

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from highway_bp.graph_walk import Edge, walk

SPLIT = "stage_backward_input", "_autograd_grad_for_inputs"  # of torch.distributed.pipelining


def asked_for() -> list[Edge] | None:
    """The edges of the tensors whose gradients were asked for; [] for all leaves. None: no call was
    found."""
    calls = _calls()
    # inputs may be a generator that has run out
    return _edges(calls, "inputs", "inputs_tuple") if calls else None


def edges_of_losses(of: Callable[[object], bool] = lambda node: True) -> dict[Edge, None]:
    """The edges at which the losses' graph begins, and those of its nodes with ``of(node)``."""
    begin = _edges(_calls(), "outputs", "tensors")
    graph = walk(begin, lambda edge: False)
    edges = (edges for node, edges in graph.items() if of(node))
    return dict.fromkeys(itertools.chain(begin, *edges))


def is_split() -> bool:
    """Whether torch's zero-bubble pipeline asks for the gradients of inputs alone.

    It asks for those of weights later, from the nodes that have had a gradient: a Gate has none.
    """
    callers = (call.f_back for call in _calls())
    return any(frame and frame.f_code.co_name in SPLIT for frame in callers)


def _calls() -> list[FrameType]:
    """The innermost call of this thread. A GPU's nodes run in a thread of the engine: then those of
    all threads."""
    frames = sys._current_frames()
    own = innermost_call(frames.pop(threading.get_ident()))
    return [own] if own else [call for f in frames.values() if (call := innermost_call(f))]


def innermost_call(frame: FrameType | None) -> FrameType | None:
    while frame is not None:
        name = frame.f_code.co_name
        if name in ("grad", "backward") and frame.f_globals.get("__name__") == "torch.autograd":
            return frame
        frame = frame.f_back
    return None


def _edges(calls: list[FrameType], *names: str) -> list[Edge]:
    given = [call.f_locals.get(name) for call in calls for name in names]
    found = pytree.tree_leaves(given, is_leaf=lambda t: isinstance(t, GradientEdge))
    wanted = [t for t in found if isinstance(t, GradientEdge) or _wants_gradient(t)]
    edges = (get_gradient_edge(t) if isinstance(t, Tensor) else t for t in wanted)
    return [(edge.node, edge.output_nr) for edge in edges]


def _wants_gradient(t: object) -> bool:
    return isinstance(t, Tensor) and t.requires_grad
