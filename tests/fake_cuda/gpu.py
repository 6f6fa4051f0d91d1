"""A CUDA device that computes nothing: shapes, dtypes and devices of fake tensors alone.

What stays on the CPU is computed as ever. Needs the guard of `test_fake_cuda` in its process.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).parents[2]
OURS = tuple(str(ROOT / name) for name in ("highway_bp", "models", "experiments"))
aten = torch.ops.aten
FAKE = FakeTensorMode()  # one, as constants of the device are kept from test to test
CUDNN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class FakeGPU(TorchDispatchMode):
    """While entered, torch finds one CUDA device.

    Attributes:
        waits: where the host has waited for the device since the list was emptied, one line each.
    """

    def __init__(self, cudnn: int = 91900):
        super().__init__()
        self.waits: list[str] = []
        self._cudnn = cudnn

    def __enter__(self) -> FakeGPU:
        self._patches = ExitStack()
        for name, stand_in in {
            "torch.cuda._lazy_init": lambda: None,
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.is_bf16_supported": lambda *_: True,
            "torch.cuda.device_count": lambda: 1,
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda.get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
            "torch.cuda.set_rng_state": lambda *_: None,
            "torch.cuda.max_memory_allocated": lambda *_: 0,
            "torch.backends.cudnn.version": lambda: self._cudnn,
            "torch._VF.gru": _gru,
            "torch._VF.lstm": _lstm,
            "torch.Generator": _GeneratorOnCPU,
            "highway_bp.rnn.time_system.find_spec": lambda name: None,  # no kernel of Triton
        }.items():
            self._patches.enter_context(patch(name, stand_in))
        self._patches.enter_context(patch.object(FakeTensor, "tolist", _tolist))
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
        self._patches.close()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made_there = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if not made_there and not any(isinstance(t, FakeTensor) for t in tensors):
            return op(*args, **kwargs)
        if op in READS:
            if any(t.is_cuda for t in tensors):
                self._wait("reads a number")
            return 1
        if op is aten._pack_padded_sequence.default:  # its size follows from lengths, on the CPU
            data, sizes = op(torch.empty(args[0].shape), *args[1:])
            with FAKE:
                return args[0].new_empty(data.shape), sizes
        if op in INDEXING:
            for i in (i for i in args[1] if i is not None):
                if not i.is_cuda:
                    self._wait("brings an index to the device")
                elif i.dtype in (torch.bool, torch.uint8):
                    self._wait("counts a mask")
        args, kwargs = tree_map_only(Tensor, _fake_of, (args, kwargs))
        with FAKE:
            found = op(*args, **kwargs)
        if op in COPIES:
            source, blocking = tensors[-1], not (kwargs.get("non_blocking") or args[2:3] == (True,))
            if source.is_cuda and not found.is_cuda:
                self._wait("copies to the CPU")
            elif found.is_cuda and not source.is_cuda and blocking:
                self._wait("copies to the device")
        return found

    def _wait(self, what: str) -> None:
        """Note it, by the innermost frame that is the project's."""
        frame = sys._getframe(2)
        while frame and not frame.f_code.co_filename.startswith(OURS):
            frame = frame.f_back
        place = frame.f_code.co_qualname if frame else "elsewhere"
        self.waits.append(f"{place} {what}")


def _fake_of(t: Tensor) -> Tensor:
    return t if isinstance(t, FakeTensor) else FAKE.from_tensor(t.detach())


READS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
COPIES = (aten._to_copy.default, aten.copy_.default)


class _GeneratorOnCPU(torch.Generator):
    def __new__(cls, device=None):
        return super().__new__(cls)


def _recurrent(gates: int, x: Tensor, states: tuple[Tensor, ...], weights, D: int):
    """What cuDNN asks for, and the shapes it gives; every weight has a part in them."""
    tensors = [x, *states, *weights]
    assert {t.device for t in tensors} == {x.device}
    assert len({t.dtype for t in tensors}) == 1 and x.dtype in CUDNN_DTYPES
    assert all(s.is_contiguous() for s in states)
    H = states[0].shape[-1]
    assert all(w.shape[0] == gates * H for w in weights)
    linked = sum(t.sum() for t in tensors) * 0
    output = x.new_zeros(*x.shape[:-1], D * H) + linked
    return output, *(s + linked for s in states)


def _gru(x, h, weights, bias, layers, dropout, train, bidirectional, batch_first):
    return _recurrent(3, x, (h,), weights, 1 + bidirectional)


def _lstm(x, states, weights, bias, layers, dropout, train, bidirectional, batch_first):
    return _recurrent(4, x, states, weights, 1 + bidirectional)


def _tolist(t: FakeTensor) -> list:
    """One read, however many numbers."""
    t.sum().item()
    return torch.ones(t.shape).tolist()
