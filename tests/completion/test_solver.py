"""Which way is taken: values around a mean, noise with more directions than the quick walk trusts, few clean entries."""

import numpy as np
import pytest

from rankwise.completion import DeepMatrixCompletion
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
