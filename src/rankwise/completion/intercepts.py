"""μ + b_i + c_j: what is known of an entry before its low-rank part, and all there is for an unseen row or column."""

from dataclasses import dataclass

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

    @classmethod
    def none(cls, shape: tuple[int, int]) -> "Intercepts":
        return cls(0.0, np.zeros(shape[0]), np.zeros(shape[1]))

    def at(self, rows: NDArray[np.integer], columns: NDArray[np.integer]) -> Array:
        """μ + b_i + c_j at the pairs given."""
        return self.mean + self.rows[rows] + self.columns[columns]

    def rows_of(self, observations: Observations) -> Array:
        """(m',) intercepts of rows known or not: shrunken means of what μ and the columns leave."""
        rest = observations.values - self.mean - self.columns[observations.columns]
        return _shrunken(observations.row_of_each(), rest, observations.row_counts, self.shrinkage)

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
    y = observations.values.astype(np.float64)
    mean = float(y.mean())
    y = y - mean
    height, width = observations.shape
    b: Array = np.zeros(height)
    c: Array = np.zeros(width)
    row_counts, column_counts = observations.row_counts, observations.column_counts
    shrink_rows = shrink_columns = 0.0
    for _ in range(_SWEEPS):
        b = _shrunken(row, y - c[column], row_counts, shrink_rows)
        c = _shrunken(column, y - b[row], column_counts, shrink_columns)
        within = float(np.mean((y - b[row] - c[column]) ** 2))
        shrink_rows = _within_over_between(within, b[row_counts > 0])
        shrink_columns = _within_over_between(within, c[column_counts > 0])
    # rows last, so that a row placed later gets what the same row got here
    return Intercepts(mean, _shrunken(row, y - c[column], row_counts, shrink_rows), c, shrink_rows)


def _shrunken(group: NDArray[np.integer], values: Array, counts: NDArray[np.integer], shrinkage: float) -> Array:
    """Each group's mean, as if ``shrinkage`` zeros had been observed in it too; 0 where it is empty."""
    return np.bincount(group, values, len(counts)) / np.maximum(counts + shrinkage, np.finfo(np.float64).tiny)


def _within_over_between(within: float, means: Array) -> float:
    between = float(np.mean(means**2)) if len(means) else 0.0
    return min(within / between, 1e6) if between > 0 else 0.0
