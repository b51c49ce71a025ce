"""The two low-rank layers compute what the dense layer with the multiplied-out weight computes."""

import pytest
import torch
from torch import nn

from rankwise.compression import LowRankConv2d, LowRankLinear, factorize_model
from tests.spectral.planted import planted

F64 = torch.float64


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("m", "n"), [(9, 14), (14, 9)])
def test_from_linear_is_the_nearest_layer_of_its_rank(m, n, bias):
    linear = nn.Linear(n, m, bias=bias, dtype=F64)
    low_rank = LowRankLinear.from_linear(linear, 4)
    S = torch.linalg.svdvals(linear.weight)
    assert torch.linalg.matrix_rank(low_rank.weight) == 4
    # Eckart & Young: no matrix of rank 4 is nearer than the root of the energy cut off
    torch.testing.assert_close((linear.weight - low_rank.weight).norm(), S[4:].norm(), rtol=1e-12, atol=0)
    x = torch.randn(3, 5, n, dtype=F64)
    expected = nn.functional.linear(x, low_rank.weight, linear.bias)
    torch.testing.assert_close(low_rank(x), expected, rtol=1e-12, atol=1e-12)
    assert (low_rank.bias is None) == (not bias)


def test_a_planted_rank_is_reproduced_and_the_factors_share_the_scale():
    linear = nn.Linear(20, 12, dtype=F64)
    with torch.no_grad():
        linear.weight.copy_(planted(12, 20, [9.0, 4.0, 1.0]).matrix)
    low_rank = LowRankLinear.from_linear(linear, 3)
    torch.testing.assert_close(low_rank.weight, linear.weight, rtol=0, atol=1e-12)
    roots = torch.tensor([3.0, 2.0, 1.0], dtype=F64)
    torch.testing.assert_close(low_rank.left.norm(dim=0), roots, rtol=1e-12, atol=0)
    torch.testing.assert_close(low_rank.right.norm(dim=1), roots, rtol=1e-12, atol=0)


def test_more_rank_than_the_weight_has_gives_finite_factors():
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight.zero_()
    low_rank = LowRankLinear.from_linear(linear, 3)
    assert torch.equal(low_rank.weight, torch.zeros(8, 8))
    assert all(bool(torch.isfinite(factor).all()) for factor in low_rank.parameters())


def test_the_original_is_neither_changed_nor_shared():
    linear = nn.Linear(8, 8)
    before = linear.bias.detach().clone()
    low_rank = LowRankLinear.from_linear(linear, 2)
    with torch.no_grad():
        low_rank.bias.add_(1)
    assert torch.equal(linear.bias, before)


def test_bfloat16_stays_bfloat16_and_is_decomposed_in_float32():
    linear = nn.Linear(32, 32, dtype=torch.bfloat16)
    low_rank = LowRankLinear.from_linear(linear, 32)
    assert {p.dtype for p in low_rank.parameters()} == {torch.bfloat16}
    error = (low_rank.weight.float() - linear.weight.float()).norm() / linear.weight.float().norm()
    # rounding of two factors and of their product to 8 bits each, not that of an SVD in bf16
    assert error < 3 * torch.finfo(torch.bfloat16).eps


def test_a_fresh_layer_starts_with_the_scale_of_a_dense_one():
    torch.manual_seed(0)
    dense, low_rank = nn.Linear(400, 300), LowRankLinear(400, 300, 50)
    assert 0.8 < (low_rank.weight.std() / dense.weight.std()).item() < 1.2
    assert float(low_rank.bias.abs().max()) == 0


@pytest.mark.parametrize("rank", [0, 9, 2.0, True])
def test_an_impossible_rank_is_refused(rank):
    with pytest.raises(ValueError, match="rank of a 8 × 10 matrix must be a whole number from 1 to 8"):
        LowRankLinear.from_linear(nn.Linear(10, 8), rank)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": 2, "padding_mode": "reflect"},
        {"kernel_size": (1, 3), "padding": (0, 1), "bias": False},
    ],
)
def test_a_convolution_becomes_a_pair_with_its_kernel_cut(options):
    settings: dict = {"kernel_size": 3, **options}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 10, **settings, dtype=F64))
    dense = model[0]
    done = factorize_model(model, ranks=3)
    pair = model[0]
    assert isinstance(pair, LowRankConv2d)
    assert done.ranks == {"0": 3}
    assert sum(p.numel() for p in pair.parameters() if p.ndim > 1) == 3 * (10 + dense.weight[0].numel())
    kernel = dense.weight.detach().flatten(1)
    S = torch.linalg.svdvals(kernel)
    torch.testing.assert_close((kernel - pair.weight.flatten(1)).norm(), S[3:].norm(), rtol=1e-12, atol=0)
    x = torch.randn(2, 6, 11, 12, dtype=F64)
    got = pair(x)
    with torch.no_grad():
        dense.weight.copy_(pair.weight)
    torch.testing.assert_close(got, dense(x), rtol=1e-12, atol=1e-12)


def test_a_grouped_convolution_is_refused():
    with pytest.raises(ValueError, match="2 groups"):
        LowRankConv2d.like(nn.Conv2d(4, 4, 3, groups=2), 1)
