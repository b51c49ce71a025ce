"""μ + b_i + c_j: what is known of an entry before its low-rank part, and all there is for an unseen row or column."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.completion.observations import Observations

Array = NDArray[np.floating]

_SWEEPS = 6


@dataclass(frozen=True)
class Intercepts:
    """``mean`` μ, ``rows`` b (m,), ``columns`` c (n,); ``shrinkage`` counts the observations that a row's 0 is worth."""

    mean: float
    rows: Array
    columns: Array
    shrinkage: float = 0.0

    def scaled(self, unit: float) -> "Intercepts":
        """Those of values ``unit`` times as large."""
        return Intercepts(self.mean * unit, self.rows * unit, self.columns * unit, self.shrinkage)

    @classmethod
    def none(cls, shape: tuple[int, int]) -> "Intercepts":
        return cls(0.0, np.zeros(shape[0]), np.zeros(shape[1]))

    def at(self, rows: NDArray[np.integer], columns: NDArray[np.integer]) -> Array:
        """μ + b_i + c_j at the pairs given."""
        return self.mean + self.rows[rows] + self.columns[columns]

    def rows_of(self, observations: Observations) -> Array:
        """(m',) intercepts of rows known or not: shrunken means of what μ and the columns leave."""
        rest = observations.values - self.mean - self.columns[observations.columns]
        counts = observations.row_counts
        return _shrunken(np.bincount(observations.row_of_each(), rest, len(counts)), counts, self.shrinkage)

    def residual(self, observations: Observations) -> Array:
        """What they leave of the observed values, (nnz,) in row order."""
        return observations.values - self.at(observations.row_of_each(), observations.columns).astype(
            observations.values.dtype
        )


def fit_intercepts(observations: Observations) -> Intercepts:
    """Shrunken row and column means, alternating; rows and columns without an observation get 0.

    Each mean is shrunk toward 0 by the ratio of the variance within to the variance between, re-estimated every sweep,
    so that a row seen once does not speak as loudly as one seen a hundred times.

    Example:
        >>> from rankwise.completion.intercepts import fit_intercepts
        >>> from rankwise.completion.observations import Observations
        >>> seen = Observations.from_coordinates([0, 0, 1, 1], [0, 1, 0, 1], [1.0, 2.0, 3.0, 4.0], (3, 2))
        >>> found = fit_intercepts(seen)
        >>> found.mean, [float(b.round(3)) for b in found.rows]
        (2.5, [-1.0, 1.0, 0.0])
    """
    row, column = observations.row_of_each(), observations.columns
    total = observations.collective.total
    y = observations.values.astype(np.float64)
    mean = observations.mean(y)
    y = y - mean
    height, width = observations.shape
    b: Array = np.zeros(height)
    c: Array = np.zeros(width)
    row_counts, column_counts = observations.row_counts, observations.column_counts
    seen_rows = total(int(np.count_nonzero(row_counts)))
    seen_columns = int(np.count_nonzero(column_counts))
    shrink_rows = shrink_columns = 0.0
    for _ in range(_SWEEPS):
        b = _shrunken(np.bincount(row, y - c[column], height), row_counts, shrink_rows)
        c = _shrunken(total(np.bincount(column, y - b[row], width)), column_counts, shrink_columns)
        within = observations.mean((y - b[row] - c[column]) ** 2)
        shrink_rows = _within_over_between(within, total(float(b @ b)) / seen_rows)
        shrink_columns = _within_over_between(within, float(c @ c) / seen_columns)
    # rows last, so that a row placed later gets what the same row got here
    return Intercepts(mean, _shrunken(np.bincount(row, y - c[column], height), row_counts, shrink_rows), c, shrink_rows)


def _shrunken(sums: NDArray[Any], counts: NDArray[np.integer], shrinkage: float) -> Array:
    """Each group's mean, as if ``shrinkage`` zeros had been observed in it too; 0 where it is empty."""
    return sums / np.maximum(counts + shrinkage, np.finfo(np.float64).tiny)


def _within_over_between(within: float, between: float) -> float:
    return min(within / between, 1e6) if between > 0 else 0.0
