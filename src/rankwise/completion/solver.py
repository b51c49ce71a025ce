"""Which way to complete a matrix, and what comes of it.

``solver="auto"``:

1. Everything observed: the truncated SVD.
2. The weight-decay path, quick. If it fits the entries with far fewer numbers than there are entries, no noise could
   have done that: the matrix is recovered.
3. Otherwise the entries are noisy, or too few for a quick path: from the path's end the evidence weighs rank, shrinkage
   and noise. If every direction that was offered has support, it starts again with more.
4. Where there is little noise, the path is walked again in small steps, which recovers from fewer entries (oversampling
   1.5 instead of 2); what it fits with few numbers is taken.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rankwise.completion import kernels
from rankwise.completion.balanced import Balanced, balanced
from rankwise.completion.collective import Collective
from rankwise.completion.evidence import Posterior, fit_evidence, log_evidence, noise_behind, posterior_around
from rankwise.completion.gradient_descent import GradientDescentStep, gradient_descent
from rankwise.completion.intercepts import Intercepts, fit_intercepts
from rankwise.completion.observations import Observations
from rankwise.completion.options import SolverOptions
from rankwise.completion.solution import FoldIn, Solution, in_units
from rankwise.completion.sparse_svd import leading_triplets
from rankwise.completion.weight_decay_path import PathEnd, follow_weight_decay
from rankwise.errors import UserError
from rankwise.spectral import numerical_rank, truncated_svd

Array = NDArray[np.floating]
Callback = Callable[[dict[str, Any]], None]

_QUICK_OVERSAMPLING = 2.0  # entries a free parameter that the quick path needs to be trusted
_CAREFUL_OVERSAMPLING = 1.2
_CAREFUL_PACE = 0.8
_CAREFUL_SLACK = 2  # directions that may come and go again on the careful path
_NEARLY_FITTED = 30  # times the tolerance: how well fewer directions must fit to be preferred
_WEAK_DIRECTION = 1e-3  # of the largest: worth a try to do without
_LITTLE_NOISE = 0.2  # of the entries' spread: noiseless entries that are too few for the quick path look like less
_NO_NOISE = 0.02  # likewise: of entries whose matrix is all but found
_SHRUNKEN = 1.2  # likewise: a walk that leaves so much has hardly begun
_LARGEST_DEFAULT_RANK = 40
_CHEAP_RANK = 20  # with so few directions at most, all may be let in to see what they leave
_CLOSE, _NEAR = 3e-3, 1e-2  # how close the sweeps of the evidence come to their end
_INTERCEPT_DIRECTIONS = 2  # what taking intercepts off may add to the rank
_PATIENCE = 4  # steps of the path without a better held-out error
_HUBER = 1.345  # of the noise: 95 % efficient where the noise is Gaussian (Huber & Ronchetti 2009)
_HUBER_ROUNDS = 10
_SMALL_DIRECTION = 1e-4  # of the largest: what gradient descent has not moved is no direction


def default_rank(observations: Observations) -> int:
    """The most directions that the entries could tell from noise: 1.2 entries a parameter, 40 at most.

    Example:
        >>> import numpy as np
        >>> from rankwise.completion.observations import as_observations
        >>> from rankwise.completion.solver import default_rank
        >>> default_rank(as_observations(np.ones((30, 20))))
        10
    """
    most = _directions(observations, _CAREFUL_OVERSAMPLING)
    return max(1, min(most, *observations.whole_shape, _LARGEST_DEFAULT_RANK))


def solve(
    observations: Observations,
    options: SolverOptions,
    *,
    start: Solution | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Complete a matrix as the options say.

    Args:
        observations: the known entries.
        options: see :class:`~rankwise.completion.DeepMatrixCompletion`.
        start: an earlier solution of the same columns to go on from.
        callback: called with each iteration's entry of the history.
    """
    rank = min(options.rank or default_rank(observations), *observations.whole_shape)
    # gradient descent starts from ε in the values' own units; the others know no unit, but floating point does
    unit = 1.0 if options.solver == "gradient-descent" else _unit(observations)
    inside = observations
    if unit != 1:
        inside = observations.with_values(observations.values / observations.values.dtype.type(unit))
    task = _Task(inside, options, rank, start and start.scaled(1 / unit), _in_units(callback, unit))
    if observations.share is not None:
        found = _together(task)
    elif observations.count == observations.shape[0] * observations.shape[1] and options.solver == "auto":
        found = _truncated_svd(task)
    else:
        found = _by_loss(task)
    return found.scaled(unit)


def _unit(observations: Observations) -> float:
    """A power of four near the largest value: dividing by it, and by its root, rounds nothing."""
    values = observations.values
    largest = max(observations.collective.parts(float(np.abs(values).max(initial=0))))
    return float(4.0 ** round(np.log2(largest) / 2)) if largest > 0 else 1.0


def _in_units(callback: Callback | None, unit: float) -> Callback | None:
    if callback is None or unit == 1:
        return callback
    return lambda entry: callback(in_units(entry, unit))


def _by_loss(task: "_Task") -> Solution:
    route = {
        "auto": _recover_or_weigh,
        "weight-decay": _decay,
        "evidence": _weigh,
        "gradient-descent": _descend,
    }[task.options.solver]
    return _robustly(task, route) if task.options.loss == "huber" else route(task)


def _together(task: "_Task") -> Solution:
    """Every process with its own rows; each gets the whole solution.

    Raises:
        UserError: an option that needs all entries in one place.
    """
    options = task.options
    for asked, what in (
        (options.solver == "gradient-descent", "solver='gradient-descent'"),
        (options.loss == "huber", "loss='huber'"),
        (options.early_stopping, "early_stopping"),
        (task.start is not None, "warm_start or partial_fit"),
    ):
        if asked:
            raise UserError(f"{what} needs all entries in one process; leave it out, or fit in one")
    found = _by_loss(task)
    stacked = task.observations.collective.stacked
    return replace(
        found,
        left=stacked(found.left),
        intercepts=replace(found.intercepts, rows=stacked(found.intercepts.rows)),
        fallback=replace(found.fallback, rows=stacked(found.fallback.rows)),
        row_seen=stacked(found.row_seen),
        row_spread=stacked(found.row_spread),
    )


class _Task:
    """One fit: what is observed, what was asked for, and the history as it grows."""

    def __init__(
        self,
        observations: Observations,
        options: SolverOptions,
        rank: int,
        start: Solution | None,
        callback: Callback | None,
    ):
        self.observations = observations
        self.options = options
        self.rank = rank
        self.start = start
        self.callback = callback
        self.history: list[dict[str, Any]] = []

    @cached_property
    def intercepts(self) -> Intercepts:
        """Of the observations, whether or not the fit is to have any."""
        return fit_intercepts(self.observations)

    def on(self, observations: Observations, start: Solution | None) -> "_Task":
        """The same task on other values of the same entries, from an earlier solution; the history goes on."""
        task = _Task(observations, self.options, self.rank, start, self.callback)
        task.history = self.history
        return task

    def note(self, stage: str) -> Callback:
        def noted(entry: dict[str, Any]) -> None:
            self.history.append({"stage": stage, **entry})
            if self.callback:
                self.callback(self.history[-1])

        return noted

    def solution(self, route: str, **parts: Any) -> Solution:
        seen = self.observations
        height, width = seen.shape
        nothing: dict[str, Any] = {"row_spread": np.zeros(height), "column_spread": np.zeros(width)}
        return Solution(
            route=route,
            row_seen=seen.row_counts > 0,
            column_seen=seen.column_counts > 0,
            fallback=self.intercepts,
            history=self.history,
            **{**nothing, **parts},
        )

    def without_intercepts(self) -> tuple[Intercepts, Observations]:
        """The intercepts, where asked for, and what they leave."""
        if not self.options.fit_intercept:
            return Intercepts.none(self.observations.shape), self.observations
        intercepts = self.intercepts
        return intercepts, self.observations.with_values(intercepts.residual(self.observations))

    def follow(self, rest: Observations, stage: str, *, earlier: Balanced | None = None, **changed: Any) -> PathEnd:
        """The weight-decay path, the longer side's factors eliminated: fewer unknowns for conjugate gradients."""
        if earlier is None and self.start is not None:
            earlier = self.start.balanced
        tall = rest.shape[0] >= rest.shape[1] or rest.share is not None  # shared rows are eliminated, many or few
        start = None
        if earlier is not None:
            start = earlier.right if tall else earlier.left
        if start is not None and len(start) != rest.shape[1 if tall else 0]:
            start = None  # rows were added to the shorter side
        options: dict[str, Any] = {
            "max_rank": self.rank,
            "depth": self.options.depth,
            "tolerance": self.options.tolerance,
            "max_iter": self.options.iterations(300),
            "seed": self.options.seed,
            "callback": self.note(stage),
            "start": start,
            **changed,
        }
        if tall:
            return follow_weight_decay(rest, **options)
        end = follow_weight_decay(rest.transposed(), **options)
        found = end.factors
        return replace(end, factors=Balanced(found.right, found.left, found.singular_values))


@dataclass(frozen=True)
class _Walk:
    """A quick path on ``rest``, which ``intercepts`` left; ``unasked`` if nobody wanted those taken off."""

    end: PathEnd
    rest: Observations
    intercepts: Intercepts
    unasked: bool


def _recover_or_weigh(task: _Task) -> Solution:
    return _weigh(task, recovers=True)


def _weigh(task: _Task, recovers: bool = False) -> Solution:
    """The evidence, on as many directions as it supports; before it, where ``recovers``, a matrix without noise."""
    seen = task.observations
    most = min(task.rank, default_rank(seen))
    trusted = min(_directions(seen, _QUICK_OVERSAMPLING), most)
    walk = _walk(task, most, trusted) if recovers else None
    found = _recovered(task, walk, trusted) if walk else None
    if found is not None:
        return found
    if walk and most <= _CHEAP_RANK and walk.end.reason == "rank":
        walk = _walk(task, most, most, to_the_end=True)
        if walk.end.reason == "fitted":  # by more directions than can be trusted: without noise fewer may do
            recovers, found = False, _carefully_recovered(task)
            if found is not None:
                return found
    posterior = _believed(task, walk, most, trusted)
    noise = posterior.noise / (seen.spread() or 1.0)
    # with so few directions the quick walk would have recovered a matrix without noise
    explained = _rank(posterior) <= trusted and noise > _NO_NOISE
    if recovers and noise < _LITTLE_NOISE and not explained:
        found = _carefully_recovered(task)
    return found or _from_posterior(task, posterior)


def _believed(task: _Task, walk: _Walk | None, most: int, trusted: int) -> Posterior:
    """The evidence from an earlier solution, or from the end of a walk; with more directions if all have support."""
    earlier = _as_posterior(task)
    tops = [] if earlier is None else [_swept(task, earlier)]
    if most <= _CHEAP_RANK:
        # the bound that the sweeps climb has several tops: where it costs little, the highest that several ways lead to
        if walk is None or walk.end.reason == "rank":
            walk = _walk(task, most, most, to_the_end=True)
        tops += [_swept(task, _start(task, walk, most)), _swept(task, _spectral_start(task, most))]
        heights = [log_evidence(top, task.observations) for top in tops]
        return tops[task.observations.collective.agreed(int(np.argmax(heights)))]
    if tops and not _leaves_a_direction(task, tops[0]):
        return tops[0]
    for width in sorted({trusted, most}):
        if walk is None or (walk.end.reason == "rank" and width == most):
            walk = _walk(task, most, width)
        start = _start(task, walk, most)
        if walk.end.reason == "rank" and start.noise > _SHRUNKEN * walk.rest.spread():
            # what it left is less noise than shrinkage: from there every direction would look like nothing
            start = _start(task, _walk(task, most, width, to_the_end=True), most)
        posterior = _swept(task, start)
        if _rank(posterior) <= width:
            break
    return posterior


def _leaves_a_direction(task: _Task, posterior: Posterior) -> bool:
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


def _swept(task: _Task, start: Posterior) -> Posterior:
    cheap = min(task.rank, default_rank(task.observations)) <= _CHEAP_RANK
    return fit_evidence(
        task.observations,
        start,
        tolerance=_CLOSE if cheap else _NEAR,
        max_iter=task.options.iterations(300),
        callback=task.note("evidence"),
    )


def _spectral_start(task: _Task, most: int) -> Posterior:
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


def _rank(posterior: Posterior) -> int:
    return posterior.column_means.shape[1] - 1


def _walk(task: _Task, most: int, trusted: int, *, to_the_end: bool = False) -> _Walk:
    """A quick path to at most ``trusted`` directions and one more, so that needing it shows, and soon.

    Where the values are mostly their mean it is walked on what the intercepts leave, even if nobody asked for them: it
    is shorter, and shows noise sooner. ``to_the_end``: until the residual no longer falls, and not only until they are in.
    """
    intercepts, rest = task.without_intercepts()
    unasked = task.options.fit_intercept is None and _mostly_mean(rest)
    if unasked:
        intercepts = task.intercepts
        rest = rest.with_values(intercepts.residual(rest))
        most += _INTERCEPT_DIRECTIONS
    bound = max(1, min(most, trusted + 1))
    end = task.follow(rest, "path", max_rank=bound, trusted_rank=None if to_the_end else max(1, trusted))
    return _Walk(end, rest, intercepts, unasked)


def _mostly_mean(observations: Observations) -> bool:
    return observations.mean(observations.values) ** 2 > 0.5 * _power(observations, observations.values)


def _power(observations: Observations, values: Array) -> float:
    """The mean square of one number an entry."""
    return observations.mean(np.square(values, dtype=np.float64))


def _recovered(task: _Task, walk: _Walk, trusted: int) -> Solution | None:
    """The matrix, if the walk fits the entries with few enough directions to be trusted."""
    if walk.end.reason != "fitted" or trusted < 1:
        return None
    end = walk.end
    if walk.unasked:
        # to the same matrix without intercepts, which are directions like others where there is no noise
        found = _with_intercepts(end.factors, walk.intercepts, 1.0, task.observations.collective)
        _, rest = task.without_intercepts()
        most = min(task.rank, trusted + 1)
        end = task.follow(rest, "path", earlier=found, max_rank=most, trusted_rank=trusted)
    return _fitted_by_few(task, end, trusted)


def _carefully_recovered(task: _Task) -> Solution | None:
    """The same in small steps, which need fewer entries."""
    _, rest = task.without_intercepts()
    trusted = _directions(rest, _CAREFUL_OVERSAMPLING)
    if trusted < 1:
        return None
    most = min(task.rank, trusted + _CAREFUL_SLACK)
    return _fitted_by_few(task, task.follow(rest, "careful path", max_rank=most, pace=_CAREFUL_PACE), trusted)


def _fitted_by_few(task: _Task, end: PathEnd, trusted: int) -> Solution | None:
    if end.reason != "fitted":
        return None
    intercepts, rest = task.without_intercepts()
    end = _fewest(task, rest, end)
    return _from_path(task, end, intercepts, rest) if len(end.factors.singular_values) <= trusted else None


def _directions(observations: Observations, oversampling: float) -> int:
    """How many directions have that many entries for each of their numbers."""
    return int(observations.count / (oversampling * sum(observations.whole_shape)))


def _start(task: _Task, walk: _Walk, most: int) -> Posterior:
    """Where the evidence starts: the walk's end, with intercepts if they are wanted, and the noise that it points to."""
    seen, factors, intercepts = task.observations, walk.end.factors, walk.intercepts
    width = len(factors.singular_values)
    noise = noise_behind(walk.end.residual * _power(walk.rest, walk.rest.values) ** 0.5, width, seen)
    wanted = task.options.fit_intercept
    if wanted is None and not walk.unasked:
        intercepts = task.intercepts
        factors = _with_intercepts(factors, intercepts, -1.0, seen.collective).keep(slice(width))
    factors = factors.keep(slice(most))
    return posterior_around(seen, intercepts, factors.left, factors.right, noise, fit_intercept=wanted is not False)


def _with_intercepts(factors: Balanced, intercepts: Intercepts, sign: float, collective: Collective) -> Balanced:
    """The factors of left·rightᵀ ± (μ + b + c), two directions more."""
    left, right = factors.left, factors.right
    rows = sign * (intercepts.rows + intercepts.mean)[:, None].astype(left.dtype)
    columns = intercepts.columns[:, None].astype(right.dtype)
    ones = np.ones_like
    return balanced(np.hstack([left, rows, sign * ones(rows)]), np.hstack([right, ones(columns), columns]), collective)


def _fewest(task: _Task, rest: Observations, end: PathEnd) -> PathEnd:
    """Without the weakest directions, where the others fit as well: those were for the rounding of written numbers."""
    while True:
        found = end.factors
        if len(found.singular_values) < 2 or found.singular_values[-1] > _WEAK_DIRECTION * found.singular_values[0]:
            return end
        fewer = found.keep(np.arange(len(found.singular_values)) < len(found.singular_values) - 1)
        without = task.follow(rest, "fewer directions", max_rank=len(fewer.singular_values), earlier=fewer, max_iter=60)
        if without.residual > _NEARLY_FITTED * task.options.tolerance:
            return end
        end = replace(without, reason="fitted")


def _decay(task: _Task) -> Solution:
    intercepts, rest = task.without_intercepts()
    if not task.options.early_stopping:
        pace = None if task.options.weight_decay is None else _CAREFUL_PACE
        end = task.follow(rest, "path", weight_decay=task.options.weight_decay or 0.0, pace=pace)
        return _from_path(task, end, intercepts, rest)
    shown, hidden = _hold_out(rest, task.options)
    best = {"error": np.inf, "weight_decay": 1.0, "since": 0}
    places = hidden.row_of_each(), hidden.columns

    def watch(left: Array, right: Array, entry: dict[str, Any]) -> bool:
        wide = shown.shape[0] >= shown.shape[1]
        error = kernels.entries_at(*(places if wide else places[::-1]), left, right) - hidden.values
        entry["held_out"] = float(np.sqrt(np.mean(error.astype(np.float64) ** 2)))
        if entry["held_out"] < best["error"]:
            best.update(error=entry["held_out"], weight_decay=entry["weight_decay"], since=0)
        else:
            best["since"] += 1
        return best["since"] >= _PATIENCE

    task.follow(shown, "held-out path", pace=_CAREFUL_PACE, watch=watch)
    end = task.follow(rest, "path", weight_decay=best["weight_decay"], pace=_CAREFUL_PACE)
    return _from_path(task, end, intercepts, rest)


def _descend(task: _Task) -> Solution:
    intercepts, rest = task.without_intercepts()
    options = task.options
    settings: dict[str, Any] = {
        "rank": task.rank,
        "depth": options.depth,
        "init_scale": options.init_scale,
        "outer_lr_ratio": options.outer_lr_ratio,
        "learning_rate": options.learning_rate,
        "tol": options.tol or 1e-6,
        "seed": options.seed,
        "record_every": 1 << 30,
    }
    most = options.iterations(100_000)

    def noting(stage: str, every: int = 100) -> Callable[[GradientDescentStep], bool]:
        note = task.note(stage)

        def seen(step: GradientDescentStep) -> bool:
            if step.iteration % every == 0:
                note({"iteration": step.iteration, "residual": step.relative_residual})
            return False

        return seen

    if options.early_stopping:
        shown, hidden = _hold_out(rest, options)
        best = {"error": np.inf, "iteration": 0}
        note = task.note("held-out descent")

        def watch(step: GradientDescentStep) -> bool:
            if step.iteration % 100:
                return False
            error = step.factors.entries(hidden.row_of_each(), hidden.columns) - hidden.values
            held_out = float(np.sqrt(np.mean(error**2)))
            note({"iteration": step.iteration, "residual": step.relative_residual, "held_out": held_out})
            if held_out < best["error"]:
                best.update(error=held_out, iteration=step.iteration)
            # saddles last: only an error that has risen for long says that the best is past
            return step.iteration > 1.5 * best["iteration"] + 2000 and held_out > 1.02 * best["error"]

        gradient_descent(shown, max_iter=most, callback=watch, **settings)
        most = max(1, int(best["iteration"]))
    found = gradient_descent(rest, max_iter=most, callback=noting("descent"), **settings)
    if not task.history or task.history[-1]["iteration"] != found.iterations:
        task.note("descent")({"iteration": found.iterations, "residual": found.history[-1]["relative_residual"]})
    factors = balanced(found.left @ found.core, found.right)
    sizes = factors.singular_values
    factors = factors.keep((sizes > _SMALL_DIRECTION * sizes[0]) & (np.arange(len(sizes)) < task.rank))
    residual = rest.values - kernels.entries_at(rest.row_of_each(), rest.columns, factors.left, factors.right)
    noise = _root_mean_square(residual)
    # the ridge at which a row's regression returns what descent found, up to the noise
    decay = noise**2 / np.maximum(factors.singular_values, np.finfo(np.float64).tiny)
    fold_in = FoldIn.plain(np.maximum(decay, np.finfo(rest.values.dtype).tiny).astype(rest.values.dtype))
    return task.solution(
        "gradient-descent",
        intercepts=intercepts,
        left=factors.left.astype(rest.values.dtype),
        right=factors.right.astype(rest.values.dtype),
        fold_in=fold_in,
        noise=noise,
        converged=found.converged or options.early_stopping,
    )


def _robustly(task: _Task, route: Callable[[_Task], Solution]) -> Solution:
    """Huber's loss: fit, pull the entries that are far off towards the fit, fit again (Huber & Ronchetti 2009, 7.8)."""
    observed = task.observations
    places = observed.row_of_each(), observed.columns

    def pulled(fitted: Array) -> tuple[Observations, float]:
        residual = observed.values - fitted
        limit = _HUBER * 1.4826 * float(np.median(np.abs(residual)))
        return observed.with_values((fitted + np.clip(residual, -limit, limit)).astype(observed.values.dtype)), limit

    # the first fit must not be to the outliers: a direction spent on one makes it look well fitted ever after
    values, _ = pulled(np.full(observed.count, np.median(observed.values), np.float64))
    solution = route(task.on(values, None))
    fitted = solution.at(*places)
    for _ in range(_HUBER_ROUNDS - 1):
        values, limit = pulled(fitted)
        solution = route(task.on(values, solution))
        before, fitted = fitted, solution.at(*places)
        if _root_mean_square(fitted - before) <= 1e-2 * limit:
            break
    return solution


def _hold_out(observations: Observations, options: SolverOptions) -> tuple[Observations, Observations]:
    """Entries shown and entries hidden, at random."""
    hidden = held_out_mask(observations.count, options.validation_fraction, options.seed)
    return observations.subset(~hidden), observations.subset(hidden)


def held_out_mask(count: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """(count,) which entries to hide: the nearest whole number to ``fraction`` of them, 1 to count − 1.

    Raises:
        UserError: there is only one entry.
    """
    if count < 2:
        raise UserError("only one entry is observed, so none can be held out; observe more entries")
    chosen = min(max(1, round(fraction * count)), count - 1)
    mask = np.zeros(count, bool)
    mask[np.random.default_rng(seed).choice(count, chosen, replace=False)] = True
    return mask


def _from_path(task: _Task, end: PathEnd, intercepts: Intercepts, rest: Observations) -> Solution:
    """The path's end as a solution; ``rest`` is what the intercepts leave."""
    fold_in = FoldIn.plain(end.decay)
    right = end.factors.right
    _, left = fold_in.rows(rest, Intercepts.none(rest.shape), right)
    residual = rest.values - kernels.entries_at(rest.row_of_each(), rest.columns, left, right)
    return task.solution(
        "weight-decay",
        intercepts=intercepts,
        left=left,
        right=right,
        fold_in=fold_in,
        noise=_power(rest, residual) ** 0.5,
        converged=end.reason in ("fitted", "decay"),
    )


def _from_posterior(task: _Task, posterior: Posterior) -> Solution:
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


def _as_posterior(task: _Task) -> Posterior | None:
    """An earlier solution as a posterior to go on from; None if there is none, or its columns are not these."""
    start, seen = task.start, task.observations
    if start is None or len(start.right) != seen.shape[1] or start.noise == 0:
        return None
    wanted = task.options.fit_intercept is not False
    return posterior_around(seen, start.intercepts, start.left, start.right, start.noise, fit_intercept=wanted)


def _truncated_svd(task: _Task) -> Solution:
    """Everything is observed: the best approximation of that rank, with as many directions as have any size."""
    intercepts, rest = task.without_intercepts()
    full = torch.from_numpy(np.ascontiguousarray(rest.values).reshape(rest.shape))
    U, s, Vh, _ = truncated_svd(full, task.rank, generator=torch.Generator().manual_seed(0), estimate_error=False)
    kept = max(1, min(task.rank, numerical_rank(torch.diag(s), shape=rest.shape))) if bool(s.any()) else 1
    dtype = rest.values.dtype
    half = torch.sqrt(s[:kept])
    left = np.ascontiguousarray((U[:, :kept] * half).numpy(), dtype)
    right = np.ascontiguousarray((Vh[:kept].T * half).numpy(), dtype)
    rounding = float(np.finfo(dtype).eps) ** 2 * float(s[0])
    slight = np.full(kept, max(rounding, float(np.finfo(dtype).tiny)), dtype)
    return task.solution(
        "svd",
        intercepts=intercepts,
        left=left,
        right=right,
        fold_in=FoldIn.plain(slight),
        noise=_root_mean_square(full.numpy() - left @ right.T),
        converged=True,
    )


def _root_mean_square(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
