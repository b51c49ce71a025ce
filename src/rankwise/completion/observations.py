"""The observed entries of a matrix, sorted once by row and once by column."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from rankwise.completion.collective import ALONE, Collective
from rankwise.errors import UserError

_COUNT_LIMIT = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Share:
    """Which rows of a matrix this process holds, and what all processes together hold.

    Attributes:
        collective: the processes.
        first_row: number of this process's first row; each holds consecutive ones.
        height: m of the whole matrix.
        count: nnz of the whole matrix.
        column_counts: (n,) entries of each column of the whole matrix.
    """

    collective: Collective
    first_row: int
    height: int
    count: int
    column_counts: NDArray[np.int64]


@dataclass(frozen=True)
class Observations:
    """Observed entries Ω⊙Φ of an (m, n) matrix: compressed rows, and the same entries compressed by column.

    Attributes:
        shape: (m, n).
        row_starts: (m + 1,) where each row begins among the entries.
        columns: (nnz,) column of each entry, rising within a row.
        values: (nnz,) the observed values, in row order.
        column_starts: (n + 1,) where each column begins among the entries in column order.
        rows: (nnz,) row of each entry, in column order.
        order: (nnz,) position in row order of each entry in column order.
        merged: how many further observations of an entry already observed were averaged into it.
        share: None, or of which larger matrix these are some rows; :func:`~rankwise.completion.shard_rows` makes it.
    """

    shape: tuple[int, int]
    row_starts: NDArray[np.int64]
    columns: NDArray[np.int32]
    values: NDArray[np.floating]
    column_starts: NDArray[np.int64]
    rows: NDArray[np.int32]
    order: NDArray[np.int32]
    merged: int = 0
    share: Share | None = None

    @classmethod
    def from_coordinates(
        cls,
        rows: ArrayLike,
        columns: ArrayLike,
        values: ArrayLike,
        shape: tuple[int, int],
        dtype: Any = np.float64,
    ) -> "Observations":
        """Sort coordinates in linear time; several observations of one entry are averaged.

        Args:
            rows: (nnz,) integers in 0 … m − 1, any order.
            columns: (nnz,) integers in 0 … n − 1.
            values: (nnz,) finite numbers.
            shape: (m, n), both positive.
            dtype: float32 or float64, of the stored values.

        Raises:
            UserError: lengths differ, an index is outside, a value is not a finite number, or nothing is observed.

        Example:
            >>> from rankwise.completion.observations import Observations
            >>> seen = Observations.from_coordinates([1, 0, 1], [0, 2, 0], [1.0, 5.0, 3.0], (2, 3))
            >>> seen.values.tolist(), seen.merged
            ([5.0, 2.0], 1)
        """
        row, column, value, (height, width) = checked_coordinates(rows, columns, values, shape, dtype)
        if len(row) == 0:
            raise UserError("no entry is observed: there is nothing to learn from")
        if len(row) > _COUNT_LIMIT:
            raise UserError(
                f"at most {_COUNT_LIMIT:,} entries fit, got {len(row):,}; split them over several processes"
            )
        by_column = _counting_sort(column, width)
        by_row_then_column = by_column[_counting_sort(row[by_column], height)]
        row, column = row[by_row_then_column], column[by_row_then_column]
        value = value[by_row_then_column]
        again = np.flatnonzero((row[1:] == row[:-1]) & (column[1:] == column[:-1])) + 1
        if len(again):
            first = np.ones(len(row), bool)
            first[again] = False
            starts = np.flatnonzero(first)
            counts = np.diff(np.append(starts, len(row)))
            value = (np.add.reduceat(value.astype(np.float64), starts) / counts).astype(value.dtype)
            row, column = row[starts], column[starts]
        return cls._from_sorted(row, column, value, (height, width), len(again))

    @classmethod
    def empty(cls, shape: tuple[int, int], dtype: Any = np.float64) -> "Observations":
        """Rows of which nothing is known; nothing can be learnt from them, but they can be predicted."""
        nothing = np.empty(0, np.int32)
        return cls._from_sorted(nothing, nothing, np.empty(0, dtype), shape, 0)

    @classmethod
    def _from_sorted(
        cls,
        row: NDArray[np.int32],
        column: NDArray[np.int32],
        value: NDArray[np.floating],
        shape: tuple[int, int],
        merged: int,
    ) -> "Observations":
        row_starts = _starts(row, shape[0])
        order = _counting_sort(column, shape[1])
        return cls(shape, row_starts, column, value, _starts(column, shape[1]), row[order], order, merged)

    @property
    def collective(self) -> Collective:
        """The processes that hold the rows."""
        return ALONE if self.share is None else self.share.collective

    @property
    def first_row(self) -> int:
        """Number of the first of these rows in the matrix."""
        return 0 if self.share is None else self.share.first_row

    @property
    def whole_shape(self) -> tuple[int, int]:
        """(m, n) of the matrix that these are all, or some, of the rows of."""
        return self.shape if self.share is None else (self.share.height, self.shape[1])

    @property
    def count(self) -> int:
        """nnz, the number of distinct observed entries, of the whole matrix."""
        return len(self.values) if self.share is None else self.share.count

    @property
    def density(self) -> float:
        """p = nnz / (m·n), of the whole matrix."""
        return self.count / (self.whole_shape[0] * self.whole_shape[1])

    @property
    def row_counts(self) -> NDArray[np.int64]:
        return np.diff(self.row_starts)

    @property
    def column_counts(self) -> NDArray[np.int64]:
        """(n,) entries of each column, of the whole matrix."""
        return np.diff(self.column_starts) if self.share is None else self.share.column_counts

    def mean(self, per_entry: NDArray[np.floating]) -> float:
        """The mean over all entries, everybody's, of one number an entry."""
        return self.collective.total(float(np.sum(per_entry, dtype=np.float64))) / self.count

    def spread(self) -> float:
        """Standard deviation of the values."""
        around = self.values.astype(np.float64) - self.mean(self.values)
        return self.mean(around**2) ** 0.5

    def row_of_each(self) -> NDArray[np.int32]:
        """(nnz,) the row of each entry, in row order."""
        return np.repeat(np.arange(self.shape[0], dtype=np.int32), self.row_counts)

    def transposed(self) -> "Observations":
        """The entries of Φᵀ."""
        return Observations(
            (self.shape[1], self.shape[0]),
            self.column_starts,
            self.rows,
            self.values[self.order],
            self.row_starts,
            self.columns,
            _inverse(self.order),
            self.merged,
        )

    def with_values(self, values: NDArray[np.floating]) -> "Observations":
        """The same entries with other values, (nnz,) in row order."""
        return replace(self, values=values)

    def astype(self, dtype: Any) -> "Observations":
        return replace(self, values=self.values.astype(dtype, copy=False))

    def subset(self, kept: NDArray[np.bool_]) -> "Observations":
        """Only the entries where ``kept``, (nnz,) in row order, is true."""
        some = self._from_sorted(
            self.row_of_each()[kept], self.columns[kept], self.values[kept], self.shape, self.merged
        )
        return some if self.share is None else some.shared(self.share.collective, self.share.first_row)

    def shared(self, collective: Collective, first_row: int) -> "Observations":
        """The same as these rows of the matrix of which every process holds some; called by all of them."""
        height = collective.total(self.shape[0])
        counts = collective.total(np.diff(self.column_starts))
        return replace(self, share=Share(collective, first_row, height, int(counts.sum()), counts))

    def joined(self, other: "Observations") -> "Observations":
        """Both sets of entries; an entry of both takes the value of ``other``.

        Raises:
            UserError: either is one process's rows only.
        """
        if self.share is not None or other.share is not None:
            raise UserError("partial_fit needs all entries in one process; join the entries, shard_rows and fit again")
        rows = np.concatenate([self.row_of_each(), other.row_of_each()])
        columns = np.concatenate([self.columns, other.columns])
        values = np.concatenate([self.values, other.values])
        shape = (max(self.shape[0], other.shape[0]), max(self.shape[1], other.shape[1]))
        _, last = np.unique((rows.astype(np.int64) * shape[1] + columns)[::-1], return_index=True)
        kept = len(rows) - 1 - last
        return Observations.from_coordinates(rows[kept], columns[kept], values[kept], shape, self.values.dtype)

    def matrix(self, values: NDArray[np.floating] | None = None) -> sp.csr_array:
        """A scipy matrix of the entries, or of other values at the same places; shares memory."""
        return sp.csr_array(
            (self.values if values is None else values, self.columns, self.row_starts), shape=self.shape, copy=False
        )


def as_observations(X: Any, dtype: Any = np.float64) -> Observations:
    """The observed entries of whatever a user has.

    Args:
        X: a scipy sparse matrix (stored = observed, explicit zeros too), a 2-D array or DataFrame (NaN = not observed),
            or a tuple ``(rows, columns, values, shape)``.
        dtype: float32 or float64, of the stored values.

    Raises:
        UserError: X is none of these, is not two-dimensional, holds an infinite or non-numeric observed value, or
            nothing in it is observed.

    Example:
        >>> import numpy as np
        >>> from rankwise.completion.observations import as_observations
        >>> as_observations(np.array([[1.0, np.nan], [np.nan, 4.0]])).values.tolist()
        [1.0, 4.0]
    """
    if isinstance(X, Observations):
        return X.astype(dtype)
    if isinstance(X, tuple):
        if len(X) != 4:
            raise UserError(f"a tuple must be (rows, columns, values, shape), got {len(X)} parts")
        rows, columns, values, shape = X
        return Observations.from_coordinates(rows, columns, values, shape, dtype)
    if sp.issparse(X):
        if X.ndim != 2:
            raise UserError(f"expected a matrix, got a sparse array of {X.ndim} dimensions")
        entries = X.tocoo()
        rows, columns = entries.coords
        return Observations.from_coordinates(rows, columns, entries.data, entries.shape, dtype)
    dense = _dense(X, dtype)
    rows, columns = np.nonzero(~np.isnan(dense))
    return Observations.from_coordinates(rows, columns, dense[rows, columns], dense.shape, dtype)


def checked_coordinates(
    rows: ArrayLike, columns: ArrayLike, values: ArrayLike, shape: tuple[int, int], dtype: Any
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.floating], tuple[int, int]]:
    """The coordinates of entries as arrays, any number of them.

    Raises:
        UserError: they are not what :meth:`Observations.from_coordinates` asks for.
    """
    height, width = _checked_shape(shape)
    row = _indices(rows, height, "row")
    column = _indices(columns, width, "column")
    value = _numbers(values, dtype)
    if not len(row) == len(column) == len(value):
        raise UserError(
            "rows, columns and values must be equally long, one of each an observed entry; "
            f"got {len(row)}, {len(column)} and {len(value)}"
        )
    return row, column, value, (height, width)


def _dense(X: Any, dtype: Any) -> NDArray[np.floating]:
    try:
        array = np.asarray(X)
        if np.iscomplexobj(array):
            raise TypeError("complex numbers")
        array = array.astype(dtype, copy=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"every column must be numeric, with NaN where nothing was observed ({error}); drop or encode the others"
        ) from None
    if array.ndim != 2:
        raise UserError(f"expected a matrix (2 dimensions), got shape {array.shape}")
    return array


def _checked_shape(shape: Any) -> tuple[int, int]:
    try:
        height, width = (int(size) for size in shape)
    except (TypeError, ValueError):
        raise UserError(f"shape must be two whole numbers (rows, columns), got {shape!r}") from None
    if not (0 < height <= _COUNT_LIMIT and 0 < width <= _COUNT_LIMIT):
        raise UserError(f"shape must be between 1 and {_COUNT_LIMIT:,} in both directions, got {height} × {width}")
    return height, width


def _indices(given: ArrayLike, size: int, what: str) -> NDArray[np.int32]:
    index = np.asarray(given)
    if index.ndim != 1:
        raise UserError(f"{what} indices must be a list of whole numbers, got shape {index.shape}")
    whole = index.dtype.kind in "iu" or (index.dtype.kind == "f" and bool(np.all(np.mod(index, 1) == 0)))
    if index.size and not whole:
        raise UserError(f"{what} indices must be whole numbers from 0, got {index.dtype}")
    if index.size and not (index.min() >= 0 and index.max() < size):
        bad = int(index.max()) if index.min() >= 0 else int(index.min())
        raise UserError(f"{what} index {bad} is outside 0 … {size - 1}; is the shape right, do indices start at 0?")
    return index.astype(np.int32)


def _numbers(given: ArrayLike, dtype: Any) -> NDArray[np.floating]:
    try:
        values = np.asarray(given)
        if np.iscomplexobj(values):
            raise TypeError("complex numbers")
        numbers = values.astype(dtype)
    except (TypeError, ValueError) as error:
        raise UserError(f"observed values must be numbers ({error})") from None
    if numbers.ndim != 1:
        raise UserError(f"values must be a list of numbers, one an observed entry, got shape {numbers.shape}")
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        raise UserError(
            f"observed values must be finite: {len(bad)} of {len(numbers)} are NaN, infinite or too large for "
            f"{np.dtype(dtype).name} (the first is number {bad[0]}); leave out what was not observed"
        )
    largest = float(np.abs(numbers).max(initial=0))
    if largest > np.finfo(numbers.dtype).max ** 0.5:  # their squares have to be finite too
        raise UserError(
            f"observed values up to {largest:.3g} are too large for {np.dtype(dtype).name}, whose squares must be finite; "
            "use float64, or another unit"
        )
    return numbers


def _starts(sorted_keys: NDArray[np.integer], size: int) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.bincount(sorted_keys, minlength=size))]).astype(np.int64)


def _counting_sort(keys: NDArray[np.integer], size: int) -> NDArray[np.int32]:
    """The stable permutation that sorts ``keys``, in linear time: a sparse matrix with one entry a row, transposed."""
    count = len(keys)
    one_a_row = sp.csr_array((np.arange(count, dtype=np.int32), keys, np.arange(count + 1)), shape=(count, size))
    return one_a_row.tocsc().data


def _inverse(permutation: NDArray[np.int32]) -> NDArray[np.int32]:
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation), dtype=permutation.dtype)
    return inverse
