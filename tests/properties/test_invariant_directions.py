"""Theorem 2.1 and Lemma E.1 at every iterate, where they extend, and where they fail.

The bases come from the paper's own recipe, by intersecting null spaces, and the trajectories from a plain loop.
"""

import pytest
import torch
from torch import Tensor

from rankwise.factorizations import (
    CompressedDeepLinear,
    DeepLinear,
    RegressionLoss,
    compress_wide_target,
    invariant_bases,
    invariant_blocks,
    rho_trajectory,
    trajectory_error,
    trajectory_error_bound,
    whitened,
)
from tests.properties.plain_descent import descend, heavy_ball, product, trajectory
from tests.spectral.planted import frame, planted, projector

F64 = torch.float64
WIDTH, RANK, LR = 24, 2, 0.1
SCALES = {2: [0.3, 0.5], 3: [0.4, 0.6, 0.5], 5: [0.7, 0.8, 0.6, 0.75, 0.9]}
STEPS = 250
TARGET = planted(WIDTH, WIDTH, [1.0, 0.7], seed=3).matrix


def start(scales: list[float], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10**9 + seed)
    deep = DeepLinear.orthogonal(WIDTH, len(scales), scales, generator=generator, dtype=F64)
    return [weight.detach() for weight in deep.weights]


def null_space(matrix: Tensor) -> Tensor:
    _, S, Vh = torch.linalg.svd(matrix)
    return Vh[int((1e-9 * S[0] < S).sum()) :].mT


def frozen_directions(weights: list[Tensor], target: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """u^(l), v^(l) of Lemma E.1: S = N(Ψ) ∩ N(ΨᵀW_1(0)) with Ψ = W_{L:2}(0)ᵀΦ, and then u = W_l(0)v/ε_l, v^(l+1) = u^(l)."""
    psi = product(weights[1:]).mT @ target if len(weights) > 1 else target
    both = torch.cat([psi / psi.norm(), (psi.mT @ weights[0]) / (psi.mT @ weights[0]).norm()])
    chain = [null_space(both)]
    for weight in weights:
        moved = weight @ chain[-1]
        chain.append(moved / moved[:, 0].norm())
    return chain[1:], chain[:-1]


def tail(weights: list[Tensor], layer: int) -> Tensor:
    """W_{L:l+1}, l counted from 0."""
    above = weights[layer + 1 :]
    return product(above) if above else torch.eye(weights[layer].shape[0], dtype=F64)


def head(weights: list[Tensor], layer: int) -> Tensor:
    """W_{l−1:1}."""
    below = weights[:layer]
    return product(below) if below else torch.eye(weights[layer].shape[1], dtype=F64)


def gradient_descent(lr: float, decay: float):
    return heavy_ball(lr, decay, 0.0, nesterov=False)


def captured_target(weights: list[Tensor], target: Tensor) -> float:
    """Not vacuous unless descent has gone somewhere: the share of the target in f."""
    return float((product(weights) * target).sum() / target.square().sum())


@pytest.mark.parametrize("decay", [0.0, 2e-3])
@pytest.mark.parametrize("depth", [2, 3, 5])
def test_lemma_e1_holds_at_every_iterate(depth, decay):
    """A: Wv = ρu. B: Wᵀu = ρv. C: ΦᵀW_{L:l+1}u = 0. D: ΦW_{l−1:1}ᵀv = 0, all to 1e-10, with ρ from eq. 6."""
    scales = SCALES[depth]
    others = [torch.tensor(scales[:l] + scales[l + 1 :]).prod() for l in range(depth)]  # noqa: E741
    assert decay < 0.1 * float(min(others)), "with decay above σ₁∏ε_k everything collapses and the test is empty"
    weights = start(scales)
    u, v = frozen_directions(weights, TARGET)
    assert v[0].shape[1] == WIDTH - 2 * RANK
    path = trajectory(weights, lambda f: f - TARGET, gradient_descent(LR, decay), STEPS)
    rho = rho_trajectory(scales, LR, decay, STEPS)
    for t, now in enumerate(path):
        for l, weight in enumerate(now):  # noqa: E741
            assert float((weight @ v[l] - rho[t, l] * u[l]).norm()) < 1e-10
            assert float((weight.mT @ u[l] - rho[t, l] * v[l]).norm()) < 1e-10
            assert float((TARGET.mT @ tail(now, l) @ u[l]).norm()) < 1e-10
            assert float((TARGET @ head(now, l).mT @ v[l]).norm()) < 1e-10
    assert captured_target(path[-1], TARGET) > 0.8
    assert float((rho[0] - rho[-1]).abs().min()) > 1e-3


@pytest.mark.parametrize("decay", [0.0, 2e-3])
@pytest.mark.parametrize("depth", [2, 3, 5])
def test_theorem_2_1_holds_at_every_iterate(depth, decay):
    """UᵀWV is block diagonal with ρI, in the library's bases; and those leave the paper's directions alone."""
    scales = SCALES[depth]
    weights = start(scales)
    bases = invariant_bases(DeepLinear(weights), -TARGET, RANK)
    _, v = frozen_directions(weights, TARGET)
    assert bases.width == 2 * RANK
    for U, V in zip(bases.left, bases.right[1:], strict=False):
        assert torch.equal(U, V)
    for l, V in enumerate(bases.right):  # noqa: E741
        assert torch.allclose(projector(V[:, 2 * RANK :]), projector(v[l]), rtol=0, atol=1e-10)
    rho = rho_trajectory(scales, LR, decay, STEPS)
    path = trajectory(weights, lambda f: f - TARGET, gradient_descent(LR, decay), STEPS)
    for t, now in enumerate(path):
        blocks = invariant_blocks(now, bases.left, bases.right, width=bases.width, rho=rho[t])
        assert float(blocks.leakage.max()) < 1e-10
        assert float(blocks.rho_error.max()) < 1e-10
        if t == 0:
            for block, scale in zip(blocks.inner, scales, strict=True):
                assert torch.allclose(block, scale * torch.eye(4, dtype=F64), rtol=0, atol=1e-12)
    assert captured_target(path[-1], TARGET) > 0.8
    assert float(invariant_blocks(path[-1], bases.left, bases.right, width=2).leakage.max()) > 0.1


def test_a_gaussian_start_has_no_such_directions():
    """The control: without the orthogonal start the remaining singular values differ from the first iterate on."""
    bases = invariant_bases(DeepLinear(start(SCALES[3])), -TARGET, RANK)
    deep = DeepLinear.gaussian(WIDTH, 3, 0.5, generator=torch.Generator().manual_seed(0), dtype=F64)
    blocks = invariant_blocks([w.detach() for w in deep.weights], bases.left, bases.right, width=4)
    assert float(blocks.rho_error.min()) > 0.1


def compressed_error(
    weights: list[Tensor], target: Tensor, step, steps: int, rank: int = RANK
) -> tuple[Tensor, list[list[Tensor]]]:
    """‖f(t) − f_C(t)‖² at every t for the squared loss, and the full trajectory; ``step`` makes a fresh update rule."""
    compressed = CompressedDeepLinear.from_full_width(DeepLinear(weights), -target, rank)
    U, V = compressed.left.detach(), compressed.right.detach()
    wide = trajectory(weights, lambda f: f - target, step(), steps)
    narrow = trajectory(list(compressed.inner.detach()), lambda C: C - U.mT @ target @ V, step(), steps)
    pairs = zip(wide, narrow, strict=True)
    return torch.stack([(product(a) - U @ product(b) @ V.mT).square().sum() for a, b in pairs]), wide


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 2e-3])
@pytest.mark.parametrize("depth", [2, 3, 5])
def test_momentum_keeps_structure_and_compression_with_a_rho_of_its_own(depth, decay, nesterov):
    scales, momentum, steps = SCALES[depth], 0.8, 120
    weights = start(scales)
    lr = 0.03
    error, wide = compressed_error(weights, TARGET, lambda: heavy_ball(lr, decay, momentum, nesterov), steps)
    rho = rho_trajectory(scales, lr, decay, steps, momentum=momentum, nesterov=nesterov)
    bases = invariant_bases(DeepLinear(weights), -TARGET, RANK)
    for t, now in enumerate(wide):
        blocks = invariant_blocks(now, bases.left, bases.right, width=bases.width, rho=rho[t])
        assert float(blocks.leakage.max()) < 1e-10
        assert float(blocks.rho_error.max()) < 1e-10
    # the error is 0.3 at most here, a difference of products of size 1: 1e-13 from rounding, times 1e2 from descent
    assert torch.allclose(error, trajectory_error(rho, WIDTH, RANK), rtol=0, atol=1e-11)
    assert captured_target(wide[-1], TARGET) > 0.8
    plain = rho_trajectory(scales, lr, decay, steps)
    other = rho_trajectory(scales, lr, decay, steps, momentum=momentum, nesterov=not nesterov)
    assert float((rho - plain).abs().max()) > 1e-3, "eq. 6 must not describe it"
    assert float((rho - other).abs().max()) > 1e-5, "nor the other kind of momentum"


@pytest.mark.parametrize(
    ("scales", "speed", "decay", "momentum", "nesterov", "times"),
    [([0.87, 0.2], 1.62, 0.3, 0.93, False, 1.5), ([0.08, 1.6], 1.59, 0.0, 0.85, True, 5.0)],
    ids=["heavy ball", "nesterov"],
)
def test_momentum_exceeds_proposition_2_2_under_the_condition_that_suffices_without(
    scales, speed, decay, momentum, nesterov, times
):
    """η(λ + ∏ε²) = 1.6 ≤ 2: gradient descent stays below the bound, momentum does not."""
    lr = speed / (decay + max(scales) ** 2)
    bound = trajectory_error_bound(scales, WIDTH, RANK, lr=lr, weight_decay=decay)
    plain = trajectory_error(rho_trajectory(scales, lr, decay, 40), WIDTH, RANK)
    rho = rho_trajectory(scales, lr, decay, 40, momentum=momentum, nesterov=nesterov)
    assert float(plain.max()) <= bound * (1 + 1e-12)
    assert float(trajectory_error(rho, WIDTH, RANK).max()) > times * bound


def test_without_its_condition_the_bound_is_exceeded_26000_times():
    """ε = (1e-3, 2.5), η = .35: the paper's bound has no condition, descent converges, and the error is 25,985 × it."""
    scales, lr, steps = [1e-3, 2.5], 0.35, 250
    target = planted(WIDTH, WIDTH, [0.1], seed=3).matrix
    error, wide = compressed_error(start(scales), target, lambda: gradient_descent(lr, 0.0), steps, rank=1)
    bound = (WIDTH - 2) * (1e-3 * 2.5) ** 2
    assert float(error.max()) / bound == pytest.approx(25985.47, rel=1e-6)
    assert torch.allclose(
        error, trajectory_error(rho_trajectory(scales, lr, 0.0, steps), WIDTH, 1), rtol=1e-9, atol=1e-15
    )
    assert float((product(wide[-1]) - target).norm()) < 1e-3 * float(target.norm())
    with pytest.raises(ValueError, match=r"lr up to 0\.32"):
        trajectory_error_bound(scales, WIDTH, 1, lr=lr)


@pytest.mark.parametrize("decay", [0.0, 5e-3])
@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("last_is_orthogonal", [True, False])
def test_a_wide_target_is_compressed_without_any_error(depth, decay, last_is_orthogonal):
    """k × d: ρ_l(t) = ε_l(1 − ηλ)^t for l ≤ L−1, width k + r, W_L(0) arbitrary, f = f_C to rounding."""
    d, k, r, lr, steps = WIDTH, 3, 2, 0.1, 200
    scales = [0.4, 0.6, 0.5][: depth - 1]
    below = start(scales)
    last = 0.5 * frame(d, k, 77).mT
    if not last_is_orthogonal:
        last = 0.15 * torch.randn(k, d, dtype=F64, generator=torch.Generator().manual_seed(5))
    weights = [*below, last]
    target = planted(k, d, [1.0, 0.7], seed=5).matrix
    compressed = compress_wide_target(DeepLinear(weights), -target, r)
    assert compressed.inner.shape == (depth - 1, k + r, k + r)
    V = compressed.right.detach()
    wide = trajectory(weights, lambda f: f - target, gradient_descent(lr, decay), steps)
    narrow = trajectory(
        [*compressed.inner.detach(), compressed.left.detach()],
        lambda C: C - target @ V,
        gradient_descent(lr, decay),
        steps,
    )
    outside = torch.eye(d, dtype=F64) - projector(V)
    for t, (now, small) in enumerate(zip(wide, narrow, strict=True)):
        assert float((product(now) - product(small) @ V.mT).norm()) < 1e-12
        entering = outside
        for weight, first, scale in zip(now, below, scales, strict=False):
            rate = (1 - lr * decay) ** t
            assert torch.allclose(weight @ entering, rate * first @ entering, rtol=0, atol=1e-11)
            entering = first @ entering / scale
        assert float((now[-1] @ entering).norm()) < 1e-11
    assert captured_target(wide[-1], target) > 0.8


def test_one_direction_fewer_is_not_enough_for_a_wide_target():
    """The control of the width k + r: without the weakest direction of the frame the two part by more than 1e-3."""
    weights = [*start([0.4, 0.6]), 0.5 * frame(WIDTH, 3, 77).mT]
    target = planted(3, WIDTH, [1.0, 0.7], seed=5).matrix
    small = compress_wide_target(DeepLinear(weights), -target, 1)
    V = small.right.detach()
    wide = trajectory(weights, lambda f: f - target, gradient_descent(0.1, 0.0), 100)
    narrow = trajectory(
        [*small.inner.detach(), small.left.detach()], lambda C: C - target @ V, gradient_descent(0.1, 0.0), 100
    )
    assert max(float((product(a) - product(b) @ V.mT).norm()) for a, b in zip(wide, narrow, strict=True)) > 1e-3


@pytest.mark.parametrize("white", [True, False])
def test_regression_keeps_the_directions_only_for_white_inputs(white):
    """½‖fX − Y‖² with XXᵀ = I is eq. 2 with Φ = YXᵀ; without it the same directions start to turn at once."""
    scales, lr, steps = SCALES[3], 0.1, 150
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(WIDTH, 40, dtype=F64, generator=generator)
    X = whitened(X) if white else X / torch.linalg.matrix_norm(X, 2)
    Y = planted(WIDTH, 40, [1.0, 0.7], seed=4).matrix
    loss = RegressionLoss(X, Y)
    weights = start(scales)
    bases = invariant_bases(DeepLinear(weights), -Y @ X.mT, RANK)
    rho = rho_trajectory(scales, lr, 0.0, steps)
    wide = trajectory(weights, lambda f: (f @ X - Y) @ X.mT, gradient_descent(lr, 0.0), steps)
    leaks, errors = zip(
        *(
            (float(blocks.leakage.max()), float(blocks.rho_error.max()))
            for t, now in enumerate(wide)
            for blocks in [invariant_blocks(now, bases.left, bases.right, width=4, rho=rho[t])]
        ),
        strict=True,
    )
    started, ended = (float(loss.value_and_gradient(product(now))[0]) for now in (wide[0], wide[-1]))
    assert ended < 0.8 * started
    if white:
        assert max(leaks) < 1e-10
        assert max(errors) < 1e-10
    else:
        assert max(leaks) > 1e-2
        assert max(errors) > 1e-2


def test_the_squared_loss_with_decay_on_one_factor_too_large_collapses():
    """Why λ stays well below σ₁∏_{k≠l}ε_k: above it descent goes to zero and says nothing about the target."""
    weights = start([0.2, 0.2, 0.2])
    for _ in range(400):
        weights = descend(weights, product(weights) - TARGET, 0.1, 0.5)
    assert captured_target(weights, TARGET) < 1e-6
