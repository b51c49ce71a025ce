"""The frames hold the gradient, start on the right side of the saddle, and cost what their width says."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rankwise.factorizations import CompressedDeepLinear, invariant_subspaces
from rankwise.spectral import OuterProduct, SparseRows
from tests.spectral.planted import planted

F64 = torch.float64
seeds = st.integers(0, 2**31 - 1)
SHAPES = [(14, 9), (9, 14), (11, 11)]


def seeded(seed: int) -> torch.Generator:
    """Never the seed of a planted frame: random directions must not repeat the gradient's."""
    return torch.Generator().manual_seed(10**12 + seed)


def outside(frame: torch.Tensor, directions: torch.Tensor) -> float:
    """Norm of what the frame does not hold of the directions."""
    return float((directions - frame @ (frame.mT @ directions)).norm())


def assert_orthonormal(frame: torch.Tensor, tolerance: float = 1e-12) -> None:
    eye = torch.eye(frame.shape[1], dtype=frame.dtype)
    assert torch.allclose(frame.mT @ frame, eye, rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", ["compressed", "spectral", "random"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
@given(rank=st.integers(1, 4), seed=seeds)
def test_frames_are_orthonormal_and_have_the_default_width(variant, m, n, rank, seed):
    G = planted(m, n, [0.8**i for i in range(min(m, n))], seed).matrix
    frames = invariant_subspaces(G, rank, variant=variant, generator=seeded(seed))
    width = 2 * rank if variant == "compressed" else rank
    assert frames.left.shape == (m, width)
    assert frames.right.shape == (n, width)
    assert_orthonormal(frames.left)
    assert_orthonormal(frames.right)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@given(rank=st.integers(1, 4), seed=seeds)
def test_compressed_frames_hold_both_gradient_subspaces(m, n, rank, seed):
    """On tall layers too, where orth[V_k, PᵀU_k] of the paper's square case would miss U_k."""
    G, U, _, V = planted(m, n, [0.8**i for i in range(rank)], seed)
    frames = invariant_subspaces(G, rank, generator=seeded(seed))
    assert outside(frames.left, U) < 1e-12
    assert outside(frames.right, V) < 1e-12


@pytest.mark.parametrize(("m", "n"), SHAPES)
@given(rank=st.integers(1, 4), seed=seeds)
def test_an_odd_width_drops_the_weakest_pair_on_the_smaller_side_alone(m, n, rank, seed):
    G, U, _, V = planted(m, n, [0.5**i for i in range(rank)], seed)
    frames = invariant_subspaces(G, rank, width=2 * rank - 1, generator=seeded(seed))
    assert frames.left.shape[1] == frames.right.shape[1] == 2 * rank - 1
    assert_orthonormal(frames.left)
    assert_orthonormal(frames.right)
    (larger, on_larger), (smaller, on_smaller) = ((frames.left, U), (frames.right, V))[:: 1 if m >= n else -1]
    assert outside(larger, on_larger) < 1e-12
    # the k-th direction is separated by a gap of 2^-k, hence the factor
    assert outside(smaller, on_smaller[:, : rank - 1]) < 1e-11
    assert outside(smaller, on_smaller[:, rank - 1 :]) > 1e-6


@pytest.mark.parametrize("size", [4, 5, 6])
def test_compressed_frames_may_fill_the_whole_space(size, generator):
    G = planted(size + 3, size, [0.8**i for i in range(size)]).matrix
    frames = invariant_subspaces(G, 3 if size < 6 else size, width=size, generator=generator)
    assert_orthonormal(frames.left)
    assert_orthonormal(frames.right)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_compressed_pairing_is_crossed(shape):
    """At the start ⟨G, U_j V_jᵀ⟩ averages to zero over draws: gradient directions meet random ones."""
    G = planted(*shape, [1.0, 0.9]).matrix
    starts, draws = [], 100
    for seed in range(draws):
        frames = invariant_subspaces(G, 2, generator=seeded(seed))
        starts.append(float((G * (frames.left @ frames.right.mT)).sum()))
    assert abs(sum(starts) / draws) < 5 * torch.tensor(starts).std().item() / math.sqrt(draws)
    assert max(starts) > 0 > min(starts)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_spectral_start_is_the_steepest_descent_of_the_linear_loss(m, n):
    """⟨G, UVᵀ⟩ = −Σσ, the least that orthonormal frames of this width can reach."""
    G = planted(m, n, [3.0, 2.0, 1.0]).matrix
    frames = invariant_subspaces(G, 2, variant="spectral")
    assert float((G * (frames.left @ frames.right.mT)).sum()) == pytest.approx(-5.0, rel=1e-12)


def test_random_frames_ignore_the_gradient():
    first, second = (
        invariant_subspaces(planted(8, 6, [1.0], seed).matrix, 2, variant="random", generator=seeded(0))
        for seed in (1, 2)
    )
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)
    assert first.singular_values.numel() == 0
    assert math.isnan(first.gradient_norm)
    assert math.isnan(first.captured)


@pytest.mark.parametrize("variant", ["compressed", "spectral"])
def test_what_was_captured_is_the_share_of_energy(variant, generator):
    G = planted(9, 8, [3.0, 2.0, 1.0]).matrix
    frames = invariant_subspaces(G, 2, variant=variant, generator=generator)
    assert frames.singular_values.tolist() == pytest.approx([3.0, 2.0], rel=1e-13)
    assert frames.gradient_norm == pytest.approx(math.sqrt(14), rel=1e-13)
    assert frames.captured == pytest.approx(13 / 14, rel=1e-13)


def test_the_generator_decides_the_frames():
    G = planted(300, 200, [1.0, 0.5]).matrix
    first, again, other = (invariant_subspaces(G, 2, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first.left, again.left)
    assert torch.equal(first.right, again.right)
    assert not torch.allclose(first.right, other.right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_frames_of_narrow_gradients_are_float32(dtype, generator):
    frames = invariant_subspaces(planted(9, 8, [1.0, 0.5]).matrix.to(dtype), 2, generator=generator)
    assert frames.left.dtype == frames.right.dtype == torch.float32
    assert_orthonormal(frames.left, 1e-5)
    assert_orthonormal(frames.right, 1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_the_frames_do_not_depend_on_the_gradients_scale(scale):
    """float32 holds these gradients, though not the squares of their entries."""
    G = planted(9, 8, [1.0, 0.5]).matrix.float()
    plain, scaled = (invariant_subspaces(g, 2, generator=seeded(0)) for g in (G, scale * G))
    assert scaled.captured == pytest.approx(plain.captured, rel=1e-5)
    assert outside(scaled.left, plain.left) < 1e-4


def test_an_outer_product_gives_the_frames_of_its_dense_matrix(generator):
    left, right = (torch.randn(3, d, dtype=F64, generator=generator) for d in (9, 7))
    implicit, dense = (
        invariant_subspaces(g, 3, generator=seeded(0)) for g in (OuterProduct(left, right), left.mT @ right)
    )
    assert outside(implicit.left[:, :3], dense.left[:, :3]) < 1e-12
    assert implicit.captured == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("variant", ["compressed", "spectral"])
@pytest.mark.parametrize("shape", [(6, 5), (300, 200)])
def test_a_zero_gradient_is_refused(variant, shape):
    with pytest.raises(ValueError, match="gradient is zero"):
        invariant_subspaces(torch.zeros(shape), 2, variant=variant)


@pytest.mark.parametrize("variant", ["compressed", "spectral"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_is_refused(variant, bad):
    G = torch.ones(6, 5)
    G[1, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        invariant_subspaces(G, 2, variant=variant)


@pytest.mark.parametrize(
    ("variant", "rank", "width"),
    [
        ("compressed", 0, None),
        ("compressed", 3, None),
        ("compressed", 2, 1),
        ("compressed", 2, 5),
        ("spectral", 6, None),
        ("spectral", 2, 3),
        ("random", 6, None),
        ("random", 0, None),
        ("random", 2, 0),
    ],
)
def test_sizes_that_do_not_fit_are_refused(variant, rank, width):
    with pytest.raises(ValueError, match="rank"):
        invariant_subspaces(torch.ones(6, 5), rank, variant=variant, width=width)


def test_an_unknown_variant_is_refused(unchecked_shapes):
    with pytest.raises(ValueError, match="compressed, spectral, random"):
        invariant_subspaces(torch.eye(3), 1, variant="straight")


def descend(gradient_sign: int, variant: str, steps: int = 9000) -> tuple[float, float]:
    """First and last loss ½‖f − Φ‖² of GD from ε = 1e-3 at depth 3, for Φ of singular values 1 and 0.9."""
    target = planted(8, 6, [1.0, 0.9]).matrix
    frames = invariant_subspaces(gradient_sign * target, 2, variant=variant, generator=seeded(0))
    f = CompressedDeepLinear.from_subspaces(frames, 3, 1e-3)
    U, V, inner = f.left, f.right, f.inner
    first = loss = math.inf
    for _ in range(steps):
        value = 0.5 * (U @ (inner[2] @ inner[1] @ inner[0]) @ V.mT - target).square().sum()
        (step,) = torch.autograd.grad(value, inner)
        with torch.no_grad():
            inner -= 0.3 * step
        loss = value.item()
        first = min(first, loss) if math.isinf(first) else first
        if loss < 1e-9:
            break
    return first, loss


@pytest.mark.parametrize("variant", ["spectral", "compressed"])
def test_gradient_descent_leaves_the_saddle_and_reaches_the_target(variant):
    """The gradient of ½‖f − Φ‖² at f = 0 is −Φ."""
    first, last = descend(-1, variant)
    assert first == pytest.approx(0.905, rel=1e-5)
    assert last < 1e-9


def test_the_straight_pairing_with_plus_g_never_leaves_the_saddle():
    """The spectral variant of the negated gradient joins U_k to V_k uphill: the inner factors shrink to 0.

    4500 steps: with the right sign 3800 suffice.
    """
    first, last = descend(+1, "spectral", steps=4500)
    assert last == pytest.approx(first, rel=1e-6)
    assert last >= 0.905


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_an_embedding_gradient_never_becomes_a_dense_table():
    """30522 × 768 with 120 non-zero rows: nothing larger than a few frames of the table's height."""
    vocabulary, hidden, rank = 30522, 768, 4
    values = planted(120, hidden, [1.0, 0.8, 0.6, 0.4] + [0.02] * 100).matrix.float()
    rows = torch.randperm(vocabulary, generator=seeded(1))[:120]
    G = SparseRows(rows, values, vocabulary)
    with LargestTensor() as largest:
        frames = invariant_subspaces(G, rank, generator=seeded(0))
    assert 2 * rank * vocabulary <= largest.numel <= 4 * vocabulary * 2 * rank

    U, S, Vh = torch.linalg.svd(values.double(), full_matrices=False)
    left, right = frames.left.double(), frames.right.double()
    embedded = torch.zeros(vocabulary, rank, dtype=F64).index_copy_(0, rows, U[:, :rank])
    # float32 frames: eps 1.2e-7 over a relative gap of 0.38, and a sum over 30522 rows
    assert outside(left, embedded) < 1e-4
    assert outside(left[:, :rank], embedded) < 1e-4
    assert outside(right, Vh[:rank].mT) < 1e-4
    assert frames.singular_values.tolist() == pytest.approx(S[:rank].tolist(), rel=1e-5)
    expected = float(S[:rank].square().sum() / S.square().sum())
    assert frames.captured == pytest.approx(expected, rel=1e-5)
    assert_orthonormal(frames.left, 1e-5)
    assert_orthonormal(frames.right, 1e-5)
