"""Shrinkage against brute force, subgradients and descent on factors."""

import itertools
import math
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from rankwise.regularization import (
    balanced_factors,
    factored_norm,
    schatten_power,
    schatten_prox,
    schatten_prox_threshold,
    shrink_singular_values,
    singular_value_threshold,
    squared_nuclear_prox,
)
from tests.regularization.minimizing import F64, best_lbfgs, gaussians
from tests.spectral.planted import F64_EPS, frame, planted

seeds = st.integers(0, 2**31 - 1)
spectra = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=6).map(lambda s: sorted(s, reverse=True))
weights_ = st.floats(1e-3, 1e3)


def scalar_objective(x, s: float, weight: float, depth: int):
    return 0.5 * (x - s) ** 2 + weight * depth / 2 * x ** (2 / depth)


def matrix_objective(Z: torch.Tensor, target: torch.Tensor, weight: float, depth: int) -> float:
    return float(0.5 * (Z - target).square().sum() + weight * depth / 2 * schatten_power(Z, 2 / depth))


def shrunk(s: float, weight: float, depth: int) -> float:
    return shrink_singular_values(torch.tensor([s], dtype=F64), weight, depth).item()


def factored_objective(target: torch.Tensor, weight: float, *factors: torch.Tensor) -> torch.Tensor:
    product = reduce(lambda below, factor: factor @ below, factors)
    return 0.5 * (product - target).square().sum() + weight * factored_norm(factors)


def descend(factors: list[torch.Tensor], target: torch.Tensor, weight: float, lr: float, steps: int) -> torch.Tensor:
    """Plain gradient descent on all factors; the product they end at."""
    factors = [factor.clone().requires_grad_() for factor in factors]
    for _ in range(steps):
        gradients = torch.autograd.grad(factored_objective(target, weight, *factors), factors)
        with torch.no_grad():
            for factor, gradient in zip(factors, gradients, strict=True):
                factor -= lr * gradient
    return reduce(lambda below, factor: factor @ below, factors).detach()


# --- the scalar problem --------------------------------------------------------------------------------------------------


@given(s=st.floats(0, 20), weight=st.floats(0, 20), depth=st.integers(1, 7))
def test_no_point_of_a_fine_grid_is_lower(s, weight, depth):
    x = shrunk(s, weight, depth)
    grid = np.linspace(0, max(s, 1e-3), 20_001)
    best = scalar_objective(grid, s, weight, depth).min()
    assert 0 <= x <= s
    assert scalar_objective(x, s, weight, depth) <= best + 1e-14 * (1 + s**2)


@given(above=st.floats(1 + 1e-9, 1e6), weight=weights_, depth=st.integers(3, 200))
def test_above_the_jump_it_is_the_larger_root_to_machine_precision(above, weight, depth):
    s = above * schatten_prox_threshold(weight, depth)
    x = shrunk(s, weight, depth)
    pull = weight * x ** (2 / depth - 1)
    assert abs(x - s + pull) <= 8 * F64_EPS * s
    # the larger one: the curvature 1 − λ(1 − 2/L)x^{2/L−2} is positive there, at least 1 − 1/L
    assert 1 - (1 - 2 / depth) * pull / x >= (1 - 1 / depth) * (1 - 1e-6)


@given(weight=weights_, depth=st.integers(3, 200))
def test_at_the_jump_zero_and_x_star_are_equally_good(weight, depth):
    threshold = schatten_prox_threshold(weight, depth)
    landing = (weight * (depth - 2)) ** (depth / (2 * (depth - 1)))
    assert scalar_objective(landing, threshold, weight, depth) == pytest.approx(threshold**2 / 2, rel=1e-12)
    assert shrunk(threshold, weight, depth) == 0
    assert shrunk(threshold * (1 - 1e-9), weight, depth) == 0
    assert shrunk(threshold * (1 + 1e-9), weight, depth) == pytest.approx(landing, rel=1e-6)


@given(spectrum=spectra, weight=st.floats(0, 5))
def test_two_factors_threshold_softly_and_one_shrinks(spectrum, weight):
    S = torch.tensor(spectrum, dtype=F64)
    assert shrink_singular_values(S, weight, 2).tolist() == [max(s - weight, 0) for s in spectrum]
    assert shrink_singular_values(S, weight, 1).tolist() == [s / (1 + weight) for s in spectrum]


@given(spectrum=spectra, weight=st.floats(0, 5), depth=st.integers(1, 6))
def test_values_are_shrunk_each_on_its_own_and_keep_their_order(spectrum, weight, depth):
    S = torch.tensor(spectrum, dtype=F64)
    together = shrink_singular_values(S, weight, depth)
    assert together.tolist() == pytest.approx([shrunk(s, weight, depth) for s in spectrum], rel=1e-14)
    assert torch.equal(together, together.sort(descending=True).values)
    assert torch.equal(shrink_singular_values(S.flip(0), weight, depth), together.flip(0))


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_no_weight_shrinks_nothing(depth):
    S = torch.tensor([3.0, 1e-200, 0.0], dtype=F64)
    assert torch.equal(shrink_singular_values(S, 0.0, depth), S)


@pytest.mark.parametrize("scale", [1e-100, 1e100])
@pytest.mark.parametrize("depth", [3, 4, 8])
def test_extreme_scales_shrink_alike(scale, depth):
    """prox of (a·s, a^{2−2/L}·λ) is a times that of (s, λ)."""
    s, weight = 5.0, 1.5
    assert shrunk(scale * s, scale ** (2 - 2 / depth) * weight, depth) / scale == pytest.approx(
        shrunk(s, weight, depth)
    )


def test_float32_stays_float32_and_bfloat16_becomes_it():
    S = torch.tensor([10.0, 1.0])
    assert shrink_singular_values(S, 2.0, 3).dtype == torch.float32
    assert shrink_singular_values(S.bfloat16(), 2.0, 3).tolist() == pytest.approx([shrunk(10.0, 2.0, 3), 0], rel=1e-6)


# --- the matrix problem --------------------------------------------------------------------------------------------------


@given(
    spectrum=spectra, extra=st.tuples(st.integers(0, 4), st.integers(0, 4)), threshold=st.floats(1e-3, 8), seed=seeds
)
def test_singular_value_threshold_satisfies_the_optimality_condition(spectrum, extra, threshold, seed):
    """(M − Z)/τ is a subgradient of the nuclear norm at Z: spectral norm at most 1, inner product with Z = ‖Z‖_*."""
    M = planted(len(spectrum) + extra[0], len(spectrum) + extra[1], spectrum, seed).matrix
    Z = singular_value_threshold(M, threshold)
    G = M - Z  # τ times the subgradient: dividing by a small τ would only blow up rounding
    rounding = 1e3 * F64_EPS * spectrum[0]
    assert float(torch.linalg.matrix_norm(G, 2)) <= threshold + rounding
    nuclear = float(torch.linalg.matrix_norm(Z, "nuc"))
    assert float((G * Z).sum()) == pytest.approx(threshold * nuclear, rel=1e-9, abs=rounding * spectrum[0])


@given(depth=st.integers(1, 5), weight=st.floats(0.01, 3), seed=seeds)
def test_no_other_matrix_is_lower(depth, weight, seed):
    target = planted(4, 5, [4.0, 2.0, 1.0], seed).matrix
    Z = schatten_prox(target, weight, depth)
    least = matrix_objective(Z, target, weight, depth)
    candidates = [Z + size * direction for size in (1e-6, 1e-3, 1.0) for direction in gaussians([(4, 5)] * 3, seed)]
    candidates += [target, torch.zeros_like(target), 0.5 * target, *(scale * Z for scale in (0.9, 1.1))]
    assert all(matrix_objective(other, target, weight, depth) >= least * (1 - 1e-12) for other in candidates)


def test_the_prox_turns_with_the_matrix():
    M, left, right = planted(5, 4, [4.0, 3.0, 3.0, 1.0]).matrix, frame(5, 5, 20), frame(4, 4, 21)
    for depth in (2, 3):
        turned = schatten_prox(left @ M @ right, 1.0, depth)
        assert torch.allclose(turned, left @ schatten_prox(M, 1.0, depth) @ right, rtol=0, atol=1e-13)


@pytest.mark.parametrize("depth", [2, 3, 4, 5])
def test_it_is_the_global_minimum_over_factors(depth):
    """Eq. 26: the best of several L-BFGS minima over W_1 … W_L is the prox, at (λL/2)Σσ^{2/L} and at no other weight."""
    target, weight = planted(3, 4, [3.0, 1.5, 0.3]).matrix, 0.4
    shapes = [(3, 4), *[(3, 3)] * (depth - 2), (3, 3)]
    starts = [gaussians(shapes, seed, scale=0.8) for seed in range(4)] + [balanced_factors(target, depth)]
    least, factors = best_lbfgs(lambda *W: factored_objective(target, weight, *W), starts)
    Z = schatten_prox(target, weight, depth)
    assert least == pytest.approx(matrix_objective(Z, target, weight, depth), rel=1e-10)
    assert torch.allclose(reduce(lambda below, W: W @ below, factors), Z, rtol=0, atol=1e-6)


def test_two_factors_descend_to_soft_thresholding(generator):
    target, weight = planted(6, 5, [3.0, 2.0, 1.0, 0.4, 0.1]).matrix, 0.5
    W1 = 0.1 * torch.randn(5, 5, dtype=F64, generator=generator)
    W2 = 0.1 * torch.randn(6, 5, dtype=F64, generator=generator)
    found = descend([W1, W2], target, weight, lr=0.15, steps=1500)
    assert torch.allclose(found, singular_value_threshold(target, weight), rtol=0, atol=1e-10)
    assert int(torch.linalg.matrix_rank(found, atol=1e-9)) == 3


@pytest.mark.parametrize("depth", [3, 4])
def test_three_factors_have_a_strict_local_minimum_at_zero_that_descent_can_end_in(depth):
    target, weight = planted(4, 4, [3.0, 2.0, 1.0, 0.5]).matrix, 0.2
    at_zero = matrix_objective(torch.zeros_like(target), target, weight, depth)
    Z = schatten_prox(target, weight, depth)
    assert matrix_objective(Z, target, weight, depth) < 0.6 * at_zero  # so zero is not the global one
    # λ(L/2)σ^{2/L} beats sσ for small σ, in the target's own direction as in any other
    directions = [target, *gaussians([(4, 4)] * 50, seed=1)]
    for size in (1e-3, 1e-6):
        assert all(matrix_objective(size * D / D.norm(), target, weight, depth) > at_zero for D in directions)
    small = [0.05 * torch.eye(4, dtype=F64)] * depth
    assert float(descend(small, target, weight, lr=0.05, steps=1500).norm()) < 1e-6
    large = balanced_factors(target, depth)
    assert torch.allclose(descend(large, target, weight, lr=0.05, steps=1500), Z, rtol=0, atol=1e-8)


# --- the squared nuclear norm ----------------------------------------------------------------------------------------------


@given(spectrum=spectra, extra=st.tuples(st.integers(0, 4), st.integers(0, 4)), c=st.floats(0, 10), seed=seeds)
def test_squared_nuclear_prox_satisfies_the_optimality_condition(spectrum, extra, c, seed):
    """M − Z = c‖Z‖_*·G with G a subgradient of the nuclear norm at Z."""
    M = planted(len(spectrum) + extra[0], len(spectrum) + extra[1], spectrum, seed).matrix
    Z = squared_nuclear_prox(M, c)
    nuclear = float(torch.linalg.matrix_norm(Z, "nuc"))
    rounding = 1e3 * F64_EPS * spectrum[0]
    assert float(torch.linalg.matrix_norm(M - Z, 2)) <= c * nuclear + rounding
    assert float(((M - Z) * Z).sum()) == pytest.approx(c * nuclear**2, rel=1e-9, abs=rounding * spectrum[0])


@given(spectrum=spectra, c=st.floats(0, 10), max_rank=st.integers(1, 4))
def test_with_a_rank_bound_it_is_the_best_support_of_that_size(spectrum, c, max_rank):
    """Against nonnegative least squares over every support: ‖s − z‖² + c(Σz)² = ‖[I; √c·1ᵀ]z − [s; 0]‖²."""
    s = np.array(spectrum)
    size = min(max_rank, len(s))
    best = np.inf
    for support in itertools.combinations(range(len(s)), size):
        A = np.vstack([np.eye(len(s))[:, support], np.sqrt(c) * np.ones((1, size))])
        best = min(best, nnls(A, np.append(s, 0.0))[1] ** 2)
    z = squared_nuclear_prox(torch.diag(torch.tensor(spectrum, dtype=F64)), c, max_rank=max_rank).diag().numpy()
    assert np.count_nonzero(z) <= size
    assert ((s - z) ** 2).sum() + c * z.sum() ** 2 == pytest.approx(best, rel=1e-9, abs=1e-12)


@given(factor=st.floats(1e-3, 1e3), c=st.floats(0, 10), seed=seeds)
def test_squared_nuclear_prox_scales_and_never_kills_everything(factor, c, seed):
    M = planted(4, 3, [3.0, 1.0, 0.2], seed).matrix
    Z = squared_nuclear_prox(M, c)
    assert torch.allclose(squared_nuclear_prox(factor * M, c), factor * Z, rtol=1e-9, atol=1e-12 * factor)
    assert float(torch.linalg.matrix_norm(Z, 2)) > 0


def test_squared_nuclear_prox_of_zero_is_zero_and_without_weight_it_is_the_matrix():
    M = planted(4, 3, [3.0, 1.0]).matrix
    assert torch.equal(squared_nuclear_prox(torch.zeros(4, 3), 1.0), torch.zeros(4, 3))
    assert torch.allclose(squared_nuclear_prox(M, 0.0), M, rtol=0, atol=1e-14)


# --- what is refused -------------------------------------------------------------------------------------------------------

PROXES = {
    "svt": lambda M, weight: singular_value_threshold(M, weight),
    "schatten": lambda M, weight: schatten_prox(M, weight, 3),
    "squared nuclear": lambda M, weight: squared_nuclear_prox(M, weight),
}


@pytest.mark.parametrize("prox", PROXES.values(), ids=PROXES)
@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan])
def test_weights_out_of_range_are_refused(prox, weight):
    with pytest.raises(ValueError, match="finite and cannot be negative"):
        prox(torch.eye(2), weight)


@pytest.mark.parametrize("prox", PROXES.values(), ids=PROXES)
@pytest.mark.parametrize(
    "M", [torch.zeros(0, 3), torch.zeros(3), torch.full((2, 2), math.inf)], ids=["empty", "1-D", "inf"]
)
def test_what_is_no_finite_matrix_is_refused(prox, M, unchecked_shapes):
    with pytest.raises(ValueError, match=r"non-empty|2-D|NaN or infinite"):
        prox(M, 1.0)


def test_depth_rank_and_negative_values_are_refused():
    with pytest.raises(ValueError, match="depth is the number of factors"):
        schatten_prox(torch.eye(2), 1.0, depth=0)
    with pytest.raises(ValueError, match="max_rank must be at least 1, got 0"):
        squared_nuclear_prox(torch.eye(2), 1.0, max_rank=0)
    with pytest.raises(ValueError, match="cannot be negative, got -1"):
        shrink_singular_values(torch.tensor([1.0, -1.0]), 1.0, 2)


@pytest.mark.parametrize("prox", PROXES.values(), ids=PROXES)
def test_the_result_carries_no_gradient_and_no_nan(prox):
    """Autograd through an SVD divides by differences of singular values, all zero here."""
    assert not prox(torch.eye(3, requires_grad=True), 0.1).requires_grad
