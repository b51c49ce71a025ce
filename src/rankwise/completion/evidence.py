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
from rankwise.completion.intercepts import Intercepts, fit_intercepts
from rankwise.completion.observations import Observations
from rankwise.completion.sparse_svd import leading_triplets

Array = NDArray[np.floating]
Callback = Callable[[dict[str, Any]], None]

_IRRELEVANT = 1e-4  # a direction whose part of an entry has less than this much of the noise's variance is dropped
_SETTLED = 0.01  # relative change of the noise's precision in a sweep
_FIXED = 1e12  # the prior precision of an intercept that is left out
_SETTLING = 2  # sweeps before the precisions are fitted: the first factors are still a guess


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
    converged: bool
    history: list[dict[str, Any]] = field(default_factory=list)


def fit_evidence(
    observations: Observations,
    *,
    max_rank: int,
    fit_intercept: bool = True,
    tolerance: float = 3e-3,
    max_iter: int = 100,
    seed: int = 0,
    start: Posterior | None = None,
    callback: Callback | None = None,
) -> Posterior:
    """Alternate the posteriors of rows and columns with the precisions until the noise level settles.

    Args:
        observations: the noisy entries.
        max_rank: directions to start with; those without support are dropped on the way.
        fit_intercept: with b_i, c_j and μ; without, all three stay 0.
        tolerance: stop when a sweep turns the columns' directions by less than this much of their own uncertainty and
            changes 1/σ² by less than this, relatively.
        max_iter: sweeps at most.
        seed: of the start's Lanczos process.
        start: a posterior to go on from.
        callback: called with each sweep's entry of the history.

    Returns:
        :class:`Posterior`.
    """
    across = observations.transposed()
    posterior = start or _spectral_start(observations, max_rank, fit_intercept, seed)
    mean = posterior.mean
    values, crossed = observations.values - mean, across.values - mean
    M, C = posterior.column_means, posterior.column_covariances
    row_prior, column_prior = posterior.row_prior, posterior.column_prior
    precision = before = 1 / posterior.noise**2
    history: list[dict[str, Any]] = []
    converged = False
    # noise below this is rounding; without a floor the precision of a matrix that is fitted exactly has no end
    rounding = float(np.finfo(values.dtype).eps) ** 0.4 * float(np.std(observations.values.astype(np.float64)))
    least = max(len(values) * rounding**2, float(np.finfo(values.dtype).tiny))
    A, CA = posterior.row_means, posterior.row_covariances
    for sweep in range(1, max_iter + 1):
        A, CA, _ = kernels.posterior_rows(
            observations.row_starts, observations.columns, values, M, C, row_prior, precision
        )
        M_before = M
        M, C, squares = kernels.posterior_rows(
            across.row_starts, across.columns, crossed, A, CA, column_prior, precision
        )
        if sweep > _SETTLING or start is not None:
            row_prior, column_prior = _prior(A, CA, row_prior), _prior(M, C, column_prior)
            before = precision
            precision = len(values) / max(float(squares.sum()), least)
            settled = abs(precision - before) < _SETTLED * precision
            relevance = precision * (A[:, 1:] ** 2).mean(0) * (M[:, 1:] ** 2).mean(0)
            kept = np.concatenate([[True], relevance > _IRRELEVANT])
            if settled and not kept.all():  # before, a weak direction may only wait for the noise to be seen as less
                A, M = A[:, kept], M[:, kept]
                CA, C = CA[:, kept][:, :, kept], C[:, kept][:, :, kept]
                row_prior, column_prior = row_prior[kept], column_prior[kept]
        noise = precision**-0.5
        uncertainty = noise * ((M.shape[1] - 1) * sum(observations.shape) / len(values)) ** 0.5
        turned = _turn(M_before, M, A) / max(uncertainty, float(np.finfo(np.float64).tiny))
        entry = {"iteration": sweep, "noise": noise, "rank": M.shape[1] - 1, "turned": turned}
        history.append(entry)
        if callback:
            callback(entry)
        converged = bool(
            sweep > _SETTLING + 1 and turned < tolerance and abs(precision - before) < tolerance * precision
        )
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
        converged,
        history,
    )


def _turn(before: Array, now: Array, rows: Array) -> float:
    """Root mean square over all entries of what the new column factors add outside the span of the old ones.

    Only the span counts: within it the factors go on turning towards the prior's axes long after nothing else moves.
    """
    if now.shape[1] == 1:
        return 0.0
    Q, _ = np.linalg.qr(before[:, 1:])
    outside = now[:, 1:] - Q @ (Q.T @ now[:, 1:])
    return float(np.sqrt(np.sum((outside**2).mean(0) * (rows[:, 1:] ** 2).mean(0), dtype=np.float64)))


def _prior(means: Array, covariances: Array, before: Array) -> Array:
    """Precision of each coordinate's prior: one over its mean square. An intercept left out keeps its own."""
    second = (means.astype(np.float64) ** 2).sum(0) + np.einsum("iaa->a", covariances, dtype=np.float64)
    fitted = len(means) / np.maximum(second, np.finfo(np.float64).tiny)
    return np.where(before >= _FIXED, before, fitted).astype(means.dtype)


def _spectral_start(observations: Observations, max_rank: int, fit_intercept: bool, seed: int) -> Posterior:
    """Intercepts by ridge regression, factors from the leading singular triplets of what they leave."""
    height, width = observations.shape
    dtype = observations.values.dtype
    intercepts = fit_intercepts(observations) if fit_intercept else Intercepts.none(observations.shape)
    rest = intercepts.residual(observations)
    spread = float(np.std(rest.astype(np.float64))) or 1.0
    _, s, V = leading_triplets(observations.matrix(rest), max_rank, seed)
    k = len(s)
    sizes = s / observations.density / np.sqrt(height * width)  # root mean square of each direction over the matrix
    sizes = np.maximum(sizes * min(1.0, spread / np.sqrt((sizes**2).sum() or 1.0)), 1e-6 * spread)
    M = np.empty((width, 1 + k), dtype)
    M[:, 0] = intercepts.columns
    M[:, 1:] = V * np.sqrt(width * sizes)
    variance = np.concatenate([[spread**2 / 10], sizes])
    covariances = np.zeros((width, 1 + k, 1 + k), dtype)
    covariances[:, range(1 + k), range(1 + k)] = variance / 10
    prior = (1 / variance).astype(dtype)
    if not fit_intercept:
        prior[0] = _FIXED
        covariances[:, 0, 0] = 0
    A = np.zeros((height, 1 + k), dtype)
    return Posterior(
        intercepts.mean,
        A,
        M,
        np.zeros((height, 1 + k, 1 + k), dtype),
        covariances,
        prior,
        prior.copy(),
        spread / np.sqrt(2),
        False,
    )
