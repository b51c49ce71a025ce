"""truncated_svd against planted spectra and dense float64 LAPACK."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.spectral import truncated_svd
from rankwise.spectral.operators import DenseMatrix
from tests.spectral.planted import F64_EPS, frame, planted, projector, spectral_norm

sizes = st.integers(1, 14)
seeds = st.integers(0, 2**31 - 1)

LARGE = (220, 160)
DECAYING = [1.0, 0.8, 0.6, 0.5, 0.4]
TAIL = 0.02


@st.composite
def planted_with_rank(draw):
    """A small matrix with a full planted spectrum, and a rank to cut it at."""
    m, n = draw(sizes), draw(sizes)
    spectrum = sorted(
        draw(st.lists(st.floats(1e-3, 1e3), min_size=min(m, n), max_size=min(m, n))),
        reverse=True,
    )
    return planted(m, n, spectrum, draw(seeds)), draw(st.integers(1, min(m, n)))


def large(tail: float = TAIL, seed: int = 0, shape: tuple[int, int] = LARGE):
    """Five planted directions over a flat tail of all the remaining ones: the hard case for a sketch."""
    return planted(*shape, DECAYING + [tail] * (min(shape) - len(DECAYING)), seed)


@given(planted_with_rank())
def test_exact_route_recovers_the_planted_spectrum(case):
    matrix, rank = case[0].matrix, case[1]
    svd = truncated_svd(matrix, rank)
    tolerance = 100 * F64_EPS * float(case[0].S[0])
    assert torch.allclose(svd.S, case[0].S[:rank], rtol=0, atol=tolerance)
    eye = torch.eye(rank, dtype=torch.float64)
    assert torch.allclose(svd.U.mT @ svd.U, eye, atol=100 * F64_EPS)
    assert torch.allclose(svd.Vh @ svd.Vh.mT, eye, atol=100 * F64_EPS)


@given(planted_with_rank())
def test_exact_error_is_the_next_singular_value_and_the_true_residual(case):
    (matrix, _, S, _), rank = case
    svd = truncated_svd(matrix, rank)
    tolerance = 100 * F64_EPS * float(S[0])
    following = float(S[rank]) if rank < len(S) else 0.0
    assert svd.error == pytest.approx(following, abs=tolerance)
    assert spectral_norm(matrix - svd.U * svd.S @ svd.Vh) == pytest.approx(following, abs=tolerance)


@given(m=st.integers(5, 14), n=st.integers(5, 14), rank=st.integers(1, 4), seed=seeds)
def test_exact_route_recovers_the_planted_subspaces(m, n, rank, seed):
    A, U, _, V = planted(m, n, [2.0**-i for i in range(min(m, n))], seed)
    svd = truncated_svd(A, rank)
    # the gap σ_r − σ_{r+1} is σ₁/2^r, so the subspaces are conditioned like 2^r ≤ 16
    assert torch.allclose(projector(svd.U), projector(U[:, :rank]), atol=2000 * F64_EPS)
    assert torch.allclose(projector(svd.Vh.mT), projector(V[:, :rank]), atol=2000 * F64_EPS)


@pytest.mark.parametrize("shape", [(400, 300), LARGE[::-1]])
def test_randomized_route_recovers_a_planted_spectrum_over_a_flat_tail(shape, generator):
    A, U, S, V = large(shape=shape)
    svd = truncated_svd(A, 5, generator=generator)
    # Nine passes damp the tail by (0.02/0.4)^9 ≈ 2e-12 in the vectors, a factor up to √300 larger for the sketch;
    # singular values are second order in that.
    assert torch.allclose(svd.S, S[:5], rtol=0, atol=1e-12)
    assert torch.allclose(projector(svd.U), projector(U[:, :5]), atol=1e-9)
    assert torch.allclose(projector(svd.Vh.mT), projector(V[:, :5]), atol=1e-9)


def test_power_iterations_sharpen_a_slowly_decaying_spectrum():
    A, U, _, _ = planted(200, 150, [0.97**i for i in range(150)])
    distances = [
        spectral_norm(
            projector(truncated_svd(A, 5, power_iterations=q, generator=torch.Generator().manual_seed(0)).U)
            - projector(U[:, :5])
        )
        for q in (0, 4, 12)
    ]
    assert distances[0] > 3 * distances[2]
    assert distances[0] > distances[1] > distances[2]


class _Counted(DenseMatrix):
    """A dense matrix that counts the products made with it."""

    products = 0

    def matmul(self, X):
        self.products += 1
        return super().matmul(X)

    def rmatmul(self, X):
        self.products += 1
        return super().rmatmul(X)


def test_power_iterations_end_where_the_sketch_holds_the_matrix(generator):
    """Rank 5 under a sketch of 13 columns: one iteration instead of four, and every digit of the result."""
    A, U, S, V = large(tail=0.0)
    low_rank = _Counted(A)
    svd = truncated_svd(low_rank, 5, generator=generator, estimate_error=False)
    assert low_rank.products == 4
    assert torch.allclose(svd.S, S[:5], rtol=0, atol=100 * F64_EPS)
    assert torch.allclose(projector(svd.U), projector(U[:, :5]), atol=100 * F64_EPS)
    assert torch.allclose(projector(svd.Vh.mT), projector(V[:, :5]), atol=100 * F64_EPS)
    with_a_tail = _Counted(large(tail=0.39)[0])
    truncated_svd(with_a_tail, 5, generator=generator, estimate_error=False)
    assert with_a_tail.products == 10


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tail", [0.02, 0.39, 0.0])
def test_randomized_error_bounds_the_true_residual(seed, tail):
    A, _, _, _ = large(tail, seed)
    svd = truncated_svd(A, 5, power_iterations=1, generator=torch.Generator().manual_seed(seed))
    residual = spectral_norm(A - svd.U * svd.S @ svd.Vh)
    assert residual <= svd.error
    # Not vacuous either: a Gaussian probe sees at most ‖residual‖_F times a few.
    frobenius = float(torch.linalg.matrix_norm(A - svd.U * svd.S @ svd.Vh))
    assert svd.error <= 10 * 3 * frobenius + 1e-12


def test_error_is_nan_when_not_estimated(generator):
    A, _, S, _ = large()
    svd = truncated_svd(A, 5, generator=generator, estimate_error=False)
    assert math.isnan(svd.error)
    assert torch.allclose(svd.S, S[:5], atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 9), LARGE])
def test_singular_values_do_not_move_under_rotations(shape):
    A, _, _, _ = large(shape=shape) if shape == LARGE else planted(*shape, [1.1**-i for i in range(9)])
    m, n = shape
    rotated = frame(m, m, 77) @ A @ frame(n, n, 78)
    first, second = (truncated_svd(X, 5, generator=torch.Generator().manual_seed(1)).S for X in (A, rotated))
    # the sketch differs after a rotation, so the randomized route agrees to its own accuracy only
    assert torch.allclose(first, second, rtol=0, atol=1e-12)


@given(m=sizes, n=sizes, factor=st.sampled_from([1e-100, 1e-3, 1e100]), seed=seeds)
def test_scaling_the_matrix_scales_values_and_error(m, n, factor, seed):
    A = planted(m, n, [1.0 / (i + 1) for i in range(min(m, n))], seed).matrix
    plain, scaled = truncated_svd(A, 1), truncated_svd(factor * A, 1)
    assert torch.allclose(scaled.S / factor, plain.S, rtol=100 * F64_EPS)
    assert scaled.error / factor == pytest.approx(plain.error, abs=100 * F64_EPS)


def test_the_same_generator_state_gives_the_same_bits():
    A = large().matrix
    first, second = (truncated_svd(A, 4, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.S, second.S)
    assert torch.equal(first.Vh, second.Vh)
    assert first.error == second.error


def test_a_generator_leaves_the_global_random_state_alone(generator):
    before = torch.get_rng_state()
    truncated_svd(large().matrix, 4, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (1, 500)])
def test_one_row_or_one_column(shape):
    A = planted(*shape, [3.0]).matrix
    svd = truncated_svd(A, 1)
    assert svd.error == 0.0
    assert float(svd.S) == pytest.approx(3.0, rel=10 * F64_EPS)
    assert torch.allclose(svd.U * svd.S @ svd.Vh, A, atol=100 * F64_EPS)


@pytest.mark.parametrize("shape", [(6, 4), LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_zero_matrix_has_orthonormal_vectors_and_zero_values(shape, dtype, generator):
    svd = truncated_svd(torch.zeros(shape, dtype=dtype), 3, generator=generator)
    assert torch.equal(svd.S, torch.zeros(3, dtype=dtype))
    assert svd.error == 0.0
    eye, tolerance = torch.eye(3, dtype=dtype), 100 * torch.finfo(dtype).eps
    assert torch.allclose(svd.U.mT @ svd.U, eye, atol=tolerance)
    assert torch.allclose(svd.Vh @ svd.Vh.mT, eye, atol=tolerance)


@pytest.mark.parametrize("shape", [(9, 9), LARGE])
def test_more_triplets_than_the_rank_are_padded_with_zeros_and_stay_orthonormal(shape, generator):
    A = planted(*shape, [2.0, 1.0]).matrix
    svd = truncated_svd(A, 5, generator=generator)
    assert torch.allclose(svd.S, torch.tensor([2.0, 1.0, 0, 0, 0], dtype=torch.float64), atol=1e-13)
    assert torch.allclose(svd.U.mT @ svd.U, torch.eye(5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(svd.Vh @ svd.Vh.mT, torch.eye(5, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("shape", [(20, 15), LARGE])
@pytest.mark.parametrize(
    ("dtype", "algebra"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_the_algebra_runs_in_float32_or_better(shape, dtype, algebra, generator):
    spectrum = DECAYING + [TAIL] * (min(shape) - len(DECAYING))
    A = planted(*shape, spectrum).matrix.to(dtype)
    svd = truncated_svd(A, 5, generator=generator)
    assert {t.dtype for t in svd[:3]} == {algebra}
    exact = torch.linalg.svdvals(A.double())[:5]
    # against the *rounded* input: what is left is the algebra's own error, never bf16's 4e-3
    assert torch.allclose(svd.S.double(), exact, rtol=0, atol=50 * torch.finfo(algebra).eps)


@pytest.mark.parametrize("rank", [0, -1, 5, 100])
def test_rank_out_of_range_is_refused_and_the_message_names_the_limit(rank):
    with pytest.raises(ValueError, match=rf"min\(m, n\) = 4 .*7×4.*{rank}"):
        truncated_svd(torch.zeros(7, 4), rank)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(6, 4), LARGE])
def test_non_finite_entries_are_refused(bad, shape):
    A = torch.ones(shape)
    A[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        truncated_svd(A, 2)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_matrices_are_refused(shape):
    with pytest.raises(ValueError, match="non-empty"):
        truncated_svd(torch.zeros(shape), 1)


@pytest.mark.parametrize("matrix", [torch.ones(3, 3, dtype=torch.int64), [[1.0, 2.0]], "matrix"])
def test_what_is_not_a_floating_matrix_is_refused(matrix):
    with pytest.raises(TypeError):
        truncated_svd(matrix, 1)


def test_a_negative_oversample_never_returns_fewer_triplets_than_asked_for(generator):
    try:
        svd = truncated_svd(large().matrix, 3, oversample=-2, generator=generator)
    except ValueError:
        return
    assert svd.S.shape == (3,)


@settings(max_examples=5)
@given(seed=seeds, rank=st.integers(1, 6))
def test_both_routes_agree(seed, rank):
    """140 × 130 goes through LAPACK when nearly all triplets are asked for and through the sketch otherwise."""
    A = planted(140, 130, [0.5**i for i in range(20)], seed).matrix
    sketched = truncated_svd(A, rank, generator=torch.Generator().manual_seed(seed))
    exact = truncated_svd(A, rank, oversample=130)
    # 2^-9 per pass at the sketch's 8 extra columns leaves only rounding
    assert torch.allclose(sketched.S, exact.S, rtol=0, atol=100 * F64_EPS)
    assert torch.allclose(
        sketched.U * sketched.S @ sketched.Vh, exact.U * exact.S @ exact.Vh, rtol=0, atol=1000 * F64_EPS
    )
