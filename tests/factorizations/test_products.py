"""All factors' gradients from one pass each way: right by autograd, and no product twice."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rankwise.factorizations import factor_gradients, prefix_products

F64 = torch.float64


def chain(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = itertools.pairwise(sizes)
    return [torch.randn(m, n, dtype=F64, generator=generator) for n, m in pairs]


@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=7), seed=st.integers(0, 2**31 - 1))
def test_gradients_are_autograds(sizes, seed):
    factors = chain(sizes, seed)
    G = torch.randn(sizes[-1], sizes[0], dtype=F64, generator=torch.Generator().manual_seed(seed + 1))
    variables = [factor.clone().requires_grad_() for factor in factors]
    f = variables[0]
    for factor in variables[1:]:
        f = factor @ f
    expected = torch.autograd.grad((f * G).sum(), variables)
    prefixes = prefix_products(factors)
    assert torch.allclose(prefixes[-1], f, rtol=1e-13, atol=1e-12)
    scale = float(torch.stack([factor.norm() for factor in factors]).clamp_min(1).prod() * G.norm())
    for got, want in zip(factor_gradients(factors, prefixes, G), expected, strict=True):
        assert torch.allclose(got, want, rtol=0, atol=1e-13 * scale)


class CountProducts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "mm" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_a_step_costs_three_products_for_every_factor_but_one(depth):
    factors = chain([4] * (depth + 1), 0)
    with CountProducts() as counted:
        factor_gradients(factors, prefix_products(factors), torch.ones(4, 4, dtype=F64))
    assert counted.count == 3 * (depth - 1)


def test_gradients_are_written_where_they_are_wanted_and_skipped_where_they_are_not():
    factors = chain([3, 4, 5, 2], 0)
    prefixes, G = prefix_products(factors), torch.ones(2, 3, dtype=F64)
    plain = factor_gradients(factors, prefixes, G)
    buffer = torch.full((3, 4), torch.nan, dtype=F64)  # a transposed view is filled as well
    with CountProducts() as counted:
        factor_gradients(factors, prefixes, G, out=[buffer.mT, None, None])
    assert torch.equal(buffer.mT, plain[0])
    assert counted.count == 2
