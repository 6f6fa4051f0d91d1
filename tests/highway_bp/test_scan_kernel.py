"""The Triton kernel against its naive twin, in Triton's interpreter, which needs no GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import highway_bp as hb

pytestmark = pytest.mark.slow

COMPARE = """
import torch
from highway_bp.rnn.scan_kernel import scan_
torch.manual_seed(0)
sizes = [(1, 1, 1, 1), (2, 3, 5, 5), (64, 1, 33, 33), (65, 2, 6, 3), (520, 1, 3, 3)]
kinds = [
    (1.0, torch.float32, torch.float32),
    (0.8, torch.float64, torch.float64),
    (0.8, torch.float32, torch.bfloat16),
    (0.8, torch.bfloat16, torch.float32),
]
cases = [(size, kinds[0]) for size in sizes] + [(sizes[3], kind) for kind in kinds[1:]]
for (L, B, S, C), (scale, dtype, of_K) in cases:
    v, K = torch.randn(L + 3, B, S, dtype=dtype), torch.rand(L, B, C, dtype=of_K)
    rows = K.new_zeros(L, B, C + 2)
    rows[..., :C] = K
    for given in (K, rows[..., :C]):  # in one piece, and with rows further apart
        expected = v if dtype == torch.float64 else v.float()
        expected = expected.clone()
        for i in reversed(range(L)):
            expected[i, :, :C] += scale * expected[i + 1, :, :C] * K[i]
        found = v.clone()
        scan_(found[: L + 1], given, scale)
        torch.testing.assert_close(found, expected.to(dtype))

import highway_bp as hb
from highway_bp.rnn import time_system

def gradients(rnn, x):
    rnn.zero_grad()
    rnn(x)[0].sin().sum().backward()
    return [p.grad for p in rnn.parameters()]

for kind, carry in [(hb.GRU, "gate"), (hb.LSTM, "gate"), (hb.LSTM, "diagonal")]:
    rnn = kind(3, 4, method=hb.Highway(2, 0.3), carry=carry).double()
    x, expected = torch.randn(9, 2, 3).double(), None
    for kernel in (False, True):
        time_system.has_kernel = lambda K: kernel
        found = gradients(rnn, x)
        torch.testing.assert_close(found, expected or found)
        expected = found
print("equal")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_equals_the_sequential_scan():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize("kind", [(nn.LSTM, hb.LSTM), (nn.GRU, hb.GRU)])
@pytest.mark.parametrize("method", [hb.Highway(2), hb.Highway(1, group_size=3)])
def test_torchs_kernels_are_given_what_cudnn_takes(monkeypatch, kind, method):
    """States in one piece, and all of one dtype: bfloat16 here, whose sums are float32."""
    name = kind[1].__name__.lower()
    library, calls = getattr(torch._VF, name), []

    def checked(x, hx, weights, *rest):
        states = hx if isinstance(hx, tuple) else (hx,)
        assert all(s.is_contiguous() for s in states)
        assert {x.dtype, *(t.dtype for t in (*states, *weights))} == {torch.bfloat16}
        calls.append(len(x))
        wide = tuple(s.float() for s in states)
        found = library(
            x.float(), wide if name == "lstm" else wide[0], [w.float() for w in weights], *rest
        )
        return [t.bfloat16() for t in found]

    monkeypatch.setattr(torch._VF, name, checked)
    rnn = kind[1](4, 5, method=method).bfloat16()
    rnn(torch.randn(7, 2, 4).bfloat16())[0].float().square().sum().backward()
    assert calls and rnn.weight_hh_l0.grad.isfinite().all()
