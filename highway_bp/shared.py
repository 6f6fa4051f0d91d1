"""Memory that a layer's outputs share: in-place changes of one would change another unnoticed.

Taps detach a layer's outputs from each other and from the layer's input. So autograd does not know
that they share memory, as views do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from highway_bp.segment import Segment

Shared = list[tuple[Tensor, int]]  # with their versions


def shared_memory(segment: Segment, extras: Sequence[Tensor]) -> Shared:
    """Of the last layer's input, state and extras those that share memory with another one."""
    before = segment.states[-2] if len(segment.states) > 1 else segment.h_in
    tensors = [before, segment.h_out, *extras]
    places = [t.untyped_storage()._cdata for t in tensors if t.layout is torch.strided]
    if len(set(places)) == len(places):
        return []
    return [(t, t._version) for t in tensors]


def check_shared(shared: Shared, name: str) -> None:
    """Raise RuntimeError if one of them was changed in place since."""
    if any(t._version != version for t, version in shared):
        raise RuntimeError(
            f"{name} returned tensors that share memory with each other or with its input, and one "
            "of them was changed in place since; expected copies (clone), or Backprop()"
        )
