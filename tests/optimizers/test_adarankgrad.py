"""AdaRankGrad: the contract of projected optimizers, then its rank, its criterion and its carried moments."""

from typing import Any

import pytest
import torch
from torch import nn

from rankwise.optimizers import AdaRankGrad
from rankwise.optimizers.base_rules import SGD
from rankwise.optimizers.projected import ProjectedOptimizer
from rankwise.spectral import rank_for_energy
from rankwise.testing.projected_contract import ProjectedContract
from tests.spectral.planted import planted

F64 = torch.float64


class AdaRankSGD(AdaRankGrad):
    """The policy over plain gradient descent, which the tests have an oracle for."""

    rule = SGD()

    def __init__(self, params: Any, **settings: Any):
        policy = {
            "lr": 0.1,
            "weight_decay": 0.0,
            "momentum": 0.0,
            "nesterov": False,
            "converged": 0.5,
            "refresh_every": 3,
        }
        ProjectedOptimizer.__init__(self, params, {**policy, "moments": "rotate", "energy": 1 - 1e-15}, settings)


class TestContract(ProjectedContract):
    moments = "rotate"

    def make_optimizer(self, params: Any, **changes: Any) -> AdaRankGrad:
        settings = {"lr": 0.05, "weight_decay": 0.01, "rank": 2, "refresh_every": 3, "energy": 0.8, "converged": 0.6}
        return AdaRankGrad(params, **{**settings, "moments": self.moments, **changes})

    def make_sgd(self, params: Any, **changes: Any) -> AdaRankSGD:
        return AdaRankSGD(params, **{"rank": 2, "lr": 0.05, **changes})


class TestContractWithFreshMoments(TestContract):
    moments = "reset"


def step(optimizer: AdaRankGrad, W: nn.Parameter, G: torch.Tensor) -> int:
    W.grad = G
    optimizer.step()
    return optimizer.ranks()[0]


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_the_rank_is_the_smallest_that_holds_the_energy(shape: tuple[int, int], energy: float) -> None:
    G = planted(*shape, [2.0**-k for k in range(20)]).matrix
    W = nn.Parameter(torch.zeros(shape, dtype=F64))
    assert step(AdaRankGrad([W], rank=20, energy=energy), W, G) == rank_for_energy(G, energy)


def test_the_range_finder_grows_until_it_holds_enough() -> None:
    """A flat spectrum of 70 directions, of which the first guess sees 16: and from a rank of 1 it grows as well."""
    flat, single = planted(90, 120, [1.0] * 70).matrix, planted(90, 120, [1.0], seed=3).matrix
    W = nn.Parameter(torch.zeros(90, 120, dtype=F64))
    optimizer = AdaRankGrad([W], rank=80, energy=0.95, refresh_every=1)
    assert step(optimizer, W, flat) in (67, 68), "0.95·70 = 66.5, and the cut to 67 of equal energies is rounding's"
    assert step(optimizer, W, single) == 1
    assert step(optimizer, W, flat) in (67, 68)
    assert step(AdaRankGrad([W], rank=30, energy=0.95), W, flat) == 30, "the group's rank is the most"


@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_out_is_at_most_what_the_threshold_allows(seed: int) -> None:
    G = torch.randn(50, 70, dtype=F64, generator=torch.Generator().manual_seed(seed))
    W = nn.Parameter(torch.zeros(50, 70, dtype=F64))
    optimizer = AdaRankGrad([W], rank=50, energy=0.7)
    rank = step(optimizer, W, G)
    P = optimizer.state[W]["basis"]
    assert (G - P @ (P.mT @ G)).square().sum() <= 0.3 * G.square().sum()
    assert rank_for_energy(G, 0.7) <= rank < rank_for_energy(G, 0.7) + 5


def test_a_subspace_is_left_when_its_gradient_has_fallen_to_the_share_and_not_before() -> None:
    """‖R‖ halves at every step: smoothed by 0.9 it is ½ of the first after n with 0.9ⁿ + 0.1·Σ 0.9^(n−k)·2^(−k) ≤ ½."""
    G = planted(20, 30, [1.0, 0.5]).matrix
    W = nn.Parameter(torch.zeros(20, 30, dtype=F64))
    optimizer = AdaRankGrad([W], rank=2, converged=0.5, refresh_every=1000)
    smoothed, expected = 1.0, None
    for number in range(30):
        if number:
            smoothed = 0.9 * smoothed + 0.1 * 2.0**-number
        step(optimizer, W, G * 2.0**-number)
        if expected is None and smoothed <= 0.5:
            expected = number
            assert optimizer.state[W]["due"], "the next gradient gives a new subspace"
            break
        assert optimizer.state[W]["refreshes"] == 1
        assert not optimizer.state[W]["due"]
    assert expected == 8
    step(optimizer, W, planted(20, 30, [1.0], seed=5).matrix)
    assert optimizer.state[W]["refreshes"] == 2


def test_moments_are_carried_over_and_grow_and_shrink_with_the_rank() -> None:
    first, second = planted(20, 30, [1.0, 0.9, 0.8]), planted(20, 30, [1.0], seed=7)
    mixed = first.matrix + 3 * second.matrix
    W = nn.Parameter(torch.zeros(20, 30, dtype=F64))
    optimizer = AdaRankGrad([W], betas=(0.9, 0.99), rank=6, energy=0.999, refresh_every=1)
    step(optimizer, W, first.matrix)
    old = {name: optimizer.state[W][name].clone() for name in ("basis", "momentum", "second_moment")}
    assert old["momentum"].shape == (3, 30)
    step(optimizer, W, mixed)
    state = optimizer.state[W]
    assert state["momentum"].shape == (4, 30)
    P, R = state["basis"], state["basis"].mT @ mixed
    # in the full space: the old momentum is projected, and the new gradient joins
    full = 0.9 * P @ P.mT @ old["basis"] @ old["momentum"] + 0.1 * P @ P.mT @ mixed
    assert torch.allclose(P @ state["momentum"], full, rtol=0, atol=1e-12)
    assert torch.allclose(P @ P.mT @ old["basis"], old["basis"], atol=1e-7), "the new subspace holds the old one"
    C = P.mT @ old["basis"]
    carried = C.square() @ old["second_moment"]
    assert (state["second_moment"] >= 0.99 * carried + 0.01 * R.square() - 1e-12).all()
    assert step(optimizer, W, second.matrix) == 1
    assert optimizer.state[W]["momentum"].shape == (1, 30)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"energy": 1.0}, "energy is a share"),
        ({"energy": 0.0}, "energy is a share"),
        ({"converged": 1.5}, "converged is a share"),
        ({"energy": float("nan")}, "energy is a share"),
        ({"refresh_every": 0}, "counts updates from 1"),
        ({"refresh_every": None}, "counts updates from 1"),
        ({"refresh_every": 1.5}, "counts updates from 1"),
        ({"moments": "keep"}, "rank changes"),
        ({"refresh_bellow": 0.5}, "no setting refresh_bellow"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        AdaRankGrad([nn.Parameter(torch.zeros(4, 4))], rank=2, **settings)
