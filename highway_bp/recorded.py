"""What transformers' own forward hooks record inside a layer: router logits, attention weights.

The hooks append tensors to lists, and the model returns the lists. In a chain these tensors count
as results of their layer. So a loss on them needs no second run of the layer.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any


def recorded() -> dict[str, list]:
    """The lists that the hooks fill now, by kind; none if no model of transformers is running.

    Without hidden states: they are recorded outside layers, as the states of the chain.
    """
    collector = _collector()
    lists = (collector and collector.get()) or {}
    return {kind: v for kind, v in lists.items() if isinstance(v, list) and kind != "hidden_states"}


@contextlib.contextmanager
def recording(kinds: Iterable[str]) -> Iterator[None]:
    """Let the hooks fill new lists of these kinds, for `recorded`, while a layer runs again."""
    if not kinds:
        yield
        return
    collector = _collector()
    token = collector.set({kind: [] for kind in kinds})
    try:
        yield
    finally:
        collector.reset(token)


def _collector() -> Any:
    """transformers' variable that holds the lists, or None. It is private; without it, a loss on
    what is recorded makes layers run twice."""
    module = sys.modules.get("transformers.utils.output_capturing")
    return getattr(module, "_active_collector", None)
