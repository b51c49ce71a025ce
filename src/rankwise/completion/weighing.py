"""What is signal and what is noise: the evidence, from a walk's end; before it, a matrix without noise.

``solver="auto"``:

1. Everything observed: the truncated SVD.
2. The weight-decay path, quick. If it fits the entries with far fewer numbers than there are entries, no noise could
   have done that: the matrix is recovered.
3. Otherwise the entries are noisy, or too few for a quick path: from the path's end the evidence weighs rank, shrinkage
   and noise. If every direction that was offered has support, it starts again with more.
4. Where there is little noise, the path is walked again in small steps, which recovers from fewer entries (oversampling
   1.5 instead of 2); what it fits with few numbers is taken.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rankwise.completion import kernels
from rankwise.completion.evidence import Posterior, fit_evidence, log_evidence, noise_behind, posterior_around
from rankwise.completion.fit_task import FitTask, power
from rankwise.completion.intercepts import Intercepts
from rankwise.completion.recovery import (
    QUICK_OVERSAMPLING,
    Walk,
    carefully_recovered,
    default_rank,
    directions,
    recovered,
    walk_quickly,
    with_intercepts,
)
from rankwise.completion.solution import FoldIn, Solution
from rankwise.completion.sparse_svd import leading_triplets

Array = NDArray[np.floating]

_LITTLE_NOISE = 0.2  # of the entries' spread: noiseless entries that are too few for the quick path look like less
_NO_NOISE = 0.02  # likewise: of entries whose matrix is all but found
_SHRUNKEN = 1.2  # likewise: a walk that leaves so much has hardly begun
_CHEAP_RANK = 20  # with so few directions at most, all may be let in to see what they leave
_CLOSE, _NEAR = 3e-3, 1e-2  # how close the sweeps of the evidence come to their end


def recover_or_weigh(task: FitTask) -> Solution:
    """``solver="auto"``: the matrix without noise if there is one, else what the evidence makes of it."""
    return weigh(task, recovers=True)


def weigh(task: FitTask, recovers: bool = False) -> Solution:
    """The evidence, on as many directions as it supports; before it, where ``recovers``, a matrix without noise."""
    seen = task.observations
    most = min(task.rank, default_rank(seen))
    trusted = min(directions(seen, QUICK_OVERSAMPLING), most)
    walk = walk_quickly(task, most, trusted) if recovers else None
    found = recovered(task, walk, trusted) if walk else None
    if found is not None:
        return found
    if walk and most <= _CHEAP_RANK and walk.end.reason == "rank":
        walk = walk_quickly(task, most, most, to_the_end=True)
        if walk.end.reason == "fitted":  # by more directions than can be trusted: without noise fewer may do
            recovers, found = False, carefully_recovered(task)
            if found is not None:
                return found
    posterior = _believed(task, walk, most, trusted)
    noise = posterior.noise / (seen.spread() or 1.0)
    # with so few directions the quick walk would have recovered a matrix without noise
    explained = _rank(posterior) <= trusted and noise > _NO_NOISE
    if recovers and noise < _LITTLE_NOISE and not explained:
        found = carefully_recovered(task)
    return found or _from_posterior(task, posterior)


def _believed(task: FitTask, walk: Walk | None, most: int, trusted: int) -> Posterior:
    """The evidence from an earlier solution, or from the end of a walk; with more directions if all have support."""
    earlier = _as_posterior(task)
    tops = [] if earlier is None else [_swept(task, earlier, "resumed")]
    if most <= _CHEAP_RANK:
        # the bound that the sweeps climb has several tops: where it costs little, the highest that several ways lead to
        if walk is None or walk.end.reason == "rank":
            walk = walk_quickly(task, most, most, to_the_end=True)
        tops.append(_swept(task, _start(task, walk, most)))
        tops.append(_swept(task, _spectral_start(task, most), "2nd evidence"))
        heights = [log_evidence(top, task.observations) for top in tops]
        return tops[task.observations.collective.agreed(int(np.argmax(heights)))]
    if tops and not _leaves_a_direction(task, tops[0]):
        return tops[0]
    for width in sorted({trusted, most}):
        if walk is None or (walk.end.reason == "rank" and width == most):
            walk = walk_quickly(task, most, width)
        start = _start(task, walk, most)
        if walk.end.reason == "rank" and start.noise > _SHRUNKEN * walk.rest.spread():
            # what it left is less noise than shrinkage: from there every direction would look like nothing
            start = _start(task, walk_quickly(task, most, width, to_the_end=True), most)
        posterior = _swept(task, start)
        if _rank(posterior) <= width:
            break
    return posterior


def _leaves_a_direction(task: FitTask, posterior: Posterior) -> bool:
    """Whether the residual has a direction larger than noise alone would (the edge of a random matrix's spectrum)."""
    seen = task.observations
    fitted = kernels.entries_at(
        seen.row_of_each(), seen.columns, posterior.row_means[:, 1:], posterior.column_means[:, 1:]
    )
    offsets = Intercepts(posterior.mean, posterior.row_means[:, 0], posterior.column_means[:, 0])
    residual = offsets.residual(seen) - fitted
    _, s, _ = leading_triplets(seen.matrix(residual), 1, task.options.seed)
    edge = posterior.noise * (float(seen.row_counts.max()) ** 0.5 + float(seen.column_counts.max()) ** 0.5)
    return float(s[0]) > edge


def _rank(posterior: Posterior) -> int:
    return posterior.column_means.shape[1] - 1


def _swept(task: FitTask, start: Posterior, stage: str = "evidence") -> Posterior:
    cheap = min(task.rank, default_rank(task.observations)) <= _CHEAP_RANK
    return fit_evidence(
        task.observations,
        start,
        tolerance=_CLOSE if cheap else _NEAR,
        max_iter=task.options.iterations(300),
        callback=task.note(stage),
    )


def _start(task: FitTask, walk: Walk, most: int) -> Posterior:
    """Where the evidence starts: the walk's end, with intercepts if they are wanted, and the noise that it points to."""
    seen, factors, intercepts = task.observations, walk.end.factors, walk.intercepts
    width = len(factors.singular_values)
    noise = noise_behind(walk.end.residual * power(walk.rest, walk.rest.values) ** 0.5, width, seen)
    wanted = task.options.fit_intercept
    if wanted is None and not walk.unasked:
        intercepts = task.intercepts
        factors = with_intercepts(factors, intercepts, -1.0, seen.collective).keep(slice(width))
    factors = factors.keep(slice(most))
    return posterior_around(seen, intercepts, factors.left, factors.right, noise, fit_intercept=wanted is not False)


def _spectral_start(task: FitTask, most: int) -> Posterior:
    """The leading triplets of what the intercepts leave, shrunk to its size, half of it being taken for noise."""
    seen = task.observations
    wanted = task.options.fit_intercept is not False
    intercepts = task.intercepts if wanted else Intercepts.none(seen.shape)
    rest = seen.with_values(intercepts.residual(seen))
    spread = rest.spread() or 1.0
    U, s, V = leading_triplets(
        rest.matrix(), most, task.options.seed, collective=seen.collective, height=seen.whole_shape[0]
    )
    s = s / seen.density
    power = float(np.sum(s**2)) / (seen.whole_shape[0] * seen.whole_shape[1])
    s = s * min(1.0, spread / (power**0.5 or 1.0))
    half = np.sqrt(np.maximum(s, 1e-6 * spread)).astype(rest.values.dtype)
    return posterior_around(seen, intercepts, U * half, V * half, spread / 2**0.5, fit_intercept=wanted)


def _as_posterior(task: FitTask) -> Posterior | None:
    """An earlier solution as a posterior to go on from; None if there is none, or its columns are not these."""
    start, seen = task.start, task.observations
    if start is None or len(start.right) != seen.shape[1] or start.noise == 0:
        return None
    wanted = task.options.fit_intercept is not False
    return posterior_around(seen, start.intercepts, start.left, start.right, start.noise, fit_intercept=wanted)


def _from_posterior(task: FitTask, posterior: Posterior) -> Solution:
    """Posterior means, with each row's own ridge regression on the columns' means.

    Columns' covariances enter a row through their average over the entries, so that a new row needs k² numbers and not
    n·k²; the row then is placed as a training row would be.
    """
    seen = task.observations
    dtype = seen.values.dtype
    M, C = posterior.column_means, posterior.column_covariances
    typical = np.einsum("j,jab->ab", seen.column_counts / seen.count, C).astype(dtype)
    per_entry, shift = typical.copy(), -typical[:, 0]
    per_entry[0, :] = per_entry[:, 0] = shift[0] = 0
    penalty = np.diag(posterior.row_prior.astype(np.float64) * posterior.noise**2).astype(dtype)
    fold_in = FoldIn(True, penalty, per_entry, shift)
    right = np.ascontiguousarray(M[:, 1:])
    columns = Intercepts(posterior.mean, np.zeros(seen.shape[0]), M[:, 0].copy())
    row_intercepts, left = fold_in.rows(seen, columns, right)
    intercepts = replace(columns, rows=row_intercepts)
    design, across = M.astype(np.float64), posterior.row_means.astype(np.float64)
    design[:, 0] = across[:, 0] = 1
    return task.solution(
        "evidence",
        intercepts=intercepts,
        left=left,
        right=right,
        fold_in=fold_in,
        noise=posterior.noise,
        row_spread=np.einsum("iab,ab->i", posterior.row_covariances, design.T @ design / len(design)),
        column_spread=np.einsum("jab,ab->j", C, seen.collective.total(across.T @ across) / seen.whole_shape[0]),
        converged=posterior.converged,
    )
