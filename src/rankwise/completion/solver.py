"""From entries and options to a solution: the ways that there are, in the values' own unit.

``solver="auto"`` is :func:`~rankwise.completion.weighing.recover_or_weigh`, after the truncated SVD where everything is observed.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rankwise.completion import kernels
from rankwise.completion.balanced import balanced
from rankwise.completion.fit_task import Callback, FitTask
from rankwise.completion.gradient_descent import GradientDescentStep, gradient_descent
from rankwise.completion.observations import Observations
from rankwise.completion.options import SolverOptions
from rankwise.completion.recovery import CAREFUL_PACE, default_rank, from_path
from rankwise.completion.solution import FoldIn, Solution, in_units
from rankwise.completion.weighing import recover_or_weigh, weigh
from rankwise.errors import UserError
from rankwise.spectral import numerical_rank, truncated_svd

Array = NDArray[np.floating]

_PATIENCE = 4  # steps of the path without a better held-out error
_HUBER = 1.345  # of the noise: 95 % efficient where the noise is Gaussian (Huber & Ronchetti 2009)
_HUBER_ROUNDS = 10
_SMALL_DIRECTION = 1e-4  # of the largest: what gradient descent has not moved is no direction


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
    task = FitTask(inside, options, rank, start and start.scaled(1 / unit), _in_units(callback, unit))
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


def _by_loss(task: FitTask) -> Solution:
    route = {
        "auto": recover_or_weigh,
        "weight-decay": _decay,
        "evidence": weigh,
        "gradient-descent": _descend,
    }[task.options.solver]
    return _robustly(task, route) if task.options.loss == "huber" else route(task)


def _together(task: FitTask) -> Solution:
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


def _decay(task: FitTask) -> Solution:
    intercepts, rest = task.without_intercepts()
    if not task.options.early_stopping:
        pace = None if task.options.weight_decay is None else CAREFUL_PACE
        end = task.follow(rest, "path", weight_decay=task.options.weight_decay or 0.0, pace=pace)
        return from_path(task, end, intercepts, rest)
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

    task.follow(shown, "held-out path", pace=CAREFUL_PACE, watch=watch)
    end = task.follow(rest, "path", weight_decay=best["weight_decay"], pace=CAREFUL_PACE)
    return from_path(task, end, intercepts, rest)


def _descend(task: FitTask) -> Solution:
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


def _robustly(task: FitTask, route: Callable[[FitTask], Solution]) -> Solution:
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


def _truncated_svd(task: FitTask) -> Solution:
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
