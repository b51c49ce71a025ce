"""Loops over the observed entries, compiled by numba where it is installed.

Every kernel works on one orientation of :class:`~rankwise.completion.observations.Observations`: entries of row i are
``starts[i] : starts[i + 1]``, entry p lies in column ``columns[p]``. Given the other orientation the same kernel works
on columns. Rows are independent, so the result does not depend on the number of threads. Without numba the same
functions come from ``kernels_without_numba`` (sparse matrix products, several times slower).

Shapes: nnz entries, m rows, n columns, k the width of a factor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.completion import kernels_without_numba as plain

try:
    import numba
except ImportError:  # the plain kernels give the same numbers
    numba = None

Array = NDArray[np.floating]
Index = NDArray[np.integer]

# reassociation lets the dot products use vector instructions; NaN and infinity keep their meaning, so divergence shows
_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "arcp"}}
# below this much work, threads cost more than they bring (a fork and join takes up to milliseconds on a busy machine)
_FEW_OPERATIONS = 20_000_000


def ridge_rows(
    starts: Index, columns: Index, values: Array, factor: Array, penalty: Array, per_entry: Array, shift: Array
) -> tuple[Array, Array, Array]:
    """Every row's ridge regression on the factors of its observed columns.

    w_i = argmin Σ_j (y_ij − x_j·w)² + wᵀ(P + n_i·Q)w − 2 n_i·h·w, over the n_i observed j of row i: one alternating
    least-squares half-step, and the fold-in of an unseen row.

    Args:
        starts: (m + 1,).
        columns: (nnz,).
        values: y, (nnz,).
        factor: x, (n, k).
        penalty: P, (k, k) symmetric.
        per_entry: Q, (k, k) symmetric, zero where the columns' factors are taken as exact.
        shift: h, (k,).

    Returns:
        w (m, k), the lower Cholesky factors of the normal matrices (m, k, k), and the residuals y − x·w (nnz,).
    """
    rows, width = len(starts) - 1, factor.shape[1]
    solution = np.empty((rows, width), factor.dtype)
    triangles = np.empty((rows, width, width), factor.dtype)
    residual = np.empty(len(values), factor.dtype)
    with _threads_for(len(values) * width * width):
        _ridge_rows(starts, columns, values, factor, penalty, per_entry, shift, solution, triangles, residual)
    return solution, triangles, residual


def project_out_rows(
    starts: Index, columns: Index, left: Array, right: Array, triangles: Array, direction: Array
) -> Array:
    """What a change of the column factors changes in the entries once every row has refitted.

    z_ij = l_i·b_j minus its ridge fit by row i on r_j: the Jacobian of variable projection, Kaufman's form
    (Golub & Pereyra 2003).

    Args:
        left: l, (m, k).
        right: r, (n, k).
        triangles: (m, k, k) from :func:`ridge_rows` at ``right``.
        direction: b, (n, k).

    Returns:
        z, (nnz,) in the order of ``columns``.
    """
    change = np.empty(len(columns), right.dtype)
    with _threads_for(len(columns) * right.shape[1] * 4):
        _project_out_rows(starts, columns, left, right, triangles, direction, change)
    return change


def gather_columns(
    column_starts: Index, rows: Index, order: Index, left: Array, values: Array, out: Array | None = None
) -> Array:
    """Zᵀ·left for the sparse Z of ``values``: (n, k), the gradient on the column side.

    Args:
        column_starts: (n + 1,).
        rows: (nnz,) in column order.
        order: (nnz,) position in ``values`` of each entry in column order.
        left: (m, k).
        values: (nnz,) in row order.
        out: filled and returned instead of a new array.
    """
    total = np.empty((len(column_starts) - 1, left.shape[1]), left.dtype) if out is None else out
    with _threads_for(len(rows) * left.shape[1]):
        _gather_columns(column_starts, rows, order, left, values, total)
    return total


def block_sums(starts: Index, columns: Index, factor: Array) -> Array:
    """(m, k, k): Σ_j x_j x_jᵀ over the observed j of each row."""
    sums = np.empty((len(starts) - 1, factor.shape[1], factor.shape[1]), factor.dtype)
    with _threads_for(len(columns) * factor.shape[1] ** 2):
        _block_sums(starts, columns, factor, sums)
    return sums


def factor_blocks(sums: Array, penalty: Array) -> Array:
    """The lower Cholesky factors of S + diag(penalty) for each S of ``sums`` (m, k, k), in its place."""
    with _threads_for(sums.size * sums.shape[1]):
        _factor_blocks(sums, penalty)
    return sums


def solve_blocks(triangles: Array, right_hand_sides: Array) -> Array:
    """(m, k) solutions of the m systems whose Cholesky factors are given."""
    solution = np.empty_like(right_hand_sides)
    with _threads_for(triangles.size):
        _solve_blocks(triangles, right_hand_sides, solution)
    return solution


def expected_moments(
    starts: Index, columns: Index, values: Array, means: Array, covariances: Array
) -> tuple[Array, Array, NDArray[np.float64]]:
    """What the entries of each row tell of its intercept and factor, the columns' being uncertain themselves.

    Model y_ij = b_i + c_j + f_i·g_j + noise. ``means`` holds (c_j, E g_j), ``covariances`` their joint covariance. With
    x_j = (1, g_j), sums over the observed j:

    Args:
        means: (n, 1 + k).
        covariances: (n, 1 + k, 1 + k).

    Returns:
        Σ E[x xᵀ] as lower triangles (m, (1 + k)(2 + k)/2), Σ E[(y − c) x] (m, 1 + k) and Σ E(y − c)² (m,). Those of
        several processes add up.
    """
    rows, width = len(starts) - 1, means.shape[1]
    second = np.zeros((rows, width * (width + 1) // 2), means.dtype)
    first = np.zeros((rows, width), means.dtype)
    power = np.zeros(rows, np.float64)
    with _threads_for(len(values) * width * width):
        _expected_moments(starts, columns, values, means, covariances, second, first, power)
    return second, first, power


def posteriors(
    moments: tuple[Array, Array, NDArray[np.float64]], prior: Array, precision: float
) -> tuple[Array, Array, NDArray[np.float64]]:
    """Gaussian posterior of every row's intercept and factor, prior N(0, diag(1/prior)).

    Variational matrix factorization (Lim & Teh 2007), with intercepts.

    Args:
        moments: from :func:`expected_moments`.
        prior: (1 + k,) prior precisions.
        precision: 1/σ² of the noise.

    Returns:
        means (m, 1 + k), covariances (m, 1 + k, 1 + k) and, one a row, the expected squared residuals Σ_j E(y − ŷ)².
    """
    second, first, power = moments
    rows, width = first.shape
    mean = np.empty_like(first)
    covariance = np.empty((rows, width, width), first.dtype)
    squares = np.empty(rows, np.float64)
    with _threads_for(rows * width**3):
        _posteriors(second, first, power, prior, precision, mean, covariance, squares)
    return mean, covariance, squares


def entries_at(rows: Index, columns: Index, left: Array, right: Array) -> Array:
    """left[rows]·right[columns], (nnz,), without gathering the factors first."""
    product = np.empty(len(rows), np.result_type(left, right))
    with _threads_for(len(rows) * left.shape[1]):
        _entries_at(rows, columns, left, right, product)
    return product


@contextmanager
def _threads_for(operations: int) -> Iterator[None]:
    """One thread where the work is too little to share."""
    if numba is None or operations >= _FEW_OPERATIONS:
        yield
        return
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(before)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """At most ``count`` threads in the compiled kernels; None leaves numba's own number."""
    if numba is None or count is None:
        yield
        return
    before = numba.get_num_threads()
    numba.set_num_threads(max(1, min(count, numba.config.NUMBA_NUM_THREADS)))
    try:
        yield
    finally:
        numba.set_num_threads(before)


if numba is None:
    _ridge_rows: Any = plain.ridge_rows
    _project_out_rows: Any = plain.project_out_rows
    _gather_columns: Any = plain.gather_columns
    _block_sums: Any = plain.block_sums
    _factor_blocks: Any = plain.factor_blocks
    _solve_blocks: Any = plain.solve_blocks
    _expected_moments: Any = plain.expected_moments
    _posteriors: Any = plain.posteriors
    _entries_at: Any = plain.entries_at
else:
    # small triangles, every inner loop along a row, so that it runs in vector instructions

    @numba.njit(**_OPTIONS)
    def _cholesky(H: Array) -> None:
        """The lower factor, in place."""
        for a in range(H.shape[0]):
            for b in range(a + 1):
                t = H[a, b]
                for c in range(b):
                    t -= H[a, c] * H[b, c]
                H[a, b] = t / H[b, b] if b < a else np.sqrt(t)

    @numba.njit(**_OPTIONS)
    def _substitute(H: Array, x: Array) -> None:
        """x becomes the solution of H Hᵀ x = x."""
        k = H.shape[0]
        for a in range(k):
            t = x[a]
            for c in range(a):
                t -= H[a, c] * x[c]
            x[a] = t / H[a, a]
        for a in range(k - 1, -1, -1):
            x[a] /= H[a, a]
            t = x[a]
            for c in range(a):
                x[c] -= t * H[a, c]

    @numba.njit(**_OPTIONS)
    def _invert(H: Array, W: Array, V: Array) -> None:
        """V becomes (H Hᵀ)⁻¹; W is scratch of the same shape."""
        k = H.shape[0]
        for a in range(k):  # W = H⁻¹, row after row
            for b in range(k):
                W[a, b] = 0
            W[a, a] = 1
            for c in range(a):
                h = H[a, c]
                for b in range(c + 1):
                    W[a, b] -= h * W[c, b]
            for b in range(a + 1):
                W[a, b] /= H[a, a]
        for a in range(k):
            for b in range(k):
                V[a, b] = 0
        for c in range(k):
            for a in range(c + 1):
                w = W[c, a]
                for b in range(c + 1):
                    V[a, b] += w * W[c, b]

    @numba.njit(parallel=True, **_OPTIONS)
    def _ridge_rows(starts, columns, values, factor, penalty, per_entry, shift, solution, triangles, residual):  # type: ignore[no-untyped-def]
        k = factor.shape[1]
        for i in numba.prange(len(starts) - 1):
            H, w = triangles[i], solution[i]
            seen = starts[i + 1] - starts[i]
            for a in range(k):
                w[a] = seen * shift[a]
                for b in range(k):
                    H[a, b] = penalty[a, b] + seen * per_entry[a, b]
            for p in range(starts[i], starts[i + 1]):
                x, y = factor[columns[p]], values[p]
                for a in range(k):
                    xa = x[a]
                    w[a] += y * xa
                    for b in range(k):  # the whole row, not the triangle: it vectorizes
                        H[a, b] += xa * x[b]
            _cholesky(H)
            _substitute(H, w)
            for p in range(starts[i], starts[i + 1]):
                x, t = factor[columns[p]], values[p]
                for a in range(k):
                    t -= x[a] * w[a]
                residual[p] = t

    @numba.njit(parallel=True, **_OPTIONS)
    def _project_out_rows(starts, columns, left, right, triangles, direction, change):  # type: ignore[no-untyped-def]
        k = right.shape[1]
        for i in numba.prange(len(starts) - 1):
            row_fit = np.zeros(k, right.dtype)
            l = left[i]  # noqa: E741
            for p in range(starts[i], starts[i + 1]):
                b, r = direction[columns[p]], right[columns[p]]
                z = l[0] * b[0]
                for a in range(1, k):
                    z += l[a] * b[a]
                change[p] = z
                for a in range(k):
                    row_fit[a] += z * r[a]
            _substitute(triangles[i], row_fit)
            for p in range(starts[i], starts[i + 1]):
                r, z = right[columns[p]], change[p]
                for a in range(k):
                    z -= row_fit[a] * r[a]
                change[p] = z

    @numba.njit(parallel=True, **_OPTIONS)
    def _gather_columns(column_starts, rows, order, left, values, total):  # type: ignore[no-untyped-def]
        k = left.shape[1]
        for j in numba.prange(len(column_starts) - 1):
            t = total[j]
            for a in range(k):
                t[a] = 0
            for p in range(column_starts[j], column_starts[j + 1]):
                z, l = values[order[p]], left[rows[p]]  # noqa: E741
                for a in range(k):
                    t[a] += z * l[a]

    @numba.njit(parallel=True, **_OPTIONS)
    def _block_sums(starts, columns, factor, sums):  # type: ignore[no-untyped-def]
        k = factor.shape[1]
        for i in numba.prange(len(starts) - 1):
            H = sums[i]
            for a in range(k):
                for b in range(k):
                    H[a, b] = 0
            for p in range(starts[i], starts[i + 1]):
                x = factor[columns[p]]
                for a in range(k):
                    xa = x[a]
                    for b in range(k):
                        H[a, b] += xa * x[b]

    @numba.njit(parallel=True, **_OPTIONS)
    def _factor_blocks(sums, penalty):  # type: ignore[no-untyped-def]
        for i in numba.prange(len(sums)):
            for a in range(len(penalty)):
                sums[i, a, a] += penalty[a]
            _cholesky(sums[i])

    @numba.njit(parallel=True, **_OPTIONS)
    def _solve_blocks(triangles, right_hand_sides, solution):  # type: ignore[no-untyped-def]
        for i in numba.prange(triangles.shape[0]):
            x = solution[i]
            for a in range(x.shape[0]):
                x[a] = right_hand_sides[i, a]
            _substitute(triangles[i], x)

    @numba.njit(parallel=True, **_OPTIONS)
    def _second_moments(means, covariances):  # type: ignore[no-untyped-def]
        """(n, k(k + 1)/2): the lower triangle of E[x xᵀ], x = (1, g), row after row."""
        n, k = means.shape
        packed = np.empty((n, k * (k + 1) // 2), means.dtype)
        for j in numba.prange(n):
            at = packed[j]
            at[0] = 1
            q = 1
            for a in range(1, k):
                at[q] = means[j, a]
                for b in range(1, a + 1):
                    at[q + b] = means[j, a] * means[j, b] + covariances[j, a, b]
                q += a + 1
        return packed

    @numba.njit(parallel=True, **_OPTIONS)
    def _expected_moments(starts, columns, values, means, covariances, second, first, power):  # type: ignore[no-untyped-def]
        k = means.shape[1]
        # made once a column instead of once an entry: each entry then adds one contiguous vector
        of_columns = _second_moments(means, covariances)
        with_intercept = covariances[:, 0].copy()  # close together, unlike the first rows of whole blocks
        for i in numba.prange(len(starts) - 1):
            packed, h = second[i], first[i]
            t = 0.0
            for p in range(starts[i], starts[i + 1]):
                j = columns[p]
                x, C, moments = means[j], with_intercept[j], of_columns[j]
                y = values[p] - x[0]
                t += y * y + C[0]
                h[0] += y
                for a in range(1, k):
                    h[a] += y * x[a] - C[a]
                for q in range(packed.shape[0]):
                    packed[q] += moments[q]
            power[i] = t

    @numba.njit(parallel=True, **_OPTIONS)
    def _posteriors(second, first, power, prior, precision, mean, covariance, squares):  # type: ignore[no-untyped-def]
        k = first.shape[1]
        for i in numba.prange(len(first)):
            S = np.empty((k, k), first.dtype)  # Σ E[x xᵀ]
            q = 0
            for a in range(k):
                for b in range(a + 1):
                    S[a, b] = S[b, a] = second[i, q + b]
                q += a + 1
            H = precision * S
            for a in range(k):
                H[a, a] += prior[a]
            _cholesky(H)
            w, V, h = mean[i], covariance[i], first[i]
            for a in range(k):
                w[a] = precision * h[a]
            _substitute(H, w)
            _invert(H, np.empty((k, k), first.dtype), V)
            t = power[i]
            for a in range(k):
                t -= 2 * w[a] * h[a]
                for b in range(k):
                    t += S[a, b] * (w[a] * w[b] + V[a, b])
            squares[i] = t

    @numba.njit(parallel=True, **_OPTIONS)
    def _entries_at(rows, columns, left, right, product):  # type: ignore[no-untyped-def]
        for p in numba.prange(len(rows)):
            l, r = left[rows[p]], right[columns[p]]  # noqa: E741
            t = l[0] * r[0]
            for a in range(1, left.shape[1]):
                t += l[a] * r[a]
            product[p] = t
