"""Perplexity and agreement against their definitions."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rankwise.compression import agreement, perplexity
from tests.spectral.planted import frame
from tests.tiny_models import tiny_llama


class Table(nn.Module):
    """Next-token logits by the current token, from a table."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[ids])


def test_perplexity_is_the_geometric_mean_of_inverse_probabilities(generator):
    probabilities = torch.rand(5, 5, generator=generator).softmax(1)
    windows = [torch.randint(5, (3, 6), generator=generator), torch.randint(5, (1, 4), generator=generator)]
    log_sum, count = 0.0, 0
    for window in windows:
        for row in window.tolist():
            for current, following in itertools.pairwise(row):
                log_sum += math.log(float(probabilities[current, following]))
                count += 1
    assert count == 18
    assert perplexity(Table(probabilities.log()), windows) == pytest.approx(math.exp(-log_sum / count), rel=1e-6)


def test_it_agrees_with_the_models_own_loss_and_restores_its_mode():
    model = tiny_llama().train()
    ids = torch.randint(1, 99, (2, 12))
    found = perplexity(model, [ids])
    assert model.training
    with torch.no_grad():
        assert found == pytest.approx(math.exp(float(model.eval()(ids, labels=ids).loss)), rel=1e-5)


def test_too_little_text_is_refused_and_a_hopeless_model_is_infinite():
    with pytest.raises(ValueError, match="no window of at least two tokens"):
        perplexity(Table(torch.zeros(3, 3)), [torch.zeros(4, 1, dtype=torch.long)])
    hopeless = torch.tensor([[0.0, 1e4], [0.0, 1e4]])
    assert perplexity(Table(hopeless), [torch.zeros(1, 3, dtype=torch.long)]) == math.inf


def test_agreement_is_one_for_the_same_features_and_ignores_what_it_should(generator):
    X = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    assert agreement(X, X) == pytest.approx((1.0, 1.0))
    rotated = agreement(X, 3 * X @ frame(6, 6, seed=1) + 2)
    assert rotated.kernel_alignment == pytest.approx(1.0)  # rotation, scale and shift
    assert rotated.cosine < 0.9
    other = agreement(X, torch.randn(30, 6, generator=generator, dtype=torch.float64))
    assert other.kernel_alignment < 0.5


def test_kernel_alignment_is_that_of_the_centred_kernels(generator):
    X, Y = (torch.randn(12, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    H = torch.eye(12, dtype=torch.float64) - 1 / 12
    K, L = H @ X @ X.mT @ H, H @ Y @ Y.mT @ H
    expected = float((K * L).sum() / (K.norm() * L.norm()))
    assert agreement(X, Y).kernel_alignment == pytest.approx(expected, rel=1e-10)


def test_features_of_other_rows_are_refused():
    with pytest.raises(ValueError, match="same two or more rows"):
        agreement(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="same two or more rows"):
        agreement(torch.zeros(1, 2), torch.zeros(1, 2))
    assert math.isnan(agreement(torch.ones(3, 2), torch.ones(3, 2)).kernel_alignment)
