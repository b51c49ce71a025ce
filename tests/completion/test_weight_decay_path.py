"""The path: exact recovery at any bound on the rank, and minimizers of what it says it minimizes."""

import numpy as np
import pytest

from rankwise.completion.balanced import balanced, deep_factors
from rankwise.completion.weight_decay_path import follow_weight_decay
from tests.completion.planted import entries, low_rank, observed, relative_error


def product(end):
    return end.factors.left @ end.factors.right.T


@pytest.mark.parametrize("max_rank", [3, 6, 20])
@pytest.mark.parametrize("shape", [(120, 100), (60, 300)])
def test_recovers_at_every_bound_on_the_rank(max_rank, shape):
    full = low_rank(*shape, 3)
    end = follow_weight_decay(entries(full, observed(full, 0.3)), max_rank=max_rank)
    assert end.reason == "fitted"
    assert len(end.factors.singular_values) == 3
    assert relative_error(product(end), full) < 1e-6


@pytest.mark.parametrize("condition", [10, 1e3, 1e5])
def test_an_ill_conditioned_matrix_takes_few_more_steps(condition):
    full = low_rank(150, 150, 4, condition=condition)
    end = follow_weight_decay(entries(full, observed(full, 0.25, least=8)), max_rank=10)
    assert end.reason == "fitted"
    assert relative_error(product(end), full) < 1e-6
    assert len(end.history) <= 40


def test_small_steps_recover_at_oversampling_1_6_where_depth_2_does_not():
    full = low_rank(200, 200, 4, condition=10, seed=3)
    seen = entries(full, observed(full, 1.6 * 4 * 396 / 200**2, least=4))
    deep = follow_weight_decay(seen, max_rank=5, pace=0.7)
    assert relative_error(product(deep), full) < 1e-3
    nuclear = follow_weight_decay(seen, max_rank=5, pace=0.7, depth=2)
    assert relative_error(product(nuclear), full) > 1e-2


def test_depth_2_ends_at_the_nuclear_norm_minimizer():
    """L = 2: soft-thresholding's fixed point, an independent characterization of the minimizer (Cai et al. 2010)."""
    full = low_rank(40, 30, 2) + 0.1 * np.random.default_rng(1).standard_normal((40, 30))
    mask = observed(full, 0.6)
    seen = entries(full, mask)
    end = follow_weight_decay(seen, max_rank=30, depth=2, pace=0.7, weight_decay=0.1, max_iter=2000)
    lam = 0.1 * np.linalg.norm(np.where(mask, full, 0), 2)
    X = product(end)
    gradient = np.where(mask, X - full, 0)
    U, s, Vh = np.linalg.svd(X - gradient, full_matrices=False)
    proximal = (U * np.maximum(s - lam, 0)) @ Vh
    # one inexact step is made at the last decay, so the fixed point is near, not exact
    assert np.linalg.norm(proximal - X) < 0.02 * np.linalg.norm(X)


def test_noise_brings_more_directions_than_are_trusted():
    rng = np.random.default_rng(0)
    noisy = low_rank(100, 100, 2) + 0.3 * rng.standard_normal((100, 100))
    end = follow_weight_decay(entries(noisy, observed(noisy, 0.4)), max_rank=30, trusted_rank=8)
    assert end.reason == "rank"


def test_a_bound_below_the_rank_stalls_instead_of_walking_forever():
    full = low_rank(80, 80, 5)
    end = follow_weight_decay(entries(full, observed(full, 0.5)), max_rank=2)
    assert end.reason == "stalled"
    assert len(end.history) < 60


def test_an_earlier_fit_is_gone_on_from():
    full = low_rank(100, 100, 3)
    mask = observed(full, 0.4)
    first = follow_weight_decay(entries(full, mask), max_rank=10)
    more = mask | observed(full, 0.1, seed=9)
    again = follow_weight_decay(entries(full, more), max_rank=10, start=first.factors.right)
    assert again.reason == "fitted"
    assert len(again.history) < len(first.history) / 2


def test_balanced_factors_share_the_singular_values():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((9, 3)), rng.standard_normal((7, 3))
    found = balanced(left, right)
    np.testing.assert_allclose(found.left @ found.right.T, left @ right.T, atol=1e-12)
    np.testing.assert_allclose(found.left.T @ found.left, np.diag(found.singular_values), atol=1e-12)
    np.testing.assert_allclose(found.singular_values, np.linalg.svd(left @ right.T)[1][:3])
    U, V, inner = deep_factors(found, 3)
    np.testing.assert_allclose(U @ np.diag(inner.prod(0)) @ V.T, left @ right.T, atol=1e-12)
    # the least norm that three layers can have: (3/2)Σσ^(2/3)
    np.testing.assert_allclose(0.5 * np.sum(inner**2), 1.5 * np.sum(found.singular_values ** (2 / 3)))


def test_all_zeros_are_fitted_by_nothing():
    seen = entries(np.zeros((5, 4)), np.eye(5, 4, dtype=bool))
    end = follow_weight_decay(seen, max_rank=2)
    assert end.reason == "fitted"
    assert not product(end).any()
