"""Keep hooks of tensors from running while a thread solves; other threads' passes run them."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from highway_bp.asked import innermost_call

_this_thread = threading.local()  # .depth: how many `silenced` it is in, one nested in the other
_changing = threading.Lock()


class _Silenced:
    """Wraps a hook: it runs only in backward passes that other threads have called.

    The engine's own threads, which run a GPU's nodes, show no such call: there it is silent.
    """

    def __init__(self, hook: Callable):
        self.hook = hook

    def __call__(self, g: Tensor) -> Tensor | None:
        if getattr(_this_thread, "depth", 0) or innermost_call(sys._getframe()) is None:
            return None
        return self.hook(g)


@contextlib.contextmanager
def silenced(hooks: Iterable[dict | None]) -> Iterator[None]:
    """Let the hooks in these dictionaries do nothing for a while.

    Threads may silence the same hooks: each wraps them once and unwraps them once.
    """
    keys = [(of_tensor, key) for of_tensor in hooks for key in list(of_tensor or ())]
    _wrap(keys, _Silenced)
    _this_thread.depth = getattr(_this_thread, "depth", 0) + 1
    try:
        yield
    finally:
        _this_thread.depth -= 1
        _wrap(keys, lambda silent: silent.hook)


def _wrap(keys: Iterable[tuple[dict, int]], change: Callable) -> None:
    with _changing:
        for of_tensor, key in keys:
            if key in of_tensor:  # else it was removed since
                of_tensor[key] = change(of_tensor[key])
