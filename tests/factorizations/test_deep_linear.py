"""The full-width factorization is the product it says it is."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.factorizations import DeepLinear

F64 = torch.float64


@st.composite
def chains(draw):
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    pairs = itertools.pairwise(sizes)
    return [torch.randn(upper, lower, dtype=F64, generator=generator) for lower, upper in pairs]


@given(chains())
def test_product_and_forward_apply_the_first_factor_first(weights):
    deep = DeepLinear(weights)
    expected = torch.eye(weights[0].shape[1], dtype=F64)
    for weight in weights:
        expected = weight @ expected
    scale = float(torch.stack([w.norm() for w in weights]).prod())
    tolerance = 1e-14 * max(scale, 1.0)
    assert deep.depth == len(weights)
    assert torch.allclose(deep.product(), expected, rtol=0, atol=tolerance)
    x = torch.ones(2, 3, weights[0].shape[1], dtype=F64)
    assert torch.allclose(deep(x), x @ expected.mT, rtol=0, atol=10 * tolerance)


def test_every_factor_is_trained_and_none_is_shared_with_the_caller():
    given_weights = [torch.eye(3), 2 * torch.eye(3)]
    deep = DeepLinear(given_weights)
    deep.product().sum().backward()
    assert all(weight.grad is not None for weight in deep.parameters())
    assert len(list(deep.parameters())) == 2
    with torch.no_grad():
        deep.weights[0].mul_(5)
    assert torch.equal(given_weights[0], torch.eye(3))


@given(width=st.integers(1, 9), scales=st.lists(st.floats(1e-3, 2.0), min_size=1, max_size=5))
def test_orthogonal_start_has_one_singular_value_the_product_of_the_scales(width, scales):
    deep = DeepLinear.orthogonal(width, len(scales), scales, dtype=F64)
    for weight, scale in zip(deep.weights, scales, strict=True):
        assert torch.allclose(weight.mT @ weight, scale**2 * torch.eye(width, dtype=F64), rtol=0, atol=1e-13)
    expected = torch.full((width,), float(torch.tensor(scales, dtype=F64).prod()), dtype=F64)
    assert torch.allclose(torch.linalg.svdvals(deep.product().detach()), expected, rtol=1e-12)


def test_factors_are_independent_and_the_generator_decides_them():
    first, again, other = (
        DeepLinear.orthogonal(5, 2, 1.0, generator=torch.Generator().manual_seed(s)).weights for s in (0, 0, 1)
    )
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(first[0], other[0])


def test_sizes_that_do_not_chain_are_refused():
    with pytest.raises(ValueError, match="factor 2 ends in 5 rows but factor 3 has 4 columns"):
        DeepLinear([torch.ones(3, 2), torch.ones(5, 3), torch.ones(2, 4)])


def test_no_factors_are_refused():
    with pytest.raises(ValueError, match="at least one factor"):
        DeepLinear([])
    with pytest.raises(ValueError, match="at least one factor"):
        DeepLinear.orthogonal(4, 0, 0.1)


@pytest.mark.parametrize("scales", [[0.1], [0.1, 0.2, 0.3]])
def test_a_wrong_number_of_scales_is_refused(scales):
    with pytest.raises(ValueError, match="2 of them"):
        DeepLinear.orthogonal(4, 2, scales)
