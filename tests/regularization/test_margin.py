"""Margins and their losses: against loops, autograd, and far beyond where the loss underflows."""

import math
from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.regularization import margins
from rankwise.regularization.margin import LOSSES, activations, layer_gradients, output_margins, pull_on_outputs
from tests.regularization.classes import clouds
from tests.regularization.minimizing import F64, gaussians

seeds = st.integers(0, 2**31 - 1)


def plain_loss(name: str, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """F as it is written, without any care for large numbers."""
    if name == "logistic":
        return torch.nn.functional.cross_entropy(outputs.mT, y, reduction="sum")
    own = outputs[y, torch.arange(len(y))]
    return torch.exp(outputs - own).sum() - len(y)


@given(depth=st.integers(1, 4), classes=st.integers(2, 4), seed=seeds)
def test_margins_are_differences_of_outputs(depth, classes, seed):
    sizes = [3, *[5] * (depth - 1), classes]
    weights = gaussians(list(zip(sizes[1:], sizes[:-1], strict=True)), seed)
    X = gaussians([(3, 6)], seed)[0]
    y = torch.randint(classes, (6,), generator=torch.Generator().manual_seed(seed))
    f = reduce(lambda below, weight: weight @ below, weights, X)
    Q = margins(weights, X, y)
    for i in range(6):
        for c in range(classes):
            expected = math.inf if c == y[i] else float(f[y[i], i] - f[c, i])
            assert float(Q[c, i]) == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("name", LOSSES)
@given(depth=st.integers(1, 4), scale=st.floats(0.1, 2.0), seed=seeds)
def test_log_loss_and_gradients_are_autograds(name, depth, scale, seed):
    sizes = [4, *[3] * (depth - 1), 3]
    weights = [w.requires_grad_() for w in gaussians(list(zip(sizes[1:], sizes[:-1], strict=True)), seed, scale)]
    X, y = gaussians([(4, 5)], seed + 1)[0], torch.tensor([0, 1, 2, 1, 0])
    expected = plain_loss(name, reduce(lambda below, weight: weight @ below, weights, X), y).log()
    by_autograd = torch.autograd.grad(expected, weights)
    with torch.no_grad():
        H = activations(weights, X)
        log_loss, pull = LOSSES[name].log_value_and_pull(output_margins(H[-1], y))
        gradients = layer_gradients(weights, H, -pull_on_outputs(pull, y))
    assert float(log_loss) == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    for closed, other in zip(gradients, by_autograd, strict=True):
        assert torch.allclose(closed, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8])
def test_far_below_every_float_log_loss_and_pull_are_exact(name, scale):
    """log F = −q + log(number of smallest margins), the pull is shared by them alone; F is e^{−1e8}."""
    Q = scale * torch.tensor([[math.inf, 2.0, 1.0], [1.0, math.inf, 3.0]], dtype=F64)
    log_loss, pull = LOSSES[name].log_value_and_pull(Q)
    assert float(log_loss) == pytest.approx(-scale + math.log(2), rel=1e-14)
    assert torch.allclose(pull, torch.tensor([[0, 0, 0.5], [0.5, 0, 0]], dtype=F64), atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_far_on_the_wrong_side_nothing_overflows(name):
    Q = torch.tensor([[math.inf, -1e6], [5.0, math.inf]], dtype=F64)
    log_loss, pull = LOSSES[name].log_value_and_pull(Q)
    # F is e^{1e6}, whose log has slope 1, or 1e6 + log(1 + e^{−5})
    expected = (1e6, 1.0) if name == "exponential" else (math.log(1e6 + math.log1p(math.exp(-5))), 1e-6)
    assert (float(log_loss), float(pull[0, 1])) == pytest.approx(expected, rel=1e-12)


def test_the_logistic_loss_keeps_every_digit_on_its_way_to_underflow():
    for z in torch.linspace(-600, 30, 2000, dtype=F64).tolist():
        log_loss, pull = LOSSES["logistic"].log_value_and_pull(torch.tensor([[math.inf], [-z]], dtype=F64))
        loss = math.log1p(math.exp(z))
        assert float(log_loss) == pytest.approx(math.log(loss), rel=1e-15, abs=1e-15)
        assert float(pull[1]) == pytest.approx(1 / (1 + math.exp(-z)) / loss, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@given(seed=seeds)
def test_a_loss_below_that_of_no_margin_leaves_every_margin_positive(name, seed):
    Q = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(seed)) * 2 + 1
    log_loss, _ = LOSSES[name].log_value_and_pull(Q)
    limit = math.log(LOSSES[name].of_no_margin)
    assert float(log_loss) >= limit or float(Q.min()) > 0
    # and it is the largest such number: one margin of zero and all others infinite has just this loss
    Q = torch.full((3, 4), math.inf, dtype=F64)
    Q[1, 2] = 0
    # the other samples of the logistic loss are all log(1 + 0)
    assert float(LOSSES[name].log_value_and_pull(Q)[0]) == pytest.approx(limit, abs=1e-15)


DATA = clouds(3, 4, 2)


@pytest.mark.parametrize(
    ("weights", "X", "y", "message"),
    [
        ([], DATA.X, DATA.y, "at least one weight"),
        ([torch.ones(3, 5, dtype=F64)], DATA.X, DATA.y, "W_1 has 5 columns.*4 rows"),
        ([torch.ones(5, 4, dtype=F64), torch.ones(3, 6, dtype=F64)], DATA.X, DATA.y, "W_2 has 6 columns.*5 rows"),
        ([torch.full((3, 4), math.nan, dtype=F64)], DATA.X, DATA.y, "W_1 of shape .* NaN"),
        ([torch.ones(2, 4, dtype=F64)], DATA.X, DATA.y, r"labels must lie in \[0, 2\).*got 2"),
        ([torch.ones(1, 4, dtype=F64)], DATA.X, torch.zeros(6, dtype=torch.long), "at least two classes"),
        ([torch.ones(3, 4, dtype=F64)], DATA.X, DATA.y - 1, "integers from 0 on, got .* from -1 to 1"),
        ([torch.ones(3, 4, dtype=F64)], DATA.X, DATA.y.double(), "labels must be integers"),
        ([torch.ones(3, 4, dtype=F64)], DATA.X, DATA.y == 1, "labels must be integers"),
        ([torch.ones(3, 4, dtype=F64)], DATA.X, DATA.y[:4], r"y must be \(6,\), a label for every column"),
        ([torch.ones(3, 4, dtype=F64)], torch.full_like(DATA.X, math.inf), DATA.y, "X of shape .* infinite"),
        ([torch.ones(3, 4, dtype=F64)], torch.zeros(4, 0), DATA.y[:0], "non-empty X"),
    ],
)
def test_what_does_not_go_together_is_refused(weights, X, y, message, unchecked_shapes):
    with pytest.raises(ValueError, match=message):
        margins(weights, X, y)


def test_labels_may_be_of_any_integer_type():
    weights = [torch.eye(3, 4, dtype=F64)]
    assert torch.equal(margins(weights, DATA.X, DATA.y.int()), margins(weights, DATA.X, DATA.y))
