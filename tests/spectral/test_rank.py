"""Ranks against planted spectra and closed forms."""

import math
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.spectral import (
    effective_rank,
    numerical_rank,
    numerical_rank_icml24,
    rank_for_energy,
    singular_values,
    stable_rank,
)
from tests.spectral.planted import F64_EPS, frame, planted

seeds = st.integers(0, 2**31 - 1)
spectra = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=8).map(lambda s: sorted(s, reverse=True))


def all_ranks(matrix: torch.Tensor) -> list[float]:
    return [
        numerical_rank(matrix),
        numerical_rank_icml24(matrix),
        stable_rank(matrix),
        effective_rank(matrix, power=1),
        effective_rank(matrix, power=2),
        rank_for_energy(matrix, 0.9),
    ]


SOFT = [stable_rank, effective_rank, lambda S: effective_rank(S, power=2), lambda S: rank_for_energy(S, 0.9)]


@given(spectrum=spectra, extra=st.tuples(st.integers(0, 6), st.integers(0, 6)), seed=seeds)
def test_planted_rank_and_values_are_found(spectrum, extra, seed):
    rank = len(spectrum)
    A, _, S, _ = planted(rank + extra[0], rank + extra[1], spectrum, seed)
    assert numerical_rank(A) == rank
    assert torch.allclose(singular_values(A)[:rank], S, rtol=0, atol=100 * F64_EPS * spectrum[0])


@given(spectrum=spectra, seed=seeds)
def test_ranks_do_not_move_under_rotations_or_transposition(spectrum, seed):
    size = len(spectrum) + 2
    A = planted(size, size, spectrum, seed).matrix
    rotated = frame(size, size, seed + 1) @ A @ frame(size, size, seed + 2)
    for first, second, third in zip(all_ranks(A), all_ranks(rotated), all_ranks(A.mT), strict=True):
        assert first == pytest.approx(second, rel=1e-12)
        assert first == pytest.approx(third, rel=1e-12)


@given(spectrum=spectra, power=st.integers(-100, 100))
def test_every_rank_but_the_papers_ignores_the_scale(spectrum, power):
    S = torch.tensor(spectrum, dtype=torch.float64)
    for rank in (lambda s: numerical_rank(s, shape=(9, 9)), *SOFT):
        assert rank(S * 10.0**power) == pytest.approx(rank(S), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_soft_ranks_neither_overflow_nor_underflow_in_float32(scale):
    S = torch.tensor([2.0, 1.0]) * scale
    assert stable_rank(S) == pytest.approx(1.25, rel=1e-6)
    assert rank_for_energy(S, 0.9) == 2
    assert effective_rank(S, power=2) == pytest.approx(effective_rank(torch.tensor([2.0, 1.0]), power=2), rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (4, 7), (200, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_rank_of_the_zero_matrix_is_zero(shape, dtype):
    assert all_ranks(torch.zeros(shape, dtype=dtype)) == [0] * 6


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_every_rank_of_a_single_row_or_column_is_one(shape):
    assert all_ranks(torch.ones(shape, dtype=torch.float64)) == pytest.approx([1.0] * 6)


def test_numerical_rank_counts_strictly_above_the_cutoff():
    S = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    assert [numerical_rank(S, shape=(3, 3), tol=tol) for tol in (0.5, 1.0, 2.0, 3.0)] == [3, 2, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_default_cutoff_is_eps_times_larger_side_times_largest_value(dtype):
    cutoff = torch.tensor(torch.finfo(dtype).eps * 256 * 4.0, dtype=dtype)
    just_above = torch.nextafter(cutoff, torch.tensor(1.0, dtype=dtype))
    S = torch.stack([torch.tensor(4.0, dtype=dtype), just_above, cutoff])
    for shape in ((256, 3), (3, 256)):
        assert numerical_rank(S, shape=shape) == 2
    assert numerical_rank(S, shape=(257, 3)) == 1
    assert numerical_rank(S, shape=(255, 3)) == 3


def test_rank_of_a_factored_update_is_that_of_its_layer():
    S = torch.tensor([1.0, 1e-5])
    assert numerical_rank(S, shape=(2, 2)) == 2
    assert numerical_rank(S, shape=(768, 768)) == 1


def test_wide_bfloat16_matrix_keeps_its_rank(generator):
    """Small integer factors have products that bf16 holds exactly, so the rank is exactly 3."""
    left = torch.randint(-2, 3, (768, 3), generator=generator).double()
    right = torch.randint(-2, 3, (24, 3), generator=generator).double()
    A = (left @ right.mT).bfloat16()
    assert torch.equal(A.double(), left @ right.mT)
    assert numerical_rank(A) == 3


@given(spectrum=spectra, seed=seeds)
def test_singular_values_may_be_given_in_any_order(spectrum, seed):
    S = torch.tensor(spectrum, dtype=torch.float64)
    shuffled = S[torch.randperm(len(S), generator=torch.Generator().manual_seed(seed))]
    assert torch.equal(singular_values(shuffled), S)
    assert numerical_rank(shuffled, shape=(9, 9)) == len(spectrum)
    for rank in SOFT:
        assert rank(shuffled) == rank(S)


@pytest.mark.parametrize("rank", [numerical_rank, numerical_rank_icml24])
def test_singular_values_alone_need_the_shape(rank):
    with pytest.raises(ValueError, match="shape"):
        rank(torch.ones(3))
    assert rank(torch.ones(3), shape=(3, 5)) == 3


def test_negative_singular_values_are_refused():
    with pytest.raises(ValueError, match="negative"):
        singular_values(torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize(
    "matrix",
    [torch.zeros(0, 3), torch.zeros(3, 0), torch.zeros(2, 2, 2), torch.tensor(1.0), torch.zeros(0)],
    ids=["no rows", "no columns", "3-D", "0-D", "no singular values"],
)
@pytest.mark.parametrize("rank", [lambda S: numerical_rank(S, shape=(3, 3)), *SOFT])
def test_empty_and_non_matrices_are_refused(rank, matrix):
    with pytest.raises(ValueError):
        rank(matrix)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(3, 3), (4,)])
def test_non_finite_input_is_refused(shape, bad):
    values = torch.ones(shape)
    values[..., 1] = bad
    for rank in (lambda S: numerical_rank(S, shape=(3, 3)), *SOFT):
        with pytest.raises(ValueError, match="NaN or infinite"):
            rank(values)


@pytest.mark.parametrize("rank", [lambda S: numerical_rank(S), *SOFT])
def test_a_trainable_parameter_is_measured_without_a_warning(rank):
    """Every weight of a model is a Parameter; torch warns where one that needs a gradient becomes a Python number."""
    weight = torch.nn.Parameter(torch.diag(torch.tensor([2.0, 1.0])))
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert rank(weight) == pytest.approx(rank(weight.detach()))
    finally:
        torch.set_warn_always(False)


def test_the_papers_rank_has_an_absolute_floor_of_1e_8():
    S = torch.tensor([1.0, 2e-8, 1e-8, 1e-9], dtype=torch.float64)
    assert numerical_rank_icml24(S, shape=(10, 10)) == 2
    assert numerical_rank_icml24(1e3 * S, shape=(10, 10)) == 4
    assert numerical_rank(S, shape=(10, 10)) == 4


def test_the_papers_rank_also_scales_with_size_and_largest_value():
    S = torch.tensor([1e6, 1e-6, 1e-7], dtype=torch.float64)
    assert 1e-7 < 1000 * 1e6 * F64_EPS < 1e-6
    assert numerical_rank_icml24(S, shape=(1000, 3)) == 2
    assert numerical_rank_icml24(S, shape=(3, 3)) == 3


@given(spectra)
def test_stable_rank_closed_form(spectrum):
    expected = math.fsum(s**2 for s in spectrum) / spectrum[0] ** 2
    assert stable_rank(torch.tensor(spectrum, dtype=torch.float64)) == pytest.approx(expected, rel=100 * F64_EPS)


@given(spectrum=spectra, power=st.sampled_from([1, 2]))
def test_effective_rank_closed_form(spectrum, power):
    total = math.fsum(s**power for s in spectrum)
    shares = [s**power / total for s in spectrum]
    expected = math.exp(-math.fsum(p * math.log(p) for p in shares))
    got = effective_rank(torch.tensor(spectrum, dtype=torch.float64), power=power)
    assert got == pytest.approx(expected, rel=1000 * F64_EPS)


@pytest.mark.parametrize("power", [1, 2])
@given(k=st.integers(1, 8), zeros=st.integers(0, 4))
def test_effective_rank_of_equal_values_is_their_number(power, k, zeros):
    S = torch.cat([torch.full((k,), 3.0), torch.zeros(zeros)]).double()
    assert effective_rank(S, power=power) == pytest.approx(k, rel=100 * F64_EPS)


def test_effective_rank_weighs_values_by_default_and_energies_on_request():
    S = torch.tensor([2.0, 1.0], dtype=torch.float64)
    entropy = {p: -sum(q * math.log(q) for q in (2**p / (2**p + 1), 1 / (2**p + 1))) for p in (1, 2)}
    assert effective_rank(S) == pytest.approx(math.exp(entropy[1]))
    assert effective_rank(S, power=2) == pytest.approx(math.exp(entropy[2]))


@pytest.mark.parametrize("power", [0, 3, -1])
def test_other_powers_are_refused(power):
    with pytest.raises(ValueError, match="power must be 1"):
        effective_rank(torch.eye(2), power=power)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8).map(lambda s: sorted(s, reverse=True)))
def test_rank_for_energy_is_the_smallest_that_suffices(spectrum):
    """At the exact shares of integer spectra, where an off-by-one or a strict comparison shows."""
    S = torch.tensor(spectrum, dtype=torch.float64)
    total = sum(s * s for s in spectrum)
    held = 0
    for k, s in enumerate(spectrum, start=1):
        held += s * s
        share = float(Fraction(held, total))
        assert rank_for_energy(S, share) == k
        if k < len(spectrum):
            assert rank_for_energy(S, share + 1e-9) == k + 1


def test_all_the_energy_asks_for_no_direction_of_size_zero():
    assert rank_for_energy(planted(20, 15, [5.0, 3.0, 1.0]).matrix, 1.0) == 3
    assert rank_for_energy(planted(20, 15, [5.0, 3.0, 1.0]).matrix.float(), 1.0) == 3


@pytest.mark.parametrize("energy", [0.0, -0.5, 1.0001, math.nan])
def test_energy_outside_its_range_is_refused(energy):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        rank_for_energy(torch.eye(2), energy)
