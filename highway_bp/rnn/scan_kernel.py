"""The diagonal scan as one Triton kernel, for CUDA: u_i = v_i + scale u_{i+1} K_i (CumSumProd).

`scan.DiagonalScan` computes the same without Triton; it takes about 2 sqrt(L) kernels and keeps the
products of K. Here each program has some lanes; a lane is one element of the state in one row of
the batch. A program goes from the last step to the first, in chunks, by an associative scan.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES, WARPS = 32, 4  # per program
LONG = 512  # from so many steps on, a chunk has 128 steps, otherwise 64


@triton.jit
def _after(k_1, u_1, k_2, u_2):
    """The map u -> u_1 + k_1 u, followed by u -> u_2 + k_2 u."""
    return k_1 * k_2, u_1 * k_2 + u_2


@triton.jit(do_not_specialize=["n"])
def _scan(
    V,
    K,
    n,
    lanes,
    C,
    v_step,
    v_row,
    k_step,
    k_row,
    scale,
    SUMS: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < lanes
    row, c = lane // C, lane % C
    v_lane = V + row.to(tl.int64) * v_row + c
    k_lane = K + row.to(tl.int64) * k_row + c
    u = tl.load(v_lane + n.to(tl.int64) * v_step, mask=inside, other=0.0).to(SUMS)
    last = tl.arange(0, STEPS)[:, None] == STEPS - 1
    for start in range(0, n, STEPS):
        i = (n - 1 - start - tl.arange(0, STEPS)[:, None]).to(tl.int64)  # from later to earlier
        here = (i >= 0) & inside[None, :]
        v = tl.load(v_lane[None, :] + i * v_step, mask=here, other=0.0).to(SUMS)
        k = tl.load(k_lane[None, :] + i * k_step, mask=here, other=1.0).to(SUMS) * scale
        P, s = tl.associative_scan((k, v), 0, _after)
        s = s + P * u[None, :]
        tl.store(v_lane[None, :] + i * v_step, s, mask=here)
        u = tl.sum(tl.where(last, s, 0.0), 0)


def scan_(v: Tensor, K: Tensor, scale: float = 1.0) -> Tensor:
    """Scan v_0 .. v_n (n + 1, B, S) in place by diagonals K_0 .. K_{n-1} (n, B, C), C <= S.

    K carries the first C elements of a state; the others stay as they are. In v and K, the elements
    of a row must have stride 1; steps and rows may have any stride. The dtypes of v and K may
    differ; sums are float64 if v is, else float32. Returns v.
    """
    n, B, C = K.shape
    sums = tl.float32
    if v.dtype == torch.float64:  # number arguments of a kernel, such as scale, are float32
        K, scale, sums = K * scale, 1.0, tl.float64
    strides, steps = (*v.stride()[:2], *K.stride()[:2]), 128 if n >= LONG else 64
    grid = (triton.cdiv(B * C, LANES),)
    _scan[grid](v, K, n, B * C, C, *strides, scale, sums, steps, LANES, num_warps=WARPS)
    return v
