"""Noisy completion: how much to trust each direction, each row and the noise, all read off the data.

Model: y_ij = μ + b_i + c_j + f_i·g_j + noise, with Gaussian priors whose precisions, one a direction, are fitted with
the noise level by maximizing a lower bound of the evidence (variational matrix factorization: Lim & Teh 2007;
automatic relevance determination: MacKay 1994, Nakajima et al. 2013). Directions that the data do not support are
driven to zero, so the bound on the rank is no tuning parameter; there is no λ. It is the noisy counterpart of the
weight-decay path: a penalty with one strength a direction, growing like log σ, the limit of infinite depth, plus the
spread of what is not known, without which every direction would be driven to zero.

One sweep costs O(nnz·k² + (m + n)k³).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.completion import kernels
from rankwise.completion.intercepts import Intercepts
from rankwise.completion.observations import Observations

Array = NDArray[np.floating]
Callback = Callable[[dict[str, Any]], None]

_IRRELEVANT = 1e-4  # a direction whose part of an entry has less than this much of the noise's variance is dropped
# by a direction's mean over its spread: from _CERTAIN on it stays; below _UNTOLD it is on its way to zero, by ever smaller
# steps; while there is any in between, the sweeps go on to _CLOSER of the tolerance
_CERTAIN, _UNTOLD, _CLOSER = 2, 0.5, 0.4
_SETTLED = 0.01  # relative change of the noise's precision in a sweep
_TINY = float(np.finfo(np.float64).tiny)
_FIXED = 1e12  # the prior precision of an intercept that is left out


@dataclass(frozen=True)
class Posterior:
    """What is believed about intercepts and factors.

    Attributes:
        mean: μ.
        row_means: (m, 1 + k): b_i and f_i.
        column_means: (n, 1 + k): c_j and g_j.
        row_covariances: (m, 1 + k, 1 + k).
        column_covariances: (n, 1 + k, 1 + k).
        row_prior: (1 + k,) prior precisions of (b, f).
        column_prior: (1 + k,) prior precisions of (c, g).
        noise: σ, standard deviation of the noise.
        squares: Σ E(y − ŷ)² over the entries.
        converged: whether the noise level had settled.
        history: one entry a sweep.
    """

    mean: float
    row_means: Array
    column_means: Array
    row_covariances: Array
    column_covariances: Array
    row_prior: Array
    column_prior: Array
    noise: float
    squares: float
    converged: bool
    history: list[dict[str, Any]] = field(default_factory=list)


def posterior_around(
    observations: Observations, intercepts: Intercepts, left: Array, right: Array, noise: float, *, fit_intercept: bool
) -> Posterior:
    """Where the sweeps start: an earlier fit as means, with the spread that this much noise leaves each column.

    Args:
        observations: the noisy entries.
        intercepts: μ, b, c of the earlier fit.
        left: (m, k) its row factors.
        right: (n, k) its column factors.
        noise: σ of the entries around the truth, not around the fit: see :func:`noise_behind`.
        fit_intercept: without, μ, b and c stay 0.
    """
    dtype = observations.values.dtype
    height, width = observations.shape
    k = right.shape[1]
    noise = max(noise, _rounding(observations, fit_intercept))
    nothing = 1e-12 * noise**2
    rows, columns = intercepts.rows[:, None], intercepts.columns[:, None]
    row_power = np.maximum(_Rows(observations).mean_squares(np.hstack([rows, left])), nothing)
    column_power = np.maximum(_mean_squares(np.hstack([columns, right])), nothing)
    # an intercept shrunk to nothing may still be as large as the entries of a row leave open: from 0 it would never rise
    for power, lines in ((row_power, observations.whole_shape[0]), (column_power, width)):
        power[0] = max(power[0], noise**2 * lines / observations.count)
    told = np.concatenate([[1.0], row_power[1:]])  # by one observation, about each coordinate of a column
    spread = 1 / (observations.column_counts[:, None] * told / noise**2 + 1 / column_power)
    covariances = np.zeros((width, 1 + k, 1 + k), dtype)
    covariances[:, range(1 + k), range(1 + k)] = spread
    row_prior, column_prior = (1 / row_power).astype(dtype), (1 / column_power).astype(dtype)
    means = np.hstack([columns, right]).astype(dtype)
    if not fit_intercept:
        means[:, 0] = covariances[:, 0, 0] = 0
        row_prior[0] = column_prior[0] = _FIXED
    return Posterior(
        intercepts.mean if fit_intercept else 0.0,
        np.zeros((height, 1 + k), dtype),
        means,
        np.zeros((height, 1 + k, 1 + k), dtype),
        covariances,
        row_prior,
        column_prior,
        noise,
        observations.count * noise**2,
        False,
    )


def noise_behind(residual: float, rank: int, observations: Observations) -> float:
    """σ of the noise, of which fitting ``rank`` directions without shrinkage left only ``residual``.

    A direction takes m + n of the nnz degrees of freedom; at least a twentieth counts as left.
    """
    free = 1 - rank * sum(observations.whole_shape) / observations.count
    return float(residual / np.sqrt(max(free, 0.05)))


def fit_evidence(
    observations: Observations,
    start: Posterior,
    *,
    tolerance: float = 1e-2,
    max_iter: int = 100,
    callback: Callback | None = None,
) -> Posterior:
    """Alternate the posteriors of rows and columns with the precisions until the noise level settles.

    Args:
        observations: the noisy entries.
        start: what to go on from, see :func:`posterior_around`; directions without support are dropped on the way, none
            is added.
        tolerance: stop when a sweep turns the columns' directions by less than this much of their own uncertainty and
            changes 1/σ² by less than this, relatively; four tenths of it while a direction is nearer to nothing than to
            certainty, which may still go.
        max_iter: sweeps at most.
        callback: called with each sweep's entry of the history.

    Returns:
        :class:`Posterior`.
    """
    mean = start.mean
    total, agreed = observations.collective.total, observations.collective.agreed
    rows = _Rows(observations)
    values = observations.values - mean
    crossed = values[observations.order]
    M, C = start.column_means, start.column_covariances
    row_prior, column_prior = start.row_prior, start.column_prior
    precision = before = 1 / start.noise**2
    history: list[dict[str, Any]] = []
    converged = False
    least = observations.count * _rounding(observations, bool(start.row_prior[0] < _FIXED)) ** 2
    A, CA = start.row_means, start.row_covariances
    for sweep in range(1, max_iter + 1):
        told_rows = kernels.expected_moments(observations.row_starts, observations.columns, values, M, C)
        A, CA, _ = kernels.posteriors(told_rows, row_prior, precision)
        M_before = M
        told_columns = kernels.expected_moments(observations.column_starts, observations.rows, crossed, A, CA)
        second, first, power = told_columns
        told_columns = total(second), total(first), total(power)
        M, C, squares = kernels.posteriors(told_columns, column_prior, precision)
        M, C, squares = agreed(M), agreed(C), agreed(squares)
        row_power, column_power = rows.mean_squares(A), _mean_squares(M)
        row_variance, column_variance = rows.mean_variances(CA), _mean_variances(C)
        row_prior = _prior(row_power + row_variance, row_prior)
        column_prior = _prior(column_power + column_variance, column_prior)
        before = precision
        precision = observations.count / max(float(squares.sum()), least)
        noise = precision**-0.5
        uncertainty = noise * ((M.shape[1] - 1) * sum(observations.whole_shape) / observations.count) ** 0.5
        turned = _turn(M_before, M, row_power) / max(uncertainty, _TINY)
        change = abs(precision - before) / precision
        # mean over spread, rows and columns together
        told = np.sqrt(row_power * column_power / np.maximum(row_variance * column_variance, _TINY))[1:]
        limit = tolerance if (told > _CERTAIN).all() else _CLOSER * tolerance
        converged = bool(turned < limit and change < limit)
        kept = np.ones(M.shape[1], bool)
        if change < _SETTLED:  # before, a weak direction may only wait for the noise to be seen as less
            kept[1:] = (precision * row_power * column_power)[1:] > _IRRELEVANT
        if converged:
            kept[1:] &= told > _UNTOLD
        kept = agreed(kept)
        converged = agreed(converged) and bool(kept.all())
        if not kept.all():
            A, M = A[:, kept], M[:, kept]
            CA, C = CA[:, kept][:, :, kept], C[:, kept][:, :, kept]
            row_prior, column_prior = row_prior[kept], column_prior[kept]
        entry = {"iteration": sweep, "noise": noise, "rank": M.shape[1] - 1, "turned": turned}
        history.append(entry)
        if callback:
            callback(entry)
        if converged:
            break
    return Posterior(
        mean,
        np.ascontiguousarray(A),
        np.ascontiguousarray(M),
        np.ascontiguousarray(CA),
        np.ascontiguousarray(C),
        row_prior,
        column_prior,
        precision**-0.5,
        float(squares.sum()),
        converged,
        history,
    )


def log_evidence(posterior: Posterior, observations: Observations) -> float:
    """The lower bound of log p(y) that the sweeps climb: which of two posteriors explains the entries better.

    E log p(y | f, g) − KL(rows) − KL(columns), the priors' precisions and the noise being those of the posterior.
    """
    sides = (
        (posterior.row_means, posterior.row_covariances, posterior.row_prior, observations.collective.total),
        (posterior.column_means, posterior.column_covariances, posterior.column_prior, float),
    )
    bound = -0.5 * observations.count * np.log(2 * np.pi * posterior.noise**2)
    bound -= 0.5 * posterior.squares / posterior.noise**2
    for means, covariances, prior, total in sides:
        weights = prior.astype(np.float64)
        second = np.einsum("ia,a->", np.square(means, dtype=np.float64), weights)
        second += np.einsum("iaa,a->", covariances, weights, dtype=np.float64)
        _, volumes = np.linalg.slogdet(covariances.astype(np.float64))
        free = float(volumes.sum() + means.size - second) + len(means) * float(np.log(weights).sum())
        bound += 0.5 * total(free)
    return float(bound)


def _rounding(observations: Observations, fit_intercept: bool) -> float:
    """Noise below this is rounding; without a floor the precision of a matrix that is fitted exactly has no end.

    Relative to the spread, or to the values themselves where their mean is no intercept but a direction like others.
    """
    dtype = np.finfo(observations.values.dtype)
    largest = max(observations.collective.parts(float(np.abs(observations.values).max(initial=0))))
    floor = float(dtype.eps) * largest
    if fit_intercept:
        floor = max(floor, float(dtype.eps) ** 0.4 * observations.spread())
    else:
        floor = max(floor, float(dtype.eps) ** 0.5 * observations.mean(np.square(observations.values)) ** 0.5)
    return max(floor, float(dtype.tiny) ** 0.25)


def _mean_squares(means: Array) -> NDArray[np.float64]:
    return np.mean(np.square(means, dtype=np.float64), axis=0)


def _mean_variances(covariances: Array) -> NDArray[np.float64]:
    return np.einsum("iaa->a", covariances, dtype=np.float64) / len(covariances)


class _Rows:
    """The same means over everybody's rows."""

    def __init__(self, observations: Observations):
        self.total = observations.collective.total
        self.share = observations.shape[0] / observations.whole_shape[0]

    def mean_squares(self, means: Array) -> NDArray[np.float64]:
        return self.total(self.share * _mean_squares(means))

    def mean_variances(self, covariances: Array) -> NDArray[np.float64]:
        return self.total(self.share * _mean_variances(covariances))


def _turn(before: Array, now: Array, row_power: NDArray[np.float64]) -> float:
    """Root mean square over all entries of what the new column factors add outside the span of the old ones.

    Only the span counts: within it the factors go on turning towards the prior's axes long after nothing else moves.
    """
    if now.shape[1] == 1:
        return 0.0
    Q, _ = np.linalg.qr(before[:, 1:])
    outside = now[:, 1:] - Q @ (Q.T @ now[:, 1:])
    return float(np.sqrt(_mean_squares(outside) @ row_power[1:]))


def _prior(second: NDArray[np.float64], before: Array) -> Array:
    """Precision of each coordinate's prior: one over its mean square. An intercept left out keeps its own."""
    return np.where(before >= _FIXED, before, 1 / np.maximum(second, _TINY)).astype(before.dtype)
