"""A completed matrix, and how a new row is placed in it."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.completion import kernels
from rankwise.completion.balanced import Balanced, balanced
from rankwise.completion.intercepts import Intercepts
from rankwise.completion.observations import Observations

Array = NDArray[np.floating]


def in_units(entry: dict[str, Any], unit: float) -> dict[str, Any]:
    """An entry of a history with what it measures in the values' unit ``unit`` times as large."""
    return {name: value * unit if name in ("noise", "held_out") else value for name, value in entry.items()}


@dataclass(frozen=True)
class FoldIn:
    """Everything that a row's closed-form ridge regression needs besides the row itself.

    With an intercept the design of column j is x_j = (1, right_j), otherwise right_j; see
    :func:`rankwise.completion.kernels.ridge_rows` for ``penalty`` P, ``per_entry`` Q and ``shift`` h.
    """

    intercept: bool
    penalty: Array
    per_entry: Array
    shift: Array

    @classmethod
    def plain(cls, decay: Array) -> "FoldIn":
        """Ridge regression with ``decay`` (k,), one a direction."""
        width = len(decay)
        return cls(False, np.diag(decay), np.zeros((width, width), decay.dtype), np.zeros(width, decay.dtype))

    def scaled(self, unit: float) -> "FoldIn":
        """The regression of values ``unit`` times as large on factors √``unit`` times as large."""
        # every solution grows with its coordinate's factor c, the objective with unit²
        c = np.full(len(self.shift), unit**0.5)
        if self.intercept:
            c[0] = unit
        matrix = (unit / c)[:, None] * (unit / c)
        dtype = self.penalty.dtype
        return FoldIn(
            self.intercept,
            (self.penalty * matrix).astype(dtype),
            (self.per_entry * matrix).astype(dtype),
            (self.shift * unit * (unit / c)).astype(dtype),
        )

    def rows(self, observations: Observations, intercepts: Intercepts, right: Array) -> tuple[Array, Array]:
        """Intercepts (m,) and factors (m, k) of the rows observed, given those of the columns."""
        values = observations.values
        if intercepts.mean or intercepts.columns.any():
            expected = intercepts.mean + intercepts.columns[observations.columns]
            values = values - expected.astype(values.dtype)
        design = np.hstack([np.ones((len(right), 1), right.dtype), right]) if self.intercept else right
        solution, _, _ = kernels.ridge_rows(
            observations.row_starts, observations.columns, values, design, self.penalty, self.per_entry, self.shift
        )
        if self.intercept:
            return solution[:, 0].copy(), np.ascontiguousarray(solution[:, 1:])
        return np.zeros(len(solution), right.dtype), solution


@dataclass(frozen=True)
class Solution:
    """A completed matrix: X_ij = μ + b_i + c_j + left_i·right_j, and how to place a new row in it.

    Attributes:
        route: "svd", "weight-decay", "evidence" or "gradient-descent".
        intercepts: μ, b (m,), c (n,).
        left: (m, k).
        right: (n, k).
        fold_in: the ridge regression that made ``left`` from ``right``.
        fallback: intercepts for the entries of rows and columns without any observation.
        row_seen: (m,) whether anything was observed there.
        column_seen: (n,) likewise.
        noise: σ of the entries around the fit.
        row_spread: (m,) variance that a row's uncertainty adds to its entries.
        column_spread: (n,) likewise.
        converged: whether the route's own criterion was met.
        history: one entry an iteration.
    """

    route: str
    intercepts: Intercepts
    left: Array
    right: Array
    fold_in: FoldIn
    fallback: Intercepts
    row_seen: NDArray[np.bool_]
    column_seen: NDArray[np.bool_]
    noise: float
    row_spread: Array
    column_spread: Array
    converged: bool
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def balanced(self) -> Balanced:
        return balanced(self.left, self.right)

    def scaled(self, unit: float) -> "Solution":
        """The solution for values ``unit`` times as large; exact where that is a power of four."""
        if unit == 1:
            return self
        root = self.left.dtype.type(unit**0.5)
        return replace(
            self,
            intercepts=self.intercepts.scaled(unit),
            fallback=self.fallback.scaled(unit),
            left=self.left * root,
            right=self.right * root,
            fold_in=self.fold_in.scaled(unit),
            noise=self.noise * unit,
            row_spread=self.row_spread * unit**2,
            column_spread=self.column_spread * unit**2,
            history=[in_units(entry, unit) for entry in self.history],
        )

    def at(self, rows: NDArray[np.integer], columns: NDArray[np.integer]) -> Array:
        """The values at pairs (rows, columns), each (k,)."""
        values = kernels.entries_at(rows, columns, self.left, self.right) + self.intercepts.at(rows, columns)
        unseen = ~(self.row_seen[rows] & self.column_seen[columns])
        values[unseen] = self.fallback.at(rows[unseen], columns[unseen])
        return values

    def at_new(
        self,
        intercepts: Array,
        factors: Array,
        fallback: Array,
        rows: NDArray[np.integer],
        columns: NDArray[np.integer],
    ) -> Array:
        """The values at pairs (rows, columns) where the rows are those just placed by :meth:`fold_in_rows`.

        ``fallback`` (m',) are their plain intercepts.
        """
        placed = replace(
            self,
            left=factors,
            intercepts=replace(self.intercepts, rows=intercepts),
            fallback=replace(self.fallback, rows=fallback),
            row_seen=np.ones(len(factors), bool),
        )
        return placed.at(rows, columns)

    def spread_at(self, rows: NDArray[np.integer], columns: NDArray[np.integer]) -> Array:
        """The standard deviation of an observation at pairs (rows, columns), up to a constant factor."""
        return np.sqrt(self.noise**2 + self.row_spread[rows] + self.column_spread[columns])

    def fold_in_rows(self, observations: Observations) -> tuple[Array, Array]:
        """Intercepts (m',) and factors (m', k) of the rows observed."""
        if self.fold_in.intercept:
            return self.fold_in.rows(observations, self.intercepts, self.right)
        rows: Array = np.zeros(observations.shape[0])
        if self.intercepts.rows.any() or self.intercepts.columns.any():  # the fit took the intercepts off first
            rows = self.intercepts.rows_of(observations)
            taken_off = (self.intercepts.mean + self.intercepts.columns)[observations.columns]
            rest = observations.values - taken_off - rows[observations.row_of_each()]
            observations = observations.with_values(rest.astype(observations.values.dtype))
        _, left = self.fold_in.rows(observations, Intercepts.none(observations.shape), self.right)
        return rows, left

    def rows(self, intercepts: Array, factors: Array, seen: NDArray[np.bool_], fallback: Array) -> Array:
        """Dense rows (m', n) with these intercepts and factors; ``fallback`` (m',) are their plain intercepts."""
        dense = factors @ self.right.T
        dense += (self.intercepts.mean + intercepts)[:, None].astype(dense.dtype)
        dense += self.intercepts.columns.astype(dense.dtype)
        dense[~seen] = self.fallback.mean + fallback[~seen, None] + self.fallback.columns
        unseen = ~self.column_seen
        dense[:, unseen] = self.fallback.mean + fallback[:, None] + self.fallback.columns[unseen]
        return dense
