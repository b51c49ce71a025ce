"""Split-conformal intervals: held-out errors, in units of the spread that the model expects at each entry."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankwise.completion.fit_task import Callback
from rankwise.completion.observations import Observations
from rankwise.completion.options import SolverOptions
from rankwise.completion.solver import held_out_mask, solve
from rankwise.errors import UserError

_MOST_SCORES = 20_000


@dataclass(frozen=True)
class Calibration:
    """Errors on entries that a fit had not seen.

    Attributes:
        scores: |error| / spread, rising; at most 20,000 of them.
        rmse: root mean square of the errors.
        rmse_interval: 95 % interval of ``rmse`` over which entries were held out, by the normal law of the mean square.
        baseline_rmse: the same for intercepts alone.
        count: held-out entries.
    """

    scores: NDArray[np.float64]
    rmse: float
    rmse_interval: tuple[float, float]
    baseline_rmse: float
    count: int

    def half_width(self, level: float) -> float:
        """The factor on the spread that covers a new entry with probability ≥ ``level`` (Vovk et al. 2005).

        The ⌈(n + 1)·level⌉-th smallest of n scores; infinite where so few were held out that no score is enough.
        """
        place = int(np.ceil((len(self.scores) + 1) * level))
        return float(self.scores[place - 1]) if place <= len(self.scores) else float("inf")


def calibrate(
    observations: Observations, options: SolverOptions, fraction: float, seed: int, callback: Callback | None = None
) -> Calibration:
    """Fit without ``fraction`` of the entries, drawn at random, and score those.

    The intervals are then used around the fit to all entries, which errs less: they cover a little more than they say.

    Raises:
        UserError: only one entry is observed.
    """
    together = observations.collective
    mine = len(observations.values)
    if observations.share is None or mine > 1:
        hidden = held_out_mask(mine, fraction, seed + together.rank)
    else:  # this process's only entry; the others have some to hide
        hidden = np.zeros(mine, bool)
    if together.total(int(hidden.sum())) == 0:
        raise UserError("every process has only one entry, so none can be held out; observe more entries")
    solution = solve(observations.subset(~hidden), options, callback=callback)
    row = together.stacked(observations.row_of_each()[hidden] + observations.first_row)
    column = together.stacked(observations.columns[hidden])
    truth = together.stacked(observations.values[hidden].astype(np.float64))
    error = np.abs(truth - solution.at(row, column))
    spread = np.maximum(solution.spread_at(row, column), np.finfo(np.float64).tiny)
    scores = error / spread
    if len(scores) > _MOST_SCORES:
        scores = np.random.default_rng(seed).choice(scores, _MOST_SCORES, replace=False)
    squares = error**2
    mean = float(np.mean(squares))
    margin = 1.96 * float(np.std(squares)) / len(squares) ** 0.5
    return Calibration(
        np.sort(scores),
        mean**0.5,
        (max(0.0, mean - margin) ** 0.5, (mean + margin) ** 0.5),
        float(np.sqrt(np.mean((truth - solution.fallback.at(row, column)) ** 2))),
        len(error),
    )
