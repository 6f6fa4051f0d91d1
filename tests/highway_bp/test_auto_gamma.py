"""gamma="auto" against its definition and against the sum over paths."""

import copy

import pytest
import torch

import highway_bp as hb
from highway_bp.auto_gamma import smallest_block
from tests.highway_bp import oracle, test_paths
from tests.highway_bp.architectures import build


@test_paths.every_architecture
@pytest.mark.parametrize("k", [0, 1, 3])
def test_gradients_are_the_path_sum_with_the_estimated_gammas(name, k):
    known = test_paths.reference(name)
    method = hb.Highway(min(k, known.L), gamma="auto")
    chain, found = test_paths.chain_and_gradients(name, method, "all")
    gammas = list(chain.gammas.values.values())
    J = [None, *(J + g * K for g, J, K in zip(gammas, known.J[1:], known.K[1:], strict=True))]
    K = [None, *((1 - g) * K for g, K in zip(gammas, known.K[1:], strict=True))]
    wanted = known.gradients(oracle.highway(J, K, known.b["all"], min(k, known.L)))
    assert len(gammas) == known.L
    for g, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, w.reshape(g.shape), rtol=1e-9, atol=1e-9)


def test_the_estimate_is_the_scalar_that_leaves_the_smallest_block():
    torch.manual_seed(0)
    J, K = torch.randn(8, 6).double(), torch.randn(8, 6).double()
    J -= 0.7 * K
    like, generator = torch.zeros(8).double(), torch.Generator().manual_seed(0)
    found = smallest_block(lambda z: z @ J, lambda z: z @ K, like, 20_000, generator)
    exact = -(J * K).sum() / (K * K).sum()
    assert found == pytest.approx(exact.item(), abs=0.03)
    norms = [(J + g * K).norm() for g in (exact - 0.1, exact, exact + 0.1)]
    assert norms[1] < min(norms[0], norms[2])


def trained_twice(chain, x, times):
    seen = []
    for _ in range(times):
        chain(x).square().sum().backward()
        seen.append(list(chain.gammas.values.values()))
        with torch.no_grad():
            for p in chain.parameters():
                p.mul_(1.1)
    return seen


def test_estimates_are_refreshed_at_the_interval_and_kept_in_between():
    torch.manual_seed(0)
    a = build("scalar")
    chain = hb.ResidualChain(a.layers, hb.Highway(1, gamma=hb.AutoGamma(probes=2, every=3)))
    before = torch.get_rng_state()
    seen = trained_twice(chain, a.x, 7)
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4] == seen[5] != seen[6]
    assert torch.equal(before, torch.get_rng_state())


def test_the_state_of_a_method_goes_into_a_checkpoint_and_back():
    a = build("scalar")
    method = hb.Highway(1, gamma=hb.AutoGamma(every=3))
    chain = hb.ResidualChain(a.layers, method)
    trained_twice(chain, a.x, 2)
    again = copy.deepcopy(chain)
    again.gammas.reset()
    hb.load_method_state(again, hb.method_state(chain))
    assert trained_twice(chain, a.x, 5) == trained_twice(again, a.x, 5)
    with pytest.raises(ValueError, match="state of 0 chains; expected 1"):
        hb.load_method_state(chain, [])
