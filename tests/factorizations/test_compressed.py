"""The compressed factorization: its product, its construction from full width, its refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.factorizations import (
    CompressedDeepLinear,
    DeepLinear,
    compose,
    identity_factors,
    invariant_subspaces,
)
from rankwise.spectral import truncated_svd
from tests.spectral.planted import frame, planted, projector

F64 = torch.float64
seeds = st.integers(0, 2**31 - 1)


def is_orthonormal(basis: torch.Tensor) -> bool:
    return torch.allclose(basis.mT @ basis, torch.eye(basis.shape[1], dtype=basis.dtype), rtol=0, atol=1e-12)


@given(
    m=st.integers(1, 7), n=st.integers(1, 7), width=st.integers(1, 4), depth=st.integers(1, 4),
    batch=st.sampled_from([(), (3,), (2, 3)]), seed=seeds,
)  # fmt: skip
def test_forward_is_the_dense_product(m, n, width, depth, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right, inner, x = (
        torch.randn(*shape, dtype=F64, generator=generator)
        for shape in ((m, width), (n, width), (depth, width, width), (*batch, n))
    )
    dense = right.mT
    for factor in inner:
        dense = factor @ dense
    dense = left @ dense
    f = CompressedDeepLinear(left, right, inner)
    scale = float(left.norm() * right.norm() * inner.flatten(1).norm(dim=1).prod())
    assert torch.allclose(f.product(), dense, rtol=0, atol=1e-14 * scale)
    assert torch.allclose(f(x), x @ dense.mT, rtol=0, atol=1e-13 * scale)


def test_the_core_applies_index_zero_first():
    first, second = torch.tensor([[0.0, 1], [0, 0]]), torch.tensor([[2.0, 0], [0, 3]])
    assert torch.equal(compose(torch.stack([first, second])), second @ first)
    assert not torch.equal(second @ first, first @ second)


def test_identity_factors_hold_their_own_scales():
    inner = identity_factors(3, 2, [0.5, 2.0, 3.0], dtype=F64)
    assert torch.equal(inner[1], 2 * torch.eye(2, dtype=F64))
    assert torch.equal(compose(inner), 3 * torch.eye(2, dtype=F64))
    assert torch.equal(identity_factors(2, 3, 0.1)[0], 0.1 * torch.eye(3))


def test_identity_factors_refuse_a_wrong_number_of_scales():
    with pytest.raises(ValueError):
        identity_factors(3, 2, [0.1, 0.2])


@pytest.mark.parametrize("train_outer", [False, True])
def test_outer_factors_train_on_request_only(train_outer):
    f = CompressedDeepLinear(
        torch.eye(5)[:, :2], torch.eye(4)[:, :2], identity_factors(3, 2, 0.1), train_outer=train_outer
    )
    f(torch.ones(4)).sum().backward()
    assert f.inner.grad is not None
    assert (f.left.grad is not None) == train_outer
    assert (f.right.grad is not None) == train_outer


def test_starting_values_are_copies():
    left, inner = torch.eye(4)[:, :2], identity_factors(2, 2, 1.0)
    f = CompressedDeepLinear(left, left, inner)
    with torch.no_grad():
        f.left.zero_()
        f.inner.zero_()
    assert float(left.sum()) == 2
    assert float(inner.sum()) == 4


@pytest.mark.parametrize(
    "shapes",
    [((4, 2), (4, 3), (2, 2, 2)), ((4, 3), (4, 2), (2, 2, 2)), ((4, 2), (4, 2), (2, 2, 3)), ((4, 2), (4, 2), (2, 2))],
)
def test_shapes_that_do_not_fit_are_refused(shapes, unchecked_shapes):
    with pytest.raises(ValueError, match=r"expected left \(m, w\)"):
        CompressedDeepLinear(*(torch.ones(shape) for shape in shapes))


def test_from_subspaces_starts_at_the_scaled_frames(generator):
    subspaces = invariant_subspaces(planted(7, 6, [2.0, 1.0]).matrix, 2, generator=generator)
    f = CompressedDeepLinear.from_subspaces(subspaces, 3, [0.1, 0.2, 0.5])
    assert f.inner.dtype == F64
    assert torch.allclose(f.product(), 0.01 * subspaces.left @ subspaces.right.mT, rtol=1e-12)


@given(d=st.integers(4, 12), k=st.integers(1, 3), depth=st.integers(1, 4), seed=seeds)
def test_from_full_width_holds_the_gradient_and_starts_on_the_full_product(d, k, depth, seed):
    """U₁U₁ᵀ f(0) V₁V₁ᵀ is the compressed start, and both gradient subspaces lie in the frames."""
    k = min(k, d // 2)
    scales = [0.1 * (i + 1) for i in range(depth)]
    deep = DeepLinear.orthogonal(d, depth, scales, generator=torch.Generator().manual_seed(seed), dtype=F64)
    G, U, _, V = planted(d, d, [1.0, 0.7, 0.5][:k], seed)
    f = CompressedDeepLinear.from_full_width(deep, G, k)
    assert f.inner.shape == (depth, 2 * k, 2 * k)
    assert is_orthonormal(f.left)
    assert is_orthonormal(f.right)
    # the overlap of two random k-frames in R^d can be near-degenerate when 2k is near d
    assert float((U - f.left @ (f.left.mT @ U)).norm()) < 1e-10
    assert float((V - f.right @ (f.right.mT @ V)).norm()) < 1e-10
    start = deep.product()
    assert torch.allclose(projector(f.left) @ start @ projector(f.right), f.product(), rtol=0, atol=1e-12)
    assert torch.allclose(start @ f.right, f.left @ f.core(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [2, 3])
def test_from_full_width_survives_a_gradient_that_meets_itself_through_the_factors(rank):
    """Identity factors are orthogonal too; with a symmetric gradient PᵀU_k and V_k then span one space."""
    deep = DeepLinear([0.1 * torch.eye(10, dtype=F64)] * 3)
    G = torch.diag(torch.arange(10.0, 0.0, -1.0, dtype=F64))
    f = CompressedDeepLinear.from_full_width(deep, G, rank)
    assert is_orthonormal(f.right)
    assert is_orthonormal(f.left)


def test_from_full_width_leaves_the_given_factors_alone(generator):
    deep = DeepLinear.orthogonal(8, 2, 0.1, generator=generator, dtype=F64)
    before = deep.product().detach().clone()
    f = CompressedDeepLinear.from_full_width(deep, planted(8, 8, [1.0]).matrix, 1)
    with torch.no_grad():
        f.inner.zero_()
    assert torch.equal(deep.product(), before)


def test_factors_that_are_not_scaled_orthogonal_are_refused(generator):
    deep = DeepLinear.orthogonal(8, 3, 0.1, generator=generator, dtype=F64)
    with torch.no_grad():
        deep.weights[1][0, 0] += 1e-3
    with pytest.raises(ValueError, match="factor 2 is not a scaled orthogonal"):
        CompressedDeepLinear.from_full_width(deep, torch.eye(8, dtype=F64), 2)


def test_zero_factors_are_refused():
    with pytest.raises(ValueError, match="factor 1 is not a scaled orthogonal"):
        CompressedDeepLinear.from_full_width(DeepLinear([torch.zeros(4, 4)]), torch.eye(4), 1)


def test_rectangular_factors_are_refused():
    deep = DeepLinear([frame(8, 6, 0), frame(8, 6, 1).mT])
    with pytest.raises(ValueError, match=r"square factors, got shape \(8, 6\) for factor 1"):
        CompressedDeepLinear.from_full_width(deep, torch.eye(6, dtype=F64), 2)


def test_a_block_wider_than_the_network_is_refused(generator):
    deep = DeepLinear.orthogonal(5, 2, 0.1, generator=generator, dtype=F64)
    with pytest.raises(ValueError, match="2·rank = 6 exceeds the width 5"):
        CompressedDeepLinear.from_full_width(deep, torch.eye(5, dtype=F64), 3)


def test_an_overestimated_rank_still_holds_the_gradient(generator):
    deep = DeepLinear.orthogonal(12, 3, 0.1, generator=generator, dtype=F64)
    G, U, _, _ = planted(12, 12, [1.0, 0.5])
    f = CompressedDeepLinear.from_full_width(deep, G, 4)
    assert is_orthonormal(f.left)
    assert float((U - f.left @ (f.left.mT @ U)).norm()) < 1e-12
    assert truncated_svd(f.product().detach(), 8).error < 1e-15
