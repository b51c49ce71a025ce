"""The evidence: its sweeps against a dense derivation, and what it finds on planted noise."""

import numpy as np
import pytest

from rankwise.completion import Observations
from rankwise.completion.evidence import Posterior, fit_evidence, noise_behind, posterior_around
from rankwise.completion.intercepts import Intercepts, fit_intercepts
from rankwise.completion.weight_decay_path import follow_weight_decay
from tests.completion.planted import entries, low_rank, observed, relative_error


def weighed(seen: Observations, *, max_rank: int, fit_intercept: bool = True, **options: int) -> Posterior:
    """The evidence from the end of a path, as the solver begins it."""
    intercepts = fit_intercepts(seen) if fit_intercept else Intercepts.none(seen.shape)
    rest = seen.with_values(intercepts.residual(seen))
    end = follow_weight_decay(rest, max_rank=max_rank, trusted_rank=max_rank - 1)
    noise = noise_behind(end.residual * np.sqrt(np.mean(rest.values**2)), len(end.factors.singular_values), seen)
    left, right, _ = end.factors
    return fit_evidence(
        seen, posterior_around(seen, intercepts, left, right, noise, fit_intercept=fit_intercept), **options
    )


def dense(posterior):
    A, M = posterior.row_means, posterior.column_means
    return posterior.mean + A[:, :1] + M[:, 0] + A[:, 1:] @ M[:, 1:].T


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_finds_rank_noise_and_matrix_as_well_as_least_squares_told_the_rank(sigma):
    full = low_rank(300, 300, 4)
    rng = np.random.default_rng(1)
    mask = observed(full, 0.15)
    noisy = full + sigma * rng.standard_normal(full.shape)
    found = weighed(entries(noisy, mask), max_rank=15)
    assert found.converged
    assert found.column_means.shape[1] - 1 == 4
    assert found.noise == pytest.approx(sigma, rel=0.04)
    # the oracle: alternating least squares at the true rank from the true factors
    U, s, Vh = np.linalg.svd(full)
    left, right = U[:, :4] * np.sqrt(s[:4]), Vh[:4].T * np.sqrt(s[:4])
    for _ in range(30):
        left = np.stack([np.linalg.lstsq(right[m], y[m], rcond=None)[0] for y, m in zip(noisy, mask, strict=True)])
        right = np.stack([np.linalg.lstsq(left[m], y[m], rcond=None)[0] for y, m in zip(noisy.T, mask.T, strict=True)])
    assert relative_error(dense(found), full) < 1.03 * relative_error(left @ right.T, full)


def test_without_structure_no_direction_is_kept():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((200, 150))
    found = weighed(entries(noise, observed(noise, 0.3)), max_rank=10)
    assert found.column_means.shape[1] - 1 <= 2  # what lingers is on its way to zero
    assert np.abs(dense(found)).std() < 0.1
    assert found.noise == pytest.approx(1, rel=0.05)


def test_intercepts_alone_are_found_as_intercepts():
    rng = np.random.default_rng(0)
    b, c = rng.standard_normal(150), rng.standard_normal(100)
    full = 3 + b[:, None] + c
    found = weighed(entries(full + 0.1 * rng.standard_normal(full.shape), observed(full, 0.3)), max_rank=8)
    assert relative_error(dense(found), full) < 0.01
    assert found.column_means.shape[1] - 1 == 0


def test_left_out_intercepts_stay_zero():
    full = low_rank(80, 60, 2)
    rng = np.random.default_rng(0)
    found = weighed(
        entries(full + 0.2 * rng.standard_normal(full.shape), observed(full, 0.5)), max_rank=5, fit_intercept=False
    )
    assert found.mean == 0
    assert np.abs(found.row_means[:, 0]).max() < 1e-6
    assert np.abs(found.column_means[:, 0]).max() < 1e-6


def test_noiseless_entries_end_at_a_floor_and_not_in_nan():
    full = low_rank(60, 60, 2)
    found = weighed(entries(full, observed(full, 0.6)), max_rank=5, max_iter=200)
    assert np.isfinite(found.noise)
    assert relative_error(dense(found), full) < 1e-3


def test_the_noise_behind_a_fit_is_what_least_squares_leaves_over_its_degrees_of_freedom():
    full = low_rank(200, 150, 3)
    rng = np.random.default_rng(0)
    seen = entries(full + 0.3 * rng.standard_normal(full.shape), observed(full, 0.3))
    end = follow_weight_decay(seen, max_rank=3)
    residual = end.residual * np.sqrt(np.mean(seen.values**2))
    assert noise_behind(residual, 3, seen) == pytest.approx(0.3, rel=0.05)
    assert residual < 0.9 * 0.3 * 1.05


def test_fitted_intercepts_are_the_least_squares_ones_where_data_are_many():
    rng = np.random.default_rng(0)
    b, c = rng.standard_normal(40), rng.standard_normal(50)
    full = 2 + b[:, None] + c
    found = fit_intercepts(entries(full, observed(full, 0.6)))
    rows, columns = np.indices(full.shape).reshape(2, -1)
    np.testing.assert_allclose(found.at(rows, columns).reshape(full.shape), full, atol=0.05)


def test_a_row_seen_once_is_shrunk_more_than_one_seen_often():
    rng = np.random.default_rng(0)
    full = np.outer(np.where(np.arange(60) % 2, 1.0, -1.0), np.ones(40)) + rng.standard_normal((60, 40))
    mask = rng.random(full.shape) < 0.9
    mask[0] = False
    mask[0, 0] = True
    seen = entries(full, mask)
    found = fit_intercepts(seen)
    alone = full[0, 0] - found.mean - found.columns[0]
    assert abs(found.rows[0]) < 0.9 * abs(alone)
    np.testing.assert_allclose(found.rows_of(seen), found.rows)


def test_no_intercepts_are_zero_everywhere():
    none = Intercepts.none((2, 3))
    assert none.at(np.array([0, 1]), np.array([2, 0])).tolist() == [0, 0]
