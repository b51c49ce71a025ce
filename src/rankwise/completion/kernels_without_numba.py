"""The kernels by sparse matrix products, for where numba is not installed; same arguments, same numbers.

Rows are taken in batches, so no temporary grows beyond a few hundred megabytes.
"""

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

Array = NDArray[np.floating]
Index = NDArray[np.integer]

_BATCH_ENTRIES = 1 << 20


def ridge_rows(
    starts: Index,
    columns: Index,
    values: Array,
    factor: Array,
    penalty: Array,
    per_entry: Array,
    shift: Array,
    solution: Array,
    triangles: Array,
    residual: Array,
) -> None:
    for rows, entries in _batches(starts, factor.shape[1]):
        seen, pattern, x = _batch(starts, columns, factor, rows, entries)
        triangles[rows] = np.linalg.cholesky(penalty + seen * per_entry + _sums_of_squares(pattern, x))
        solution[rows] = (pattern @ (values[entries, None] * x)) + seen[:, :, 0] * shift
        solution[rows] = _substituted(triangles[rows], solution[rows])
        fitted = np.einsum("pa,pa->p", x, np.repeat(solution[rows], seen[:, 0, 0].astype(int), axis=0))
        residual[entries] = values[entries] - fitted


def project_out_rows(
    starts: Index, columns: Index, left: Array, right: Array, triangles: Array, direction: Array, change: Array
) -> None:
    for rows, entries in _batches(starts, right.shape[1]):
        seen, pattern, r = _batch(starts, columns, right, rows, entries)
        counts = seen[:, 0, 0].astype(int)
        z = np.einsum("pa,pa->p", np.repeat(left[rows], counts, axis=0), direction[columns[entries]])
        row_fit = _substituted(triangles[rows], pattern @ (z[:, None] * r))
        change[entries] = z - np.einsum("pa,pa->p", np.repeat(row_fit, counts, axis=0), r)


def gather_columns(column_starts: Index, rows: Index, order: Index, left: Array, values: Array, total: Array) -> None:
    shape = (len(column_starts) - 1, left.shape[0])
    total[:] = sp.csr_array((values[order], rows, column_starts), shape=shape) @ left


def block_sums(starts: Index, columns: Index, factor: Array, sums: Array) -> None:
    for rows, entries in _batches(starts, factor.shape[1]):
        _, pattern, x = _batch(starts, columns, factor, rows, entries)
        sums[rows] = _sums_of_squares(pattern, x)


def factor_blocks(sums: Array, penalty: Array) -> None:
    sums[:] = np.linalg.cholesky(sums + np.diag(penalty))


def solve_blocks(triangles: Array, right_hand_sides: Array, solution: Array) -> None:
    solution[:] = _substituted(triangles, right_hand_sides)


def expected_moments(
    starts: Index,
    columns: Index,
    values: Array,
    means: Array,
    covariances: Array,
    second: Array,
    first: Array,
    power: NDArray[np.float64],
) -> None:
    k = means.shape[1]
    triangle = np.tril_indices(k)
    for rows, entries in _batches(starts, k):
        _, pattern, x = _batch(starts, columns, means, rows, entries)
        C = covariances[columns[entries]].copy()
        y = values[entries] - x[:, 0]
        power[rows] = pattern @ (y * y + C[:, 0, 0])
        x[:, 0] = 1
        shift = C[:, :, 0].copy()
        shift[:, 0] = 0
        C[:, 0, :] = C[:, :, 0] = 0
        first[rows] = pattern @ (y[:, None] * x - shift)
        sums = _sums_of_squares(pattern, x) + (pattern @ C.reshape(len(C), -1)).reshape(-1, k, k)
        second[rows] = sums[:, *triangle]


def posteriors(
    second: Array,
    first: Array,
    power: NDArray[np.float64],
    prior: Array,
    precision: float,
    mean: Array,
    covariance: Array,
    squares: NDArray[np.float64],
) -> None:
    k = first.shape[1]
    lower, upper = np.tril_indices(k)
    S = np.empty((len(first), k, k), first.dtype)
    S[:, lower, upper] = S[:, upper, lower] = second
    covariance[:] = np.linalg.inv(precision * S + np.diag(prior))
    mean[:] = precision * np.einsum("iab,ib->ia", covariance, first)
    about = np.einsum("ia,ib->iab", mean, mean) + covariance
    squares[:] = power - 2 * np.einsum("ia,ia->i", mean, first) + np.einsum("iab,iab->i", S, about)


def entries_at(rows: Index, columns: Index, left: Array, right: Array, product: Array) -> None:
    for start in range(0, len(rows), _BATCH_ENTRIES):
        part = slice(start, start + _BATCH_ENTRIES)
        product[part] = np.einsum("pa,pa->p", left[rows[part]], right[columns[part]])


def _batches(starts: Index, width: int) -> Iterator[tuple[slice, slice]]:
    """Runs of whole rows with about as many entries as fit, given the width × width numbers each may need."""
    budget = max(1, _BATCH_ENTRIES // max(1, width))
    row, last = 0, len(starts) - 1
    while row < last:
        end = max(row + 1, min(last, row + budget, int(np.searchsorted(starts, starts[row] + budget, "right")) - 1))
        yield slice(row, end), slice(int(starts[row]), int(starts[end]))
        row = end


def _batch(
    starts: Index, columns: Index, factor: Array, rows: slice, entries: slice
) -> tuple[Array, sp.csr_array, Array]:
    """Entries a row as (rows, 1, 1), the rows × entries matrix that sums over a row, and the entries' factors."""
    local = starts[rows.start : rows.stop + 1] - entries.start
    count = entries.stop - entries.start
    ones = np.ones(count, factor.dtype)
    pattern = sp.csr_array((ones, np.arange(count), local), shape=(rows.stop - rows.start, count))
    return np.diff(local).astype(factor.dtype)[:, None, None], pattern, factor[columns[entries]]


def _sums_of_squares(pattern: sp.csr_array, x: Array) -> Array:
    k = x.shape[1]
    return (pattern @ np.einsum("pa,pb->pab", x, x).reshape(len(x), k * k)).reshape(-1, k, k)


def _substituted(triangles: Array, right_hand_sides: Array) -> Array:
    below = np.linalg.solve(triangles, right_hand_sides[:, :, None])
    return np.linalg.solve(np.swapaxes(triangles, 1, 2), below)[:, :, 0]
