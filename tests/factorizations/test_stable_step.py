"""The default step: the Hessian's largest eigenvalue where that can be computed, and no divergence anywhere we looked."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.factorizations import (
    AutogradLoss,
    CompressedDeepLinear,
    DeepLinear,
    DivergedError,
    MaskedSquaredLoss,
    RegressionLoss,
    SquaredLoss,
    compress_wide_target,
    fit_factorization,
    identity_factors,
    invariant_subspaces,
    stable_learning_rate,
)
from rankwise.factorizations.stable_step import shared_scales
from tests.spectral.planted import frame, planted

F64 = torch.float64


def largest_curvature(weights, definition):
    """λ_max of the loss's Hessian in all entries of all factors, dense, by autograd."""
    sizes, shapes = [w.numel() for w in weights], [w.shape for w in weights]

    def of_entries(entries):
        factors = [part.reshape(shape) for part, shape in zip(entries.split(sizes), shapes, strict=True)]
        f = factors[0]
        for factor in factors[1:]:
            f = factor @ f
        return definition(f)

    entries = torch.cat([w.reshape(-1) for w in weights])
    return float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(of_entries, entries))[-1])


def balanced(U, S, V, depth):
    """Factors of U diag(S) Vᵀ with equal singular values."""
    root = torch.diag(S ** (1 / depth))
    if depth == 1:
        return [U @ root @ V.mT]
    return [root @ V.mT, *[root] * (depth - 2), U @ root]


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_from_a_small_start_it_is_nine_tenths_of_the_hessian_at_the_solution(depth):
    target = planted(4, 4, [3.0, 1.0], seed=2)
    solution = balanced(target.U, target.S, target.V, depth)
    curvature = largest_curvature(solution, lambda f: 0.5 * (f - target.matrix).square().sum())
    start = [1e-6 * torch.eye(4, dtype=F64)] * depth
    assert stable_learning_rate(start, SquaredLoss(target.matrix)) == pytest.approx(0.9 / curvature, rel=1e-6)


@given(
    depth=st.integers(1, 4), seed=st.integers(0, 10**6), sigma=st.floats(0.1, 5.0),
    scales=st.lists(st.floats(0.05, 2.0), min_size=4, max_size=4),
)  # fmt: skip
def test_at_an_orthogonal_start_it_is_no_more_than_nine_tenths_of_the_hessian_s_limit(depth, seed, sigma, scales):
    generator = torch.Generator().manual_seed(seed)
    deep = DeepLinear.orthogonal(3, depth, scales[:depth], generator=generator, dtype=F64)
    target = planted(3, 3, [sigma, sigma / 2], seed=seed).matrix
    weights = [w.detach() for w in deep.weights]
    curvature = largest_curvature(weights, lambda f: 0.5 * (f - target).square().sum())
    assert stable_learning_rate(weights, SquaredLoss(target)) * curvature <= 0.9 * (1 + 1e-9)


def test_unequal_factors_share_the_target_as_gradient_flow_conserves():
    """s_l² − ε_l² is the same for every l and ∏s_l is the target; by a finely stepped descent on numbers."""
    start, target = [0.1, 1.3, 0.6], 4.0
    s = torch.tensor(start, dtype=F64)
    for _ in range(200_00):
        residual = s.prod() - target
        s = s - 1e-3 * residual * s.prod() / s
    expected = shared_scales(start, [1.0, 1.0, 1.0], target)
    assert torch.allclose(s, torch.tensor(expected, dtype=F64), rtol=2e-3)
    slower = shared_scales(start, [1.0, 0.1, 1.0], target)
    assert (slower[1] ** 2 - start[1] ** 2) == pytest.approx(0.1 * (slower[0] ** 2 - start[0] ** 2), rel=1e-6)


STARTS = [DeepLinear.orthogonal, DeepLinear.gaussian, DeepLinear.uniform]


def squared(m, n, seed, sigma):
    return SquaredLoss(planted(m, n, [sigma, sigma / 3], seed=seed).matrix)


def masked(m, n, seed, sigma):
    mask = torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0, :] = True
    return MaskedSquaredLoss(planted(m, n, [sigma, sigma / 3], seed=seed).matrix, mask)


def regression(m, n, seed, sigma):
    X = planted(n, 2 * n, torch.linspace(2, 0.5, n), seed=seed + 1).matrix
    return RegressionLoss(X, planted(m, n, [sigma, sigma / 3], seed=seed).matrix @ X)


@pytest.mark.parametrize(
    "momentum",
    [(0.0, False), (0.9, False), (0.9, True), (0.99, False), (0.99, True)],
    ids=["gd", "heavy ball", "nesterov", "heavier ball", "more nesterov"],
)
@pytest.mark.parametrize("make", [squared, masked, regression])
@pytest.mark.parametrize("start", STARTS)
@settings(max_examples=8)
@given(
    depth=st.integers(1, 5), seed=st.integers(0, 10**6), sigma=st.floats(0.05, 50.0),
    scales=st.lists(st.floats(1e-3, 1.5), min_size=5, max_size=5), decay=st.sampled_from([0.0, 1e-2]),
)  # fmt: skip
def test_descent_with_the_default_step_does_not_diverge(start, make, momentum, depth, seed, sigma, scales, decay):
    """Gradient descent never loses ground over thirty steps, momentum never exceeds its start by half."""
    sizes = [6, *[8] * (depth - 1), 5]
    loss = make(5, 6, seed, sigma)
    deep = start(sizes, None, scales[:depth], generator=torch.Generator().manual_seed(seed), dtype=F64)
    mu, nesterov = momentum
    result = fit_factorization(deep, loss, weight_decay=decay, momentum=mu, nesterov=nesterov, steps=200, tol=1e-8)
    allowed = 1.5 * max(result.losses[0], loss.at_zero)
    assert max(result.losses) <= allowed
    if not mu and decay == 0:
        later = result.losses[30::30]
        assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(later))


@pytest.mark.parametrize("ratio", [0.01, 1.0, 5.0])
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), sigma=st.floats(0.1, 50.0), scale=st.floats(1e-3, 0.5), depth=st.integers(1, 4))
def test_nor_does_it_where_the_frames_train_at_a_rate_of_their_own(ratio, seed, sigma, scale, depth):
    target = planted(9, 8, [sigma, sigma / 2], seed=seed).matrix
    generator = torch.Generator().manual_seed(10**9 + seed)
    frames = invariant_subspaces(target, 2, generator=generator)
    f = CompressedDeepLinear.from_subspaces(frames, depth, scale, train_outer=True)
    result = fit_factorization(f, SquaredLoss(target), outer_lr_ratio=ratio, steps=300)
    assert max(result.losses) <= 1.5 * max(result.losses[0], 0.5 * float(target.square().sum()))


@pytest.mark.parametrize(("momentum", "slower"), [(0.3, 1.0), (0.9, 0.2)])
def test_with_momentum_the_curvature_is_taken_at_twice_the_target(momentum, slower):
    """L(2σ)^{2−2/L} + (L−1)·σ·(2σ)^{1−2/L}, the Hessian's eigenvalue on balanced factors of 2σ with residual σ."""
    depth, sigma = 3, 5.0
    start = [1e-6 * torch.eye(4, dtype=F64)] * depth
    s = (2 * sigma) ** (1 / depth)
    one = torch.full((1, 1), s, dtype=F64)
    curvature = largest_curvature([one] * depth, lambda f: 0.5 * (f - sigma).square().sum())
    expected = slower * 0.9 / curvature
    got = stable_learning_rate(start, SquaredLoss(sigma * torch.eye(4, dtype=F64)), momentum=momentum)
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.999])
def test_momentum_does_not_coast_away_from_unbalanced_and_small_starts(momentum, nesterov, depth):
    """What the bound on the curvature alone does not see: at μ = .99 its step diverges from most of these starts."""
    target = planted(8, 8, [1.0, 0.95, 0.9], seed=4).matrix
    for seed, scales in enumerate(([0.2] * depth, [0.05, *[1.0] * (depth - 1)], [0.4] * depth)):
        deep = DeepLinear.orthogonal(8, depth, scales, generator=torch.Generator().manual_seed(seed), dtype=F64)
        result = fit_factorization(deep, SquaredLoss(target), momentum=momentum, nesterov=nesterov, steps=800)
        assert max(result.losses) <= 1.1 * result.losses[0]


def test_a_masked_target_s_spectrum_is_scaled_up_by_what_is_observed():
    """σ₁(Ω⊙Φ)/p for the unknown σ₁, and the fullest row or column for the curvature: by hand on a small mask."""
    mask = torch.tensor([[True, True, True, True], [True, False, False, False], [False, True, False, False]])
    target = torch.arange(12.0, dtype=F64).reshape(3, 4)
    sigma, curvature = MaskedSquaredLoss(target, mask).spectrum()
    assert sigma == pytest.approx(float(torch.linalg.matrix_norm(target * mask, 2)) / 0.5, rel=1e-12)
    assert curvature == 1.0
    mask[0, 2:] = False
    assert MaskedSquaredLoss(target, mask).spectrum()[1] == pytest.approx(2 / 3)


def test_frames_enter_the_step_with_their_own_rate(generator):
    frames = invariant_subspaces(planted(9, 8, [5.0, 2.0]).matrix, 2, generator=generator)
    loss = SquaredLoss(planted(9, 8, [5.0, 2.0]).matrix)
    f = CompressedDeepLinear.from_subspaces(frames, 2, 0.3, train_outer=True)
    chain = [f.right.detach().mT.contiguous(), *f.inner.detach().clone(), f.left.detach().clone()]
    expected = stable_learning_rate(chain, loss, ratios=[7.0, 1.0, 1.0, 7.0])
    assert fit_factorization(f, loss, outer_lr_ratio=7.0, steps=1).lr == pytest.approx(expected, rel=1e-12)
    assert expected < 0.5 * stable_learning_rate(chain, loss)


def test_the_default_step_reaches_the_target_in_the_time_that_the_limit_allows():
    """A safe step that is a hundred times too small would pass everything above."""
    target = planted(20, 20, [2.0, 1.5], seed=1).matrix
    deep = DeepLinear.orthogonal(20, 3, 0.1, generator=torch.Generator().manual_seed(0), dtype=F64)
    result = fit_factorization(deep, SquaredLoss(target), tol=1e-4, steps=200)
    assert result.reason == "tolerance"
    with pytest.raises(DivergedError):
        fit_factorization(deep, SquaredLoss(30 * target), lr=3.0 * result.lr, steps=200)


def test_wide_targets_and_zero_targets_have_a_step_too(generator):
    deep = DeepLinear([*DeepLinear.orthogonal(12, 2, 0.3, generator=generator, dtype=F64).weights, frame(12, 3, 5).mT])
    target = planted(3, 12, [2.0, 1.0]).matrix
    small = compress_wide_target(deep, -target, 2)
    result = fit_factorization(small, SquaredLoss(target), tol=1e-6, steps=2000)
    assert result.converged
    zeros = SquaredLoss(torch.zeros(4, 4, dtype=F64))
    assert 0 < stable_learning_rate([torch.eye(4, dtype=F64)] * 2, zeros) < 1
    assert stable_learning_rate([torch.zeros(4, 4, dtype=F64)] * 2, zeros) > 0


def test_a_loss_without_a_spectrum_has_to_be_given_its_step(generator):
    deep = DeepLinear.orthogonal(4, 2, 0.3, generator=generator)
    with pytest.raises(ValueError, match="AutogradLoss, whose spectrum is unknown; give lr"):
        fit_factorization(deep, lambda f: f.square().sum())
    stretched = CompressedDeepLinear(2 * torch.eye(5)[:, :2], torch.eye(5)[:, :2], identity_factors(2, 2, 0.1))
    with pytest.raises(ValueError, match="FramedLoss, whose spectrum is unknown; give lr"):
        fit_factorization(stretched, SquaredLoss(torch.eye(5)))
    assert AutogradLoss(torch.sum).spectrum() is None
