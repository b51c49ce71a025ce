"""Recovering a matrix without noise: walks along the weight-decay path, and when to trust what they fit.

What fits the entries with far fewer numbers than there are entries, no noise could have made: it is the matrix.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rankwise.completion import kernels
from rankwise.completion.balanced import Balanced, balanced
from rankwise.completion.collective import Collective
from rankwise.completion.fit_task import FitTask, power
from rankwise.completion.intercepts import Intercepts
from rankwise.completion.observations import Observations
from rankwise.completion.solution import FoldIn, Solution
from rankwise.completion.weight_decay_path import PathEnd

Array = NDArray[np.floating]

QUICK_OVERSAMPLING = 2.0  # entries a free parameter that the quick path needs to be trusted
_CAREFUL_OVERSAMPLING = 1.2
CAREFUL_PACE = 0.8
_CAREFUL_SLACK = 2  # directions that may come and go again on the careful path
_NEARLY_FITTED = 30  # times the tolerance: how well fewer directions must fit to be preferred
_WEAK_DIRECTION = 1e-3  # of the largest: worth a try to do without
_LARGEST_DEFAULT_RANK = 40
_INTERCEPT_DIRECTIONS = 2  # what taking intercepts off may add to the rank


def directions(observations: Observations, oversampling: float) -> int:
    """How many directions have that many entries for each of their numbers."""
    return int(observations.count / (oversampling * sum(observations.whole_shape)))


def default_rank(observations: Observations) -> int:
    """The most directions that the entries could tell from noise: 1.2 entries a parameter, 40 at most.

    Example:
        >>> import numpy as np
        >>> from rankwise.completion.observations import as_observations
        >>> from rankwise.completion.recovery import default_rank
        >>> default_rank(as_observations(np.ones((30, 20))))
        10
    """
    most = directions(observations, _CAREFUL_OVERSAMPLING)
    return max(1, min(most, *observations.whole_shape, _LARGEST_DEFAULT_RANK))


@dataclass(frozen=True)
class Walk:
    """A quick path on ``rest``, which ``intercepts`` left; ``unasked`` if nobody wanted those taken off."""

    end: PathEnd
    rest: Observations
    intercepts: Intercepts
    unasked: bool


def walk_quickly(task: FitTask, most: int, trusted: int, *, to_the_end: bool = False) -> Walk:
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
    stage, trusts = ("whole path", None) if to_the_end else ("path", max(1, trusted))
    end = task.follow(rest, stage, max_rank=bound, trusted_rank=trusts)
    return Walk(end, rest, intercepts, unasked)


def _mostly_mean(observations: Observations) -> bool:
    return observations.mean(observations.values) ** 2 > 0.5 * power(observations, observations.values)


def recovered(task: FitTask, walk: Walk, trusted: int) -> Solution | None:
    """The matrix, if the walk fits the entries with few enough directions to be trusted."""
    if walk.end.reason != "fitted" or trusted < 1:
        return None
    end = walk.end
    if walk.unasked:
        # to the same matrix without intercepts, which are directions like others where there is no noise
        found = with_intercepts(end.factors, walk.intercepts, 1.0, task.observations.collective)
        _, rest = task.without_intercepts()
        most = min(task.rank, trusted + 1)
        end = task.follow(rest, "path", earlier=found, max_rank=most, trusted_rank=trusted)
    return _fitted_by_few(task, end, trusted)


def carefully_recovered(task: FitTask) -> Solution | None:
    """The same in small steps, which need fewer entries."""
    _, rest = task.without_intercepts()
    trusted = directions(rest, _CAREFUL_OVERSAMPLING)
    if trusted < 1:
        return None
    most = min(task.rank, trusted + _CAREFUL_SLACK)
    return _fitted_by_few(task, task.follow(rest, "careful path", max_rank=most, pace=CAREFUL_PACE), trusted)


def _fitted_by_few(task: FitTask, end: PathEnd, trusted: int) -> Solution | None:
    if end.reason != "fitted":
        return None
    intercepts, rest = task.without_intercepts()
    end = _fewest(task, rest, end)
    return from_path(task, end, intercepts, rest) if len(end.factors.singular_values) <= trusted else None


def _fewest(task: FitTask, rest: Observations, end: PathEnd) -> PathEnd:
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


def with_intercepts(factors: Balanced, intercepts: Intercepts, sign: float, collective: Collective) -> Balanced:
    """The factors of left·rightᵀ ± (μ + b + c), two directions more."""
    left, right = factors.left, factors.right
    rows = sign * (intercepts.rows + intercepts.mean)[:, None].astype(left.dtype)
    columns = intercepts.columns[:, None].astype(right.dtype)
    ones = np.ones_like
    return balanced(np.hstack([left, rows, sign * ones(rows)]), np.hstack([right, ones(columns), columns]), collective)


def from_path(task: FitTask, end: PathEnd, intercepts: Intercepts, rest: Observations) -> Solution:
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
        noise=power(rest, residual) ** 0.5,
        converged=end.reason in ("fitted", "decay"),
    )
