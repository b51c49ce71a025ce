"""DESIGN §4, "Which optimizers keep compression exact", line by line; the step rules are written out here."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rankwise.factorizations import (
    CompressedDeepLinear,
    DeepLinear,
    SquaredLoss,
    fit_factorization,
    invariant_bases,
    invariant_blocks,
    rho_trajectory,
    trajectory_error,
)
from rankwise.optimizers import EquivariantAdam
from tests.properties.plain_descent import Step, heavy_ball, product, trajectory
from tests.spectral.planted import planted

F64 = torch.float64
WIDTH, RANK, DEPTH = 40, 2, 3
TARGET = planted(WIDTH, WIDTH, [1.0, 0.6], seed=3).matrix


def adam_kind(
    lr: float,
    second_moment: Callable[[Tensor], Tensor],
    *,
    decay: float = 0.0,
    coupled: bool = False,
    eps: float = 1e-8,
) -> Step:
    """Adam with β = (.9, .999) and any second moment; decay inside the gradient or beside it."""
    M: list[Tensor | float] = []
    v: list[Tensor | float] = []
    t = 0

    def step(weights: list[Tensor], g: list[Tensor]) -> list[Tensor]:
        nonlocal t
        t += 1
        if coupled:
            g = [slope + decay * weight for slope, weight in zip(g, weights, strict=True)]
        M[:] = [0.9 * m + 0.1 * slope for m, slope in zip(M or [0.0] * len(g), g, strict=True)]
        v[:] = [0.999 * e + 0.001 * second_moment(slope) for e, slope in zip(v or [0.0] * len(g), g, strict=True)]
        kept = 1.0 if coupled else 1 - lr * decay
        return [
            kept * weight - lr * (m / (1 - 0.9**t)) / ((e / (1 - 0.999**t)).sqrt() + eps)
            for weight, m, e in zip(weights, M, v, strict=True)
        ]

    return step


def frobenius_sum(g: Tensor) -> Tensor:
    return g.square().sum()


def frobenius_mean(g: Tensor) -> Tensor:
    return g.square().mean()


def elementwise(g: Tensor) -> Tensor:
    return g.square()


def orthogonalized(lr: float) -> Step:
    """W − η·UVᵀ of the gradient's SVD, what Muon approximates."""

    def step(weights: list[Tensor], g: list[Tensor]) -> list[Tensor]:
        moves = []
        for slope in g:
            U, _, Vh = torch.linalg.svd(slope)
            moves.append(U @ Vh)
        return [weight - lr * move for weight, move in zip(weights, moves, strict=True)]

    return step


class Pair:
    """A full-width start and its compression."""

    def __init__(self, init_scale: float, depth: int = DEPTH):
        generator = torch.Generator().manual_seed(10**9)
        self.deep = DeepLinear.orthogonal(WIDTH, depth, init_scale, generator=generator, dtype=F64)
        self.small = CompressedDeepLinear.from_full_width(self.deep, -TARGET, RANK)
        self.U, self.V = self.small.left.detach(), self.small.right.detach()
        self.bound = math.sqrt(WIDTH - 2 * RANK) * init_scale**depth

    def run(
        self, rule: Callable[[], Step], steps: int
    ) -> tuple[Tensor, Tensor, list[list[Tensor]], list[list[Tensor]]]:
        """‖f − f_C‖/√bound and ‖f − Φ‖²/‖Φ‖² at every iterate, and both trajectories."""
        inside = self.U.mT @ TARGET @ self.V
        wide = trajectory([w.detach().clone() for w in self.deep.weights], lambda f: f - TARGET, rule(), steps)
        narrow = trajectory(list(self.small.inner.detach().clone()), lambda C: C - inside, rule(), steps)
        gaps = [
            (product(a) - self.U @ product(b) @ self.V.mT).norm() / self.bound
            for a, b in zip(wide, narrow, strict=True)
        ]
        losses = [(product(a) - TARGET).square().sum() / TARGET.square().sum() for a in wide]
        return torch.stack(gaps), torch.stack(losses), wide, narrow


@pytest.mark.parametrize(
    "rule", [(0.0, False), (0.8, False), (0.8, True)], ids=["gradient descent", "heavy ball", "nesterov"]
)
def test_gradient_descent_with_and_without_momentum_is_exact(rule):
    momentum, nesterov = rule
    pair, lr, steps = Pair(0.3), 0.05, 200
    gaps, losses, _, _ = pair.run(lambda: heavy_ball(lr, 0.0, momentum, nesterov), steps)
    rho = rho_trajectory([0.3] * DEPTH, lr, 0.0, steps, momentum=momentum, nesterov=nesterov)
    expected = trajectory_error(rho, WIDTH, RANK).sqrt() / pair.bound
    assert torch.allclose(gaps, expected, rtol=1e-9, atol=0)
    assert float(losses[-1]) < 0.1


@pytest.mark.parametrize("decay", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("init_scale", [0.05, 0.1])
def test_the_frobenius_sum_keeps_it_to_the_bound_until_the_loss_floor(init_scale, decay):
    """Measured here: never more than 1.0 times √bound, with the two second moments apart by what the block leaves out."""
    pair = Pair(init_scale)
    gaps, losses, _, _ = pair.run(lambda: adam_kind(0.01, frobenius_sum, decay=decay), 400)
    floor = (WIDTH - 2 * RANK) * init_scale ** (2 * DEPTH) / float(TARGET.square().sum())
    before_floor = losses > 10 * floor
    assert float(losses.min()) < 1e-2
    assert float(gaps[before_floor].max()) < 1.01


def test_equivariant_adam_is_that_rule():
    """The library's optimizer against the rule above, at every iterate, decay and all, on both sides."""
    pair, steps = Pair(0.05), 120
    _, _, wide, narrow = pair.run(lambda: adam_kind(0.01, frobenius_sum, decay=0.1), steps)
    for model, path in ((pair.deep, wide), (pair.small, narrow)):
        seen: list[list[Tensor]] = []
        factors = list(model.weights) if isinstance(model, DeepLinear) else [model.inner]
        fit_factorization(
            model,
            SquaredLoss(TARGET),
            optimizer=EquivariantAdam(factors, lr=0.01, weight_decay=0.1),
            steps=steps,
            tol=0.0,
            callbacks=[
                lambda step, f=factors, s=seen: s.append(
                    [x for w in f for x in w.detach().clone().reshape(-1, *w.shape[-2:])]
                )
            ],
        )
        for got, want in zip(seen, path, strict=True):
            for a, b in zip(got, want, strict=True):
                assert torch.allclose(a, b, rtol=0.0, atol=1e-10)


def test_the_mean_of_squares_breaks_it():
    """d² against (2r)² entries: full width steps ten times as far as its compression."""
    gaps, _, _, _ = Pair(0.02).run(lambda: adam_kind(1e-3, frobenius_mean), 150)
    assert float(gaps.max()) > 1e4


def test_coupled_decay_breaks_it_where_decoupled_decay_does_not():
    pair = Pair(0.01)
    coupled, _, _, _ = pair.run(lambda: adam_kind(0.01, frobenius_sum, decay=1e-3, coupled=True), 150)
    decoupled, _, _, _ = pair.run(lambda: adam_kind(0.01, frobenius_sum, decay=1e-3), 150)
    assert float(coupled.max()) > 100
    assert float(decoupled.max()) < 1.01


@pytest.mark.parametrize("eps", [1e-8, 1e-6])
def test_elementwise_adam_does_not_keep_it_at_all(eps):
    """Off by 2e5 × √bound at either eps; and its weights leave the block at once."""
    pair = Pair(0.01)
    gaps, losses, wide, _ = pair.run(lambda: adam_kind(1e-3, elementwise, eps=eps), 200)
    assert float(gaps.max()) > 1e5
    assert float(losses.min()) < 1e-2
    bases = invariant_bases(pair.deep, -TARGET, RANK)
    first = invariant_blocks(wide[1], bases.left, bases.right, width=4)
    assert float(first.leakage.min()) > 1e-3


def test_orthogonalized_updates_keep_the_blocks_and_move_rho_by_eta_a_step():
    pair, lr, steps = Pair(0.3), 1e-3, 150
    _, _, wide, narrow = pair.run(lambda: orthogonalized(lr), steps)
    bases = invariant_bases(pair.deep, -TARGET, RANK)
    for t, (now, small) in enumerate(zip(wide, narrow, strict=True)):
        blocks = invariant_blocks(now, bases.left, bases.right, width=4, rho=torch.full((3,), 0.3 - lr * t, dtype=F64))
        assert float(blocks.leakage.max()) < 1e-10
        assert float(blocks.rho_error.max()) < 1e-10
        for block, inner in zip(blocks.inner, small, strict=True):
            # the block and its compression agree; the bases may differ by a turn inside the block, singular values do not
            assert torch.allclose(torch.linalg.svdvals(block), torch.linalg.svdvals(inner), rtol=0.0, atol=1e-9)
    gd = rho_trajectory([0.3] * 3, lr, 0.0, steps)
    assert float(gd[-1, 0]) - (0.3 - lr * steps) > 0.1
