"""The norm of a linear map of which only products w M are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 32  # of Lanczos per norm
FAILURE = 1e-6  # chance that a norm comes out too small
PROBES = 4
LinearMap = Callable[[Tensor], Tensor]  # w -> w M, from the shape of h_out to that of h_in


def spectral_norm(product: LinearMap, like: Tensor, generator: torch.Generator) -> float:
    """At least ||M|| (but for the chance `FAILURE`): Lanczos on M M^T from a random start.

    Lanczos gives a value from below. With n elements and s steps it misses more than the share e
    of ||M||^2 with a probability of at most 1.648 sqrt(n) exp(-(2 s - 1) sqrt(e)) (Kuczynski and
    Wozniakowski 1992): the value is raised by the e for which this is `FAILURE`.

    Args:
        product: w -> w M, differentiable in w, which gives the transposed product.
        like: has the shape, dtype and device of w.

    Raises:
        ValueError: w M cannot be differentiated in w.
    """
    transposed, eps = _transposed(product, like), torch.finfo(like.dtype).eps
    w = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    w, before, beta = w / norm(w), torch.zeros_like(w), 0.0
    alphas, betas = [], []  # diagonal of M M^T in Lanczos' basis, and beside it
    for _ in range(min(STEPS, like.numel())):
        wM = product(w)
        wMM = transposed(wM)
        alphas.append(torch.sum(wMM.double() * w.double()).item())
        if not math.isclose(alphas[-1], norm(wM) ** 2, rel_tol=1e-3 + 4 * eps, abs_tol=1e-30):
            raise ValueError(NOT_DIFFERENTIABLE)
        rest = wMM - alphas[-1] * w - beta * before
        beta = norm(rest)
        betas.append(beta)
        if beta <= 10 * eps * max(alphas):
            return _root_of_largest(alphas, betas)  # there is no other direction left
        before, w = w, rest / beta
    found, steps = _root_of_largest(alphas, betas), len(alphas)
    if steps == like.numel():
        return found
    missed = (math.log(1.648 * math.sqrt(like.numel()) / FAILURE) / (2 * steps - 1)) ** 2
    return found / math.sqrt(1 - missed)


NOT_DIFFERENTIABLE = (
    "the product of a cotangent with a block or carry cannot be differentiated in the cotangent; "
    "expected layers and carries of plain torch operations, neither compiled nor custom functions"
)


def _transposed(product: LinearMap, like: Tensor) -> LinearMap:
    """v -> v M^T, by differentiating w -> w M, which is linear."""
    try:
        with torch.enable_grad():
            w = torch.zeros_like(like).requires_grad_()
            wM = product(w)
    except RuntimeError as error:
        raise ValueError(NOT_DIFFERENTIABLE) from error

    def transposed(v: Tensor) -> Tensor:
        if not wM.requires_grad:
            return torch.zeros_like(like)
        try:
            (vM,) = torch.autograd.grad(wM, w, v, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise ValueError(NOT_DIFFERENTIABLE) from error
        return torch.zeros_like(like) if vM is None else vM

    return transposed


def _root_of_largest(alphas: list[float], betas: list[float]) -> float:
    """sqrt of the largest eigenvalue of the tridiagonal matrix."""
    off = torch.tensor(betas[:-1], dtype=torch.float64)
    T = torch.diag(torch.tensor(alphas, dtype=torch.float64)) + off.diag(1) + off.diag(-1)
    return math.sqrt(max(torch.linalg.eigvalsh(T)[-1].item(), 0.0))


def gain(product: LinearMap, like: Tensor, generator: torch.Generator) -> float:
    """||M||_F / sqrt(n): the root mean square of ||z M|| / ||z|| over random signs z."""
    square = 0.0
    for _ in range(PROBES):
        z = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
        square += norm(product((2 * z - 1).to(like.dtype))) ** 2 / like.numel()
    return math.sqrt(square / PROBES)


def norm(t: Tensor | None) -> float:
    return 0.0 if t is None else torch.linalg.vector_norm(t.detach(), dtype=torch.float64).item()
