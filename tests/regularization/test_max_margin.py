"""Where descent on separable data goes: convex optima, KKT points at the predicted pace, and ranks that fall with depth."""

import math
from functools import reduce

import pytest
import torch

from rankwise.regularization import MaxMarginError, fit_max_margin, kkt_residual, margins
from rankwise.regularization.margin import LOSSES
from rankwise.spectral import effective_rank
from tests.regularization.classes import Labelled, clouds, margin_matrices, max_margin_matrix
from tests.regularization.minimizing import F64

LOSS_NAMES = list(LOSSES)


def product(weights: list[torch.Tensor]) -> torch.Tensor:
    return reduce(lambda below, weight: weight @ below, weights)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


# --- where it goes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_one_layer_goes_to_the_support_vector_machine(loss):
    data = clouds(3, 5, 4)
    fit = fit_max_margin(*data, depth=1, loss=loss, steps=1500)
    best = max_margin_matrix(data)
    f = fit.weights[0]
    assert float((f * best).sum() / f.norm() / best.norm()) > 1 - 1e-5
    assert fit.normalized_margin == pytest.approx(1 / float(best.norm()), rel=2e-3)


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_two_layers_go_to_the_margin_of_least_nuclear_norm(loss):
    """½(‖W_1‖² + ‖W_2‖²) = ‖f‖_* at best, so the largest margin/‖Θ‖² is 1/(2·min ‖f‖_*), a convex problem.

    Its dual, max Σα s. t. ‖Σα(e_y − e_c)xᵀ‖ ≤ 1 and α ≥ 0, bounds the minimum from below at every α; the multipliers of
    the KKT residual, scaled into it, certify that nothing better exists.
    """
    data = clouds(4, 6, 5, noise=0.3)
    fit = fit_max_margin(*data, depth=2, loss=loss, steps=1500, generator=seeded())
    residual = kkt_residual(fit.weights, *data)
    alpha = torch.stack([residual.multipliers[c, i] for i, y in enumerate(data.y.tolist()) for c in range(4) if c != y])
    dual = torch.einsum("m,mkd->kd", alpha, margin_matrices(data))
    lower = float(alpha.sum() / torch.linalg.matrix_norm(dual, 2))
    reached = 1 / (2 * fit.normalized_margin)
    assert lower <= reached <= 1.005 * lower


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_kkt_residual_falls_at_the_predicted_pace(depth, loss):
    """Like what remains of the start, ‖Θ(0)‖/‖Θ‖ ~ log(1/F)^{−1/L}; complementarity as fast as that or faster."""
    data = clouds(4, 8, 4, noise=0.25)
    early = fit_max_margin(*data, depth=depth, loss=loss, steps=300, init_scale=0.3, generator=seeded())
    late = fit_max_margin(*data, loss=loss, steps=1500, start=early.weights)
    first, second = (kkt_residual(fit.weights, *data) for fit in (early, late))
    nats = late.log_losses[-1] / early.log_losses[-1]
    assert nats > 3
    pace = nats ** (1 / depth)
    assert first.stationarity / second.stationarity == pytest.approx(pace, rel=0.15)
    assert first.complementarity / second.complementarity > 0.8 * pace
    assert second.total < first.total < 0.2


def test_a_smaller_start_ends_nearer():
    data = clouds(3, 8, 4)
    fits = [fit_max_margin(*data, depth=2, init_scale=e, steps=500, generator=seeded()) for e in (0.3, 0.03)]
    first, second = (kkt_residual(fit.weights, *data).stationarity for fit in fits)
    assert second < 0.2 * first


@pytest.mark.parametrize("depth", [2, 3])
def test_once_separated_the_normalized_margin_only_grows(depth):
    """Lyu & Li 2020: log(1/F)/‖Θ‖^L does not fall under gradient descent, and the margin follows it."""
    data = clouds(3, 6, 4, noise=0.3)
    fit = fit_max_margin(*data, depth=depth, steps=300, generator=seeded())
    smoothed = []
    for _ in range(6):
        size = math.sqrt(sum(float(w.square().sum()) for w in fit.weights))
        smoothed.append(-fit.log_losses[-1] / size**depth)
        assert smoothed[-1] <= fit.normalized_margin  # F ≥ e^{−q_min}
        fit = fit_max_margin(*data, steps=100, start=fit.weights)
    assert smoothed == sorted(smoothed)


# --- ranks ---------------------------------------------------------------------------------------------------------------


def test_the_layers_below_the_last_have_lower_effective_rank_the_deeper_they_are():
    """Eq. 30: the product W_{L−1} ⋯ W_1 is regularized by the Schatten-2/(L−1) power, from 1 on below 1."""
    data = clouds(4, 10, 6, noise=0.25)
    fits = [fit_max_margin(*data, depth=L, steps=2500, init_scale=0.3, generator=seeded()) for L in (2, 3, 4)]
    ranks = [effective_rank(product(fit.weights[:-1]), power=2) for fit in fits]
    assert ranks[0] > 2.6  # four classes leave three directions of differences
    assert ranks[0] > ranks[1] + 0.1 > ranks[2] + 0.2
    assert all(torch.equal(margins(fit.weights, *data).argmin(0) != data.y, torch.ones(24).bool()) for fit in fits)


@pytest.mark.parametrize("depth", [2, 3])
def test_two_classes_drive_the_layers_below_the_last_to_rank_one(depth):
    data = clouds(2, 8, 8, noise=0.25)
    fit = fit_max_margin(*data, depth=depth, steps=1500, init_scale=0.05, generator=seeded())
    assert effective_rank(product(fit.weights[:-1]), power=2) < 1.01


# --- how it steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("depth", [1, 3])
def test_log_loss_falls_at_every_step_and_far_beyond_float64(depth, loss):
    data = clouds(3, 6, 4)
    fit = fit_max_margin(*data, depth=depth, loss=loss, steps=2000, generator=seeded())
    assert len(fit.log_losses) == 2001
    assert all(after < before for before, after in zip(fit.log_losses, fit.log_losses[1:], strict=False))
    assert fit.log_losses[-1] < -750  # e^{−750} is zero in float64
    assert fit.separated
    smallest = float(margins(fit.weights, *data).min())
    assert smallest > 700
    size = math.sqrt(sum(float(w.square().sum()) for w in fit.weights))
    assert fit.normalized_margin == pytest.approx(smallest / size**depth, rel=1e-12)


def test_going_on_starts_where_it_stopped_and_changes_nothing_that_was_given():
    data = clouds(3, 6, 4)
    fit = fit_max_margin(*data, steps=50, generator=seeded())
    kept = [weight.clone() for weight in fit.weights]
    further = fit_max_margin(*data, steps=50, start=fit.weights)
    assert further.log_losses[0] == fit.log_losses[-1]
    assert further.log_losses[-1] < fit.log_losses[-1]
    assert all(torch.equal(weight, old) for weight, old in zip(fit.weights, kept, strict=True))


def test_the_generator_decides_the_start_and_the_width_its_shapes():
    data = clouds(3, 6, 4)
    first, second = (fit_max_margin(*data, depth=3, width=7, steps=150, generator=seeded()) for _ in range(2))
    assert [tuple(weight.shape) for weight in first.weights] == [(7, 6), (7, 7), (3, 7)]
    assert all(torch.equal(a, b) for a, b in zip(first.weights, second.weights, strict=True))
    assert fit_max_margin(data.X.float(), data.y, steps=100).weights[0].dtype == torch.float32


def test_a_fixed_step_lowers_log_loss_by_about_itself():
    data = clouds(3, 6, 4)
    start = fit_max_margin(*data, steps=200, generator=seeded()).weights
    fit = fit_max_margin(*data, step=0.01, steps=100, start=start)
    falls = [before - after for before, after in zip(fit.log_losses, fit.log_losses[1:], strict=False)]
    assert falls == pytest.approx([0.01] * 100, rel=0.05)


# --- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.5, 1e300], ids=["grows past e times its start", "overflows"])
def test_a_step_that_diverges_stops_with_the_last_finite_state(step):
    data = clouds(3, 6, 4)
    with pytest.raises(
        MaxMarginError, match=r"diverged: step 1 brought log F from 3\.\d+ to .*; lower step from"
    ) as caught:
        fit_max_margin(*data, depth=3, step=step, generator=seeded())
    result = caught.value.result
    assert len(result.log_losses) == 1
    assert all(bool(torch.isfinite(weight).all()) for weight in result.weights)
    at_stop = LOSSES["exponential"].log_value_and_pull(margins(result.weights, *data))[0]
    assert float(at_stop) == pytest.approx(result.log_losses[-1], rel=1e-12)


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_labels_that_no_linear_map_separates_are_refused(loss):
    X = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]], dtype=F64)
    with pytest.raises(MaxMarginError, match=r"Theorem 3 begins below .* no linear map separates") as caught:
        fit_max_margin(X, torch.tensor([0, 1, 1, 0]), depth=2, loss=loss, steps=200)
    assert not caught.value.result.separated


def test_correct_labels_alone_are_not_enough():
    """All margins positive and F = 24·e^{−small}: Theorem 3 does not hold yet, and no step is no excuse."""
    data = clouds(4, 6, 2, noise=0.1)
    weights = [0.01 * max_margin_matrix(data)]
    assert float(margins(weights, *data).min()) > 0
    with pytest.raises(MaxMarginError, match="more steps are needed") as caught:
        fit_max_margin(*data, start=weights, steps=0)
    result = caught.value.result
    assert result.normalized_margin > 0
    assert math.exp(result.log_losses[0]) > 20
    assert fit_max_margin(*data, start=result.weights, steps=50).separated


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hinge"}, "loss is one of exponential, logistic, got 'hinge'"),
        ({"depth": 0}, "depth is the number of factors"),
        ({"width": 0}, "at least 1, got 0"),
        ({"steps": -1}, "cannot be negative, got -1"),
        ({"step": 0.0}, "positive and finite, got 0"),
        ({"step": math.nan}, "positive and finite, got nan"),
        ({"init_scale": 0.0}, "init_scale must be positive and finite, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    data = clouds(3, 4, 2)
    with pytest.raises(ValueError, match=message):
        fit_max_margin(*data, **settings)


def test_one_class_has_no_margin():
    data = Labelled(torch.ones(3, 2, dtype=F64), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="at least two classes"):
        fit_max_margin(*data)


def test_a_start_that_does_not_fit_the_data_is_refused():
    data = clouds(3, 4, 2)
    with pytest.raises(ValueError, match="W_1 has 5 columns"):
        fit_max_margin(*data, start=[torch.ones(3, 5, dtype=F64)])
