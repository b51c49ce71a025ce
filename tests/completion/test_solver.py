"""Which way is taken: values around a mean, noise with more directions than the quick walk trusts, few clean entries."""

import numpy as np
import pytest

from rankwise.completion import DeepMatrixCompletion
from rankwise.errors import UserError
from tests.completion.planted import low_rank, observed, relative_error, with_holes


@pytest.mark.parametrize("rank", [None, 5])
def test_a_mean_is_one_more_direction_and_not_an_intercept_where_there_is_no_noise(rank):
    full = low_rank(200, 150, 4) + 10
    model = DeepMatrixCompletion(rank=rank).fit(with_holes(full, observed(full, 0.3)))
    assert model.route_ == "weight-decay"
    assert model.rank_ == 5
    assert model.mean_ == 0
    assert relative_error(model.reconstruct(), full) < 1e-6


def test_a_mean_is_an_intercept_where_there_is_noise():
    full = low_rank(200, 150, 4) + 10
    noisy = full + 0.3 * np.random.default_rng(0).standard_normal(full.shape)
    model = DeepMatrixCompletion().fit(with_holes(noisy, observed(full, 0.3)))
    assert model.route_ == "evidence"
    assert model.rank_ == 4
    assert model.mean_ == pytest.approx(10, abs=0.1)
    assert model.noise_ == pytest.approx(0.3, rel=0.05)


def test_more_directions_are_offered_where_all_that_were_have_support():
    # the quick walk offers 10, the entries support all of them, and there are 12
    full = low_rank(400, 400, 12)
    noisy = full + 0.1 * np.random.default_rng(0).standard_normal(full.shape)
    seen = with_holes(noisy, observed(full, 0.1, least=14))
    model = DeepMatrixCompletion().fit(seen)
    offered = [entry["rank"] for entry in model.history_ if entry["stage"] == "evidence"]
    assert int(np.isfinite(seen).sum() / (2 * 800)) + 1 < 12
    assert max(offered) > 12
    assert model.rank_ == 12
    parameters = 12 * 800
    least_squares = 0.1 * (parameters / (np.isfinite(seen).sum() - parameters)) ** 0.5
    assert relative_error(model.reconstruct(), full) < least_squares


def test_no_more_directions_than_the_bound_are_used():
    full = low_rank(150, 120, 6) + 20
    noisy = full + 0.2 * np.random.default_rng(0).standard_normal(full.shape)
    model = DeepMatrixCompletion(rank=3).fit(with_holes(noisy, observed(full, 0.4)))
    assert model.rank_ == 3


@pytest.mark.parametrize("condition", [10, 1e5])
def test_few_clean_entries_are_not_taken_for_noise(condition):
    full = low_rank(300, 300, 4, condition=condition)
    model = DeepMatrixCompletion().fit(with_holes(full, observed(full, 2 * 4 * 596 / 300**2, least=6)))
    assert model.route_ == "weight-decay"
    assert relative_error(model.reconstruct(), full) < 1e-3


@pytest.mark.parametrize("solver", ["auto", "weight-decay", "evidence"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("unit", [4.0**-20, 4.0**15, 1e-12])
def test_the_unit_of_the_values_does_not_matter(solver, dtype, unit):
    full = low_rank(60, 50, 2) + 0.3 * np.random.default_rng(0).standard_normal((60, 50)) + 1
    seen = with_holes(full, observed(full, 0.5))
    model = DeepMatrixCompletion(solver=solver, dtype=dtype).fit(seen)
    other = DeepMatrixCompletion(solver=solver, dtype=dtype).fit(seen * unit)
    assert other.rank_ == model.rank_
    assert other.noise_ == pytest.approx(model.noise_ * unit, rel=1e-2)
    if unit == 1e-12:  # not a power of two: the values themselves are rounded
        return
    np.testing.assert_allclose(other.reconstruct() / unit, model.reconstruct(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(other.transform(seen * unit) / unit, model.transform(seen), rtol=1e-5, atol=1e-3)
    noises = [[entry["noise"] for entry in m.history_ if "noise" in entry] for m in (model, other)]
    np.testing.assert_allclose(noises[1], np.array(noises[0]) * unit, rtol=1e-5)


def test_few_entries_of_a_noisy_matrix_are_not_given_up():
    # the quick walk has only begun when it has let in as many directions as it trusts
    rng = np.random.default_rng(0)
    full = rng.standard_normal((150, 2)) @ rng.standard_normal((2, 100)) + 3
    mask = rng.random(full.shape) < 0.08
    noisy = with_holes(full + 0.3 * rng.standard_normal(full.shape), mask)
    for solver in ("auto", "evidence"):
        model = DeepMatrixCompletion(solver=solver).fit(noisy)
        assert model.rank_ == 2
        assert np.sqrt(np.mean((model.reconstruct() - full)[~mask] ** 2)) < 0.5


def test_more_entries_may_bring_more_directions():
    full = low_rank(80, 60, 4)
    rng = np.random.default_rng(0)
    noisy = full + 0.2 * rng.standard_normal(full.shape)
    order = rng.random(full.shape)
    model = DeepMatrixCompletion().fit(with_holes(noisy, order < 0.1))
    assert model.rank_ < 4
    model.partial_fit(with_holes(noisy, order < 0.5))
    assert model.rank_ == 4
    assert relative_error(model.reconstruct(), full) < 0.15


def test_values_whose_squares_are_too_large_are_refused():
    with pytest.raises(UserError, match="too large for float32"):
        DeepMatrixCompletion(dtype="float32").fit(np.array([[1e30, 2.0], [np.nan, 1.0]]))
