"""The compression of a wide target at its start, and what it refuses; its trajectory is in tests/properties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.factorizations import DeepLinear, compress_wide_target
from tests.spectral.planted import frame, planted

F64 = torch.float64


def wide(d, k, depth, seed=0):
    generator = torch.Generator().manual_seed(10**9 + seed)
    below = DeepLinear.orthogonal(d, depth - 1, 0.3, generator=generator, dtype=F64).weights
    return DeepLinear([*below, torch.randn(k, d, dtype=F64, generator=generator)])


@given(k=st.integers(1, 3), r=st.integers(1, 3), depth=st.integers(2, 4), seed=st.integers(0, 10**6))
def test_the_start_is_the_whole_start_and_holds_the_gradient(k, r, depth, seed):
    r, d = min(r, k), 12
    deep = wide(d, k, depth, seed)
    G, _, _, V = planted(k, d, [1.0, 0.7, 0.5][:r], seed)
    f = compress_wide_target(deep, G, r)
    assert f.left.shape == (k, k + r)
    assert f.right.shape == (d, k + r)
    assert f.inner.shape == (depth - 1, k + r, k + r)
    assert torch.allclose(f.right.mT @ f.right, torch.eye(k + r, dtype=F64), atol=1e-12)
    assert torch.allclose(f.product(), deep.product(), rtol=0, atol=1e-12)
    assert float((V - f.right @ (f.right.mT @ V)).norm()) < 1e-11
    assert f.left.requires_grad
    assert f.inner.requires_grad
    assert not f.right.requires_grad


def test_what_has_no_such_block_is_refused():
    deep, G = wide(10, 3, 3), torch.ones(3, 10, dtype=F64)
    with pytest.raises(ValueError, match=r"rows \+ rank = 3 \+ 7"):
        compress_wide_target(deep, G, 7)
    with pytest.raises(ValueError, match="depth ≥ 2"):
        compress_wide_target(DeepLinear([frame(10, 3, 0).mT]), G, 1)
    with torch.no_grad():
        deep.weights[1][0, 0] += 0.01
    with pytest.raises(ValueError, match="factor 2 is not a scaled orthogonal"):
        compress_wide_target(deep, G, 1)
