"""Dropout's penalty against every mask there is, and its minimum in closed form against L-BFGS and SGD."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.regularization import dropout_minimizer, dropout_penalty, dropout_rate_for_rank, squared_nuclear_prox
from tests.regularization.minimizing import F64, best_lbfgs, gaussians
from tests.spectral.planted import planted

seeds = st.integers(0, 2**31 - 1)
keep_rates = st.floats(0.05, 1.0)


def masked_loss(W1, W2, X, Y, z, keep_rate: float) -> torch.Tensor:
    """‖Y − (1/μ)·W_2 Diag(z) W_1 X‖² of eq. 31."""
    return (Y - W2 @ (z.unsqueeze(1) * (W1 @ X)) / keep_rate).square().sum()


def expected_loss(W1, W2, X, Y, keep_rate: float) -> torch.Tensor:
    """Eq. 32."""
    return (Y - W2 @ W1 @ X).square().sum() + dropout_penalty(W1, W2, X, keep_rate)


def all_masks(W1, W2, X, Y, keep_rate: float) -> tuple[float, float]:
    """Mean and variance of the masked loss over all 2^h masks, each with its probability."""
    losses, chances = [], []
    for mask in itertools.product([0.0, 1.0], repeat=len(W1)):
        z = torch.tensor(mask, dtype=F64)
        losses.append(masked_loss(W1, W2, X, Y, z, keep_rate).item())
        chances.append(keep_rate ** sum(mask) * (1 - keep_rate) ** (len(W1) - sum(mask)))
    mean = math.fsum(p * v for p, v in zip(chances, losses, strict=True))
    return mean, math.fsum(p * (v - mean) ** 2 for p, v in zip(chances, losses, strict=True))


def problem(samples: int = 7, seed: int = 0, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """X (5 × samples) that is far from white, Y (4 × samples) of which X explains most but not all."""
    X = planted(5, samples, [3.0, 2.0, 1.0, 0.5, 0.2][: min(5, samples)], seed).matrix
    map_, noise = gaussians([(4, 5), (4, samples)], seed)
    return X, planted(4, 4, [1.0] * rank, seed + 7).matrix @ map_ @ X + 0.3 * noise


# --- the penalty -----------------------------------------------------------------------------------------------------


@given(width=st.integers(1, 6), keep_rate=keep_rates, seed=seeds)
def test_loss_and_penalty_are_the_mean_over_all_masks(width, keep_rate, seed):
    W1, W2, X, Y = gaussians([(width, 3), (4, width), (3, 5), (4, 5)], seed)
    mean, _ = all_masks(W1, W2, X, Y, keep_rate)
    assert float(expected_loss(W1, W2, X, Y, keep_rate)) == pytest.approx(mean, rel=1e-11)


@pytest.mark.parametrize("keep_rate", [0.3, 0.8])
def test_torchs_dropout_layer_has_this_mean_at_p_1_minus_keep_rate(keep_rate):
    """Every sample draws its own mask there, which changes the variance and not the mean; 4.5 standard errors."""
    W1, W2, X, Y = gaussians([(6, 3), (4, 6), (3, 5), (4, 5)], seed=1)
    hidden = (W1 @ X).expand(20_000, 6, 5)
    losses = (Y - W2 @ torch.nn.functional.dropout(hidden, p=1 - keep_rate)).square().sum((1, 2))
    error = float(losses.mean() - expected_loss(W1, W2, X, Y, keep_rate))
    assert abs(error) < 4.5 * float(losses.std()) / 20_000**0.5
    assert float(losses.std()) / 20_000**0.5 < 0.01 * float(losses.mean())  # so 4.5 of them are less than 5 %


def test_monte_carlo_over_shared_masks_agrees_to_its_standard_error(generator):
    W1, W2, X, Y = gaussians([(6, 3), (4, 6), (3, 5), (4, 5)], seed=2)
    keep_rate, draws = 0.4, 40_000
    z = (torch.rand(draws, 6, 1, dtype=F64, generator=generator) < keep_rate).double()
    losses = (Y - W2 @ (z * (W1 @ X)) / keep_rate).square().sum((1, 2))
    mean, variance = all_masks(W1, W2, X, Y, keep_rate)
    assert abs(float(losses.mean()) - float(expected_loss(W1, W2, X, Y, keep_rate))) < 4.5 * (variance / draws) ** 0.5
    assert (variance / draws) ** 0.5 < 0.01 * mean


def test_keeping_everything_costs_nothing_and_the_penalty_is_differentiable():
    W1, W2, X = gaussians([(3, 4), (2, 3), (4, 5)], seed=0)
    assert float(dropout_penalty(W1, W2, X, 1.0)) == 0
    variables = (W1.requires_grad_(), W2.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: dropout_penalty(a, b, X, 0.3), variables)


# --- its minimum -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [3, 7])
@pytest.mark.parametrize(("width", "keep_rate"), [(2, 0.7), (4, 0.5), (6, 0.2)])
def test_the_closed_form_is_what_lbfgs_finds(samples, width, keep_rate):
    """Eq. 32 minimized numerically over both factors: fewer samples than inputs, or more; narrow layers, or wide."""
    X, Y = problem(samples)
    best = dropout_minimizer(X, Y, width, keep_rate)
    starts = [gaussians([(width, 5), (4, width)], seed, 0.5) for seed in range(3)]
    least, (W1, W2) = best_lbfgs(lambda W1, W2: expected_loss(W1, W2, X, Y, keep_rate), starts)
    assert best.value == pytest.approx(least, rel=1e-8)
    assert torch.allclose(W2 @ W1 @ X, best.outputs, rtol=0, atol=1e-5)


@given(width=st.integers(1, 7), samples=st.integers(1, 9), keep_rate=keep_rates, seed=seeds)
def test_the_factors_attain_the_value_with_equal_shares(width, samples, keep_rate, seed):
    X, Y = problem(samples, seed)
    best = dropout_minimizer(X, Y, width, keep_rate)
    assert torch.allclose(best.W2 @ best.W1 @ X, best.outputs, rtol=0, atol=1e-11 * (1 + float(Y.norm())))
    assert float(expected_loss(best.W1, best.W2, X, Y, keep_rate)) == pytest.approx(best.value, rel=1e-10)
    shares = best.W2.norm(dim=0) * (best.W1 @ X).norm(dim=1)
    assert torch.allclose(shares, shares.mean().expand(width), rtol=1e-9, atol=1e-12)


@given(width=st.integers(1, 6), samples=st.integers(1, 9), keep_rate=keep_rates, seed=seeds)
def test_no_other_factors_are_lower(width, samples, keep_rate, seed):
    X, Y = problem(samples, seed)
    best = dropout_minimizer(X, Y, width, keep_rate)
    near = [best.W1 + 0.01 * torch.randn_like(best.W1), best.W2 + 0.01 * torch.randn_like(best.W2)]
    far = gaussians([(width, 5), (4, width)], seed, 0.5)
    for W1, W2 in (near, far):
        assert float(expected_loss(W1, W2, X, Y, keep_rate)) >= best.value * (1 - 1e-12)


@pytest.mark.parametrize("samples", [3, 7])
def test_keeping_everything_gives_least_squares(samples):
    X, Y = problem(samples)
    fit = Y @ torch.linalg.pinv(X) @ X
    assert torch.allclose(dropout_minimizer(X, Y, width=4, keep_rate=1.0).outputs, fit, rtol=0, atol=1e-12)


def test_the_printed_eq_33_misses_the_width_and_what_X_cannot_reach():
    X, Y = problem(samples=7)
    width, keep_rate = 6, 0.5
    least, (W1, W2) = best_lbfgs(
        lambda W1, W2: expected_loss(W1, W2, X, Y, keep_rate), [gaussians([(width, 5), (4, width)], 0, 0.5)]
    )

    def value(Z: torch.Tensor, c: float) -> float:
        return float((Y - Z).square().sum() + c * torch.linalg.matrix_norm(Z, "nuc").square())

    printed_c, c = (1 - keep_rate) / keep_rate, (1 - keep_rate) / (keep_rate * width)
    Z = W2 @ W1 @ X
    assert value(Z, c) == pytest.approx(least, rel=1e-8)
    as_printed = squared_nuclear_prox(Y, printed_c)
    assert value(as_printed, printed_c) > 1.5 * least
    assert float((as_printed - Z).norm()) > 0.3 * float(Z.norm())
    # with the width but without the projection it is too low: no factors give such outputs
    unreachable = squared_nuclear_prox(Y, c)
    assert value(unreachable, c) < 0.99 * least
    assert float((unreachable - unreachable @ torch.linalg.pinv(X) @ X).norm()) > 0.1


def test_wider_layers_are_penalized_less():
    X, Y = problem()
    sizes = [float(torch.linalg.matrix_norm(dropout_minimizer(X, Y, w, 0.5).outputs, "nuc")) for w in (4, 8, 16, 1000)]
    assert sizes == sorted(sizes)
    fit = Y @ torch.linalg.pinv(X) @ X
    assert sizes[-1] == pytest.approx(float(torch.linalg.matrix_norm(fit, "nuc")), rel=0.01)


def test_nothing_to_fit_gives_zero_weights():
    best = dropout_minimizer(torch.eye(3), torch.zeros(2, 3), width=4, keep_rate=0.5)
    assert best.value == 0
    assert not any(bool(matrix.any()) for matrix in best[:3])


@pytest.mark.slow
@pytest.mark.parametrize("keep_rate", [0.5, 0.8])
def test_sgd_with_dropout_ends_there_under_decaying_steps(keep_rate, generator):
    """A mask a step (eq. 31) and steps ~ 1/t: within 2 % of the outputs, within 1 % of the loss."""
    X, Y = problem()
    width, steps = 6, 30_000
    best = dropout_minimizer(X, Y, width, keep_rate)
    W1, W2 = (W.requires_grad_() for W in gaussians([(width, 5), (4, width)], 0, 0.3))
    masks = (torch.rand(steps, width, dtype=F64, generator=generator) < keep_rate).double()
    for t, z in enumerate(masks):
        gradients = torch.autograd.grad(masked_loss(W1, W2, X, Y, z, keep_rate), (W1, W2))
        with torch.no_grad():
            for W, gradient in zip((W1, W2), gradients, strict=True):
                W -= 0.01 / (1 + t / 500) * gradient
    outputs = (W2 @ W1 @ X).detach()
    assert float((outputs - best.outputs).norm()) < 0.02 * float(best.outputs.norm())
    assert float(expected_loss(W1, W2, X, Y, keep_rate).detach()) < 1.01 * best.value
    undropped = Y @ torch.linalg.pinv(X) @ X
    assert float((undropped - best.outputs).norm()) > 0.1 * float(best.outputs.norm())


# --- its rank ----------------------------------------------------------------------------------------------------------


@given(rank=st.integers(1, 3), width=st.integers(4, 12), samples=st.integers(4, 9), seed=seeds)
def test_the_rate_for_a_rank_is_the_smallest_that_reaches_it(rank, width, samples, seed):
    X, Y = problem(samples, seed)
    rate = dropout_rate_for_rank(X, Y, rank, width)
    assert 0 < rate < 1
    # a hair to either side, in c: at the rate itself the next singular value is zero up to rounding
    c = rate / ((1 - rate) * width)
    for change, expected in ((1 + 1e-6, rank), (1 - 1e-6, rank + 1)):
        keep_rate = 1 / (1 + c * change * width)
        outputs = dropout_minimizer(X, Y, width, keep_rate).outputs
        # 1e-6 off the edge the next value is about 1e-6 of itself
        assert int((torch.linalg.svdvals(outputs) > 1e-11 * float(outputs.norm())).sum()) == expected


def test_lower_ranks_and_wider_layers_need_more_dropout():
    X, Y = problem()
    assert dropout_rate_for_rank(X, Y, 1, 8) > dropout_rate_for_rank(X, Y, 2, 8) > dropout_rate_for_rank(X, Y, 3, 8)
    assert dropout_rate_for_rank(X, Y, 2, 16) > dropout_rate_for_rank(X, Y, 2, 8)


def test_no_dropout_is_needed_where_the_rank_is_not_higher_anyhow():
    X, Y = problem(rank=4)
    assert dropout_rate_for_rank(X, Y, rank=4, width=8) == 0
    assert dropout_rate_for_rank(X, Y, rank=2, width=2) == 0
    low = planted(4, 5, [2.0, 1.0]).matrix @ X
    assert dropout_rate_for_rank(X, low, rank=2, width=8) == 0


def test_equal_singular_values_go_together_so_no_rate_is_right():
    with pytest.raises(ValueError, match=r"leading 3 singular values .* none gives rank 2"):
        dropout_rate_for_rank(torch.eye(4), torch.eye(4), rank=2, width=8)
    equal_to_rounding = planted(6, 6, [1.0] * 6).matrix
    with pytest.raises(ValueError, match="leading 3 singular values"):
        dropout_rate_for_rank(torch.eye(6, dtype=F64), equal_to_rounding, rank=2, width=8)
    # the leading ones may be equal as long as the next is smaller: c = 1/(3 − 1 + 3 − 1)
    Y = torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0]))
    assert dropout_rate_for_rank(torch.eye(4), Y, rank=2, width=8) == pytest.approx(2 / 3)


# --- what is refused -----------------------------------------------------------------------------------------------------

X23, Y13 = torch.ones(2, 3), torch.ones(1, 3)


@pytest.mark.parametrize("keep_rate", [0.0, -0.1, 1.1, math.nan])
def test_rates_that_are_no_keep_rate_are_refused_and_the_message_says_which_it_is(keep_rate):
    with pytest.raises(ValueError, match=r"probability that a unit stays .* a dropout layer's p is 1 − keep_rate"):
        dropout_penalty(torch.ones(4, 2), torch.ones(1, 4), X23, keep_rate)
    with pytest.raises(ValueError, match="keep_rate"):
        dropout_minimizer(X23, Y13, 4, keep_rate)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dropout_penalty(torch.ones(4, 3), torch.ones(1, 4), X23, 0.5), r"must chain, got shapes \(1, 4\), \(4, 3\)"),
        (lambda: dropout_penalty(torch.ones(4, 2), torch.ones(1, 5), X23, 0.5), r"must chain, got shapes \(1, 5\)"),
        (lambda: dropout_penalty(torch.full((4, 2), math.nan), torch.ones(1, 4), X23, 0.5), r"W1 of shape .* NaN"),
        (lambda: dropout_minimizer(X23, torch.ones(1, 4), 2, 0.5), "X has 3 samples and Y 4"),
        (lambda: dropout_minimizer(X23, torch.full((1, 3), math.inf), 2, 0.5), r"Y of shape .* infinite"),
        (lambda: dropout_minimizer(torch.ones(2, 0), torch.ones(1, 0), 2, 0.5), "non-empty X"),
        (lambda: dropout_minimizer(torch.ones(3), Y13, 2, 0.5), "X to be 2-D"),
        (lambda: dropout_minimizer(X23, Y13, 0, 0.5), "width is the number of hidden units"),
        (lambda: dropout_rate_for_rank(X23, Y13, 0, 4), "rank must be at least 1, got 0"),
        (lambda: dropout_rate_for_rank(X23, Y13, 1, 0), "width is the number of hidden units"),
        (lambda: dropout_rate_for_rank(X23, torch.ones(1, 4), 1, 4), "X has 3 samples and Y 4"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(call, message, unchecked_shapes):
    with pytest.raises(ValueError, match=message):
        call()
