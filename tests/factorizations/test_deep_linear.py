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


STARTS = [DeepLinear.orthogonal, DeepLinear.gaussian, DeepLinear.uniform]


@pytest.mark.parametrize("start", STARTS)
def test_widths_may_differ_from_layer_to_layer(start):
    deep = start([5, 9, 4, 7], init_scale=[0.1, 0.2, 0.3], dtype=F64)
    assert [tuple(weight.shape) for weight in deep.weights] == [(9, 5), (4, 9), (7, 4)]
    assert deep.product().shape == (7, 5)
    assert all(weight.dtype == F64 for weight in deep.weights)


def test_rectangular_orthogonal_factors_are_semi_orthogonal_on_their_smaller_side():
    tall, flat = DeepLinear.orthogonal([5, 9, 4], init_scale=[0.5, 2.0], dtype=F64).weights
    assert torch.allclose(tall.mT @ tall, 0.25 * torch.eye(5, dtype=F64), rtol=0, atol=1e-13)
    assert torch.allclose(flat @ flat.mT, 4 * torch.eye(4, dtype=F64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("sizes", [(200, 200), (300, 100), (100, 300)])
@pytest.mark.parametrize("start", STARTS)
def test_every_start_has_the_mean_square_of_the_orthogonal_one(start, sizes):
    n, m = sizes
    weight = start([n, m], init_scale=0.3, generator=torch.Generator().manual_seed(0), dtype=F64).weights[0].detach()
    # 20,000 to 40,000 entries or more: their mean square scatters by √(2/20,000) = 1 %; five of that
    assert float(weight.square().sum()) == pytest.approx(0.09 * min(m, n), rel=0.05)
    assert abs(float(weight.mean())) < 5 * float(weight.std()) / (m * n) ** 0.5


def test_uniform_entries_fill_their_interval_and_gaussian_ones_have_tails():
    uniform, gaussian = (
        start(100, 1, 1.0, generator=torch.Generator().manual_seed(0), dtype=F64).weights[0].detach()
        for start in (DeepLinear.uniform, DeepLinear.gaussian)
    )
    edge = (3 / 100) ** 0.5
    assert 0.99 * edge < float(uniform.max()) <= edge
    assert -edge <= float(uniform.min()) < -0.99 * edge
    assert float(gaussian.abs().max()) > 1.5 * edge


@pytest.mark.parametrize("start", STARTS)
def test_starts_come_from_their_generator(start):
    first, again, other = (start(4, 2, generator=torch.Generator().manual_seed(s)).weights[1] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4,), "give depth too"),
        (([4, 5, 6], 3), "leave depth out"),
        (([4, 0, 6],), "at least 1"),
        (([4, 5], None, [0.1, 0.2]), "one init_scale or 1"),
    ],
)
def test_sizes_that_say_too_little_or_too_much_are_refused(start, arguments, message):
    with pytest.raises(ValueError, match=message):
        start(*arguments)
