"""Schatten powers against planted spectra, and the least norm of factors against numerical minima."""

import math
from functools import reduce
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.regularization import balanced_factors, factored_norm, schatten_power
from tests.regularization.minimizing import F64, best_lbfgs, gaussians
from tests.spectral.planted import F64_EPS, frame, planted

seeds = st.integers(0, 2**31 - 1)
spectra = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6).map(lambda s: sorted(s, reverse=True))
powers = st.floats(0.2, 4.0)


def product(weights: list[torch.Tensor]) -> torch.Tensor:
    return reduce(lambda below, weight: weight @ below, weights)


def gradient(M: torch.Tensor, p: float) -> torch.Tensor:
    variable = M.clone().requires_grad_()
    (result,) = torch.autograd.grad(schatten_power(variable, p), variable)
    return result


def least_factored_norm(spectrum: torch.Tensor, depth: int) -> float:
    return depth / 2 * float(spectrum.pow(2 / depth).sum())


# --- value -----------------------------------------------------------------------------------------------------------


@given(spectrum=spectra, extra=st.tuples(st.integers(0, 5), st.integers(0, 5)), p=powers, seed=seeds)
def test_value_is_the_sum_of_powers_of_the_planted_spectrum(spectrum, extra, p, seed):
    M = planted(len(spectrum) + extra[0], len(spectrum) + extra[1], spectrum, seed).matrix
    expected = math.fsum(s**p for s in spectrum)
    # a σ of 0.01 beside one of 100 is known to 1e4 roundings; its power to at most four times as many
    assert float(schatten_power(M, p)) == pytest.approx(expected, rel=1e6 * F64_EPS)


def test_known_members_of_the_family():
    M = gaussians([(5, 4)], seed=0)[0]
    assert float(schatten_power(M, 2.0)) == pytest.approx(float(M.square().sum()), rel=1e-13)
    assert float(schatten_power(M, 1.0)) == pytest.approx(float(torch.linalg.matrix_norm(M, "nuc")), rel=1e-13)
    assert float(schatten_power(M, 4.0)) == pytest.approx(float((M @ M.mT).square().sum()), rel=1e-13)


@pytest.mark.parametrize("p", [0.1, 0.4])
def test_small_powers_do_not_see_rounding(p):
    """The 38 singular values of about 1e-16 would add 38·(1e-16)^p, which is 1 at p = 0.1."""
    A = planted(50, 40, [3.0, 2.0]).matrix
    assert float(torch.linalg.svdvals(A).pow(p).sum()) > 3**p + 2**p + 1e-6
    assert float(schatten_power(A, p)) == pytest.approx(3**p + 2**p, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_input_is_summed_in_float32(dtype):
    M = torch.diag(torch.tensor([4.0, 2.0, 1.0])).to(dtype)
    value = schatten_power(M, 0.5)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(3 + 2**0.5, rel=1e-6)


# --- subgradient -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.4, 1.0, 1.5, 3.0])
def test_gradient_agrees_with_finite_differences_at_full_rank(p):
    M = planted(5, 4, [3.0, 2.0, 1.0, 0.5]).matrix.requires_grad_()
    assert torch.autograd.gradcheck(lambda matrix: schatten_power(matrix, p), (M,))


@pytest.mark.parametrize("p", [0.4, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("spectrum", [[2.0, 2.0, 2.0], [2.0, 2.0, 1.0, 1.0, 0.0], [3.0, 0.0, 0.0]])
def test_repeated_and_zero_singular_values_have_the_subgradient_of_least_norm(spectrum, p):
    """p·U_r diag(σ^{p−1}) V_rᵀ: finite, and nothing in directions that M does not have."""
    M, U, S, V = planted(6, 7, spectrum)
    r = int((S > 0).sum())
    expected = p * (U[:, :r] * S[:r].pow(p - 1)) @ V[:, :r].mT
    assert torch.allclose(gradient(M, p), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [0.3, 1.0, 2.5])
def test_the_zero_matrix_has_value_and_subgradient_zero(p):
    M = torch.zeros(3, 4, dtype=F64)
    assert float(schatten_power(M, p)) == 0
    assert torch.equal(gradient(M, p), M)


@given(seed=seeds)
def test_at_p_1_it_is_a_subgradient_of_the_nuclear_norm(seed):
    M = planted(5, 4, [2.0, 2.0], seed).matrix
    N = gaussians([(5, 4)], seed)[0]
    below = schatten_power(M, 1.0) + (gradient(M, 1.0) * (N - M)).sum()
    assert float(below) <= float(torch.linalg.matrix_norm(N, "nuc")) + 1e-12


def test_below_1_the_true_slope_at_zero_is_infinite_and_the_one_returned_keeps_the_rank():
    p = 0.5
    M, U, _, V = planted(4, 4, [2.0, 1.0, 0.0, 0.0])
    new_direction = U[:, 2:3] @ V[:, 2:3].mT
    slopes = [(float(schatten_power(M + t * new_direction, p)) - float(schatten_power(M, p))) / t for t in (1e-4, 1e-8)]
    assert slopes == pytest.approx([1e2, 1e4], rel=1e-4)  # t^{p−1}
    G = gradient(M, p)
    assert torch.linalg.matrix_norm(G, 2) == pytest.approx(p, rel=1e-12)
    assert torch.linalg.matrix_rank(M - 0.1 * G) == 2


def test_below_1_the_slope_grows_until_a_singular_value_counts_as_zero():
    steep, gone = (planted(4, 4, [1.0, small]).matrix for small in (1e-10, 1e-17))
    assert float(torch.linalg.matrix_norm(gradient(steep, 0.5), 2)) == pytest.approx(0.5e5, rel=1e-4)
    assert float(torch.linalg.matrix_norm(gradient(gone, 0.5), 2)) == pytest.approx(0.5, rel=1e-12)


# --- factors -----------------------------------------------------------------------------------------------------------


@given(
    spectrum=spectra, extra=st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)),
    depth=st.integers(1, 6), seed=seeds,
)  # fmt: skip
def test_balanced_factors_multiply_to_the_matrix_and_attain_the_least_norm(spectrum, extra, depth, seed):
    rank = len(spectrum)
    M, _, S, _ = planted(rank + extra[0], rank + extra[1], spectrum, seed)
    weights = balanced_factors(M, depth, width=rank + extra[2])
    assert len(weights) == depth
    assert torch.allclose(product(weights), M, rtol=0, atol=1e3 * F64_EPS * spectrum[0])
    assert float(factored_norm(weights)) == pytest.approx(least_factored_norm(S, depth), rel=1e6 * F64_EPS)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_balanced_factors_have_the_shapes_asked_for_and_are_balanced(depth):
    weights = balanced_factors(planted(5, 4, [3.0, 2.0]).matrix, depth, width=6)
    assert [tuple(weight.shape) for weight in weights] == [(6, 4), *[(6, 6)] * (depth - 2), (5, 6)]
    for lower, upper in pairwise(weights):
        assert torch.allclose(upper.mT @ upper, lower @ lower.mT, atol=1e-13)


def test_balanced_factors_do_not_raise_rounding_to_a_root():
    """A fifth root makes 2e-4 of 1e-18: the factors of a matrix of rank 2 have rank 2."""
    weights = balanced_factors(planted(30, 20, [3.0, 2.0]).matrix, depth=5)
    assert [int(torch.linalg.matrix_rank(weight)) for weight in weights] == [2] * 5


@pytest.mark.parametrize("width", [1, None])
def test_the_zero_matrix_has_zero_factors(width):
    weights = balanced_factors(torch.zeros(3, 2), depth=3, width=width)
    assert float(factored_norm(weights)) == 0


def test_factors_carry_no_gradient():
    weights = balanced_factors(torch.eye(3, requires_grad=True), depth=3)
    assert not any(weight.requires_grad for weight in weights)


@pytest.mark.parametrize("depth", [2, 3, 4, 5])
def test_the_least_norm_over_factorizations_is_L_over_2_and_not_what_is_printed(depth):
    """All W_L ⋯ W_1 = M of invertible inner factors are reached as W_L = M (W_{L−1} ⋯ W_1)^{-1}; L-BFGS over them."""
    spectrum = torch.tensor([3.0, 1.0, 0.25], dtype=F64)
    M = planted(3, 3, spectrum).matrix

    def norm(*inner: torch.Tensor) -> torch.Tensor:
        last = torch.linalg.solve(product(list(inner)), M, left=False)
        return factored_norm([*inner, last])

    starts = [
        [torch.eye(3, dtype=F64) + noise for noise in gaussians([(3, 3)] * (depth - 1), s, 0.3)] for s in range(3)
    ]
    least, _ = best_lbfgs(norm, starts)

    assert least == pytest.approx(least_factored_norm(spectrum, depth), rel=1e-9)
    printed = 2 / depth * float(spectrum.pow(2 / depth).sum())  # eqs. 22, 25 and 26
    inverted = depth / 2 * float(spectrum.pow(depth / 2).sum())
    if depth == 2:
        assert printed == inverted == pytest.approx(least)
    else:
        assert abs(printed - least) > 0.5 * least
        assert abs(inverted - least) > 0.1 * least


@given(depth=st.integers(2, 5), seed=seeds)
def test_no_factorization_is_below_the_least_norm(depth, seed):
    spectrum = [2.0, 1.0, 0.5]
    M = planted(3, 4, spectrum, seed).matrix
    weights = balanced_factors(M, depth, width=5)
    for layer, turn in enumerate(gaussians([(5, 5)] * (depth - 1), seed)):
        change = torch.eye(5, dtype=F64) + 0.5 * turn
        weights[layer] = change @ weights[layer]
        weights[layer + 1] = torch.linalg.solve(change, weights[layer + 1], left=False)
    assert float(factored_norm(weights)) >= least_factored_norm(torch.tensor(spectrum, dtype=F64), depth) * (1 - 1e-12)


def test_classification_eq_30_has_L_minus_1_over_2():
    """W_{L−1} ⋯ W_1 = M costs ((L−1)/2)Σσ^{2/(L−1)} where eq. 30 prints 2/(L−1): at L = 4, 1.5 and not 0.67 times."""
    S = torch.tensor([8.0, 1.0], dtype=F64)
    assert float(factored_norm(balanced_factors(torch.diag(S), depth=3))) == pytest.approx(1.5 * (4 + 1))


def test_factored_norm_passes_gradients_on():
    weight = torch.tensor([[3.0, -4.0]], requires_grad=True)
    factored_norm([weight, torch.ones(1, 1)]).backward()
    assert torch.equal(weight.grad, weight.detach())


def test_rotations_do_not_change_the_power():
    M = planted(4, 4, [3.0, 1.0, 0.1]).matrix
    rotated = frame(4, 4, 10) @ M @ frame(4, 4, 11)
    assert float(schatten_power(rotated, 0.5)) == pytest.approx(float(schatten_power(M, 0.5)), rel=1e-12)


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, -1.0, math.inf, math.nan])
def test_powers_out_of_range_are_refused(p):
    with pytest.raises(ValueError, match="p must be positive and finite"):
        schatten_power(torch.eye(2), p)


@pytest.mark.parametrize(
    "M", [torch.zeros(0, 3), torch.zeros(3), torch.full((2, 2), math.nan)], ids=["empty", "1-D", "nan"]
)
@pytest.mark.parametrize("function", [lambda M: schatten_power(M, 1.0), lambda M: balanced_factors(M, 2)])
def test_what_is_no_finite_matrix_is_refused(function, M, unchecked_shapes):
    with pytest.raises(ValueError, match=r"non-empty|2-D|NaN or infinite"):
        function(M)


@pytest.mark.parametrize("depth", [0, -2])
def test_fewer_than_one_factor_is_refused(depth):
    with pytest.raises(ValueError, match=f"at least 1, got {depth}"):
        balanced_factors(torch.eye(2), depth)


def test_an_inner_width_below_the_rank_is_refused():
    with pytest.raises(ValueError, match=r"inner width 2 .* rank 3; give a width of at least 3"):
        balanced_factors(torch.eye(3), depth=2, width=2)
    assert torch.equal(balanced_factors(torch.eye(3), depth=1, width=2)[0], torch.eye(3))


def test_no_weights_have_no_norm():
    with pytest.raises(ValueError, match="at least one weight"):
        factored_norm([])
