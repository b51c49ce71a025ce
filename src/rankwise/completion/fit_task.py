"""One fit as its steps see it: the entries, what was asked for, where to begin, and the history as it grows."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.completion.balanced import Balanced
from rankwise.completion.intercepts import Intercepts, fit_intercepts
from rankwise.completion.observations import Observations
from rankwise.completion.options import SolverOptions
from rankwise.completion.solution import Solution
from rankwise.completion.weight_decay_path import PathEnd, follow_weight_decay

Array = NDArray[np.floating]
Callback = Callable[[dict[str, Any]], None]


def power(observations: Observations, values: Array) -> float:
    """The mean square of one number an entry."""
    return observations.mean(np.square(values, dtype=np.float64))


class FitTask:
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

    def on(self, observations: Observations, start: Solution | None) -> "FitTask":
        """The same task on other values of the same entries, from an earlier solution; the history goes on."""
        task = FitTask(observations, self.options, self.rank, start, self.callback)
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
