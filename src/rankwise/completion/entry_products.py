"""The residual of a product ABᵀ at observed entries, and its products with both factors, without an m × n array.

The loops are compiled by numba where it is installed, on first use. Measured on one thread of a shared machine, 200,000
entries of a 1000 × 1000 matrix, best of 40, in ns an entry for all three results: at width 16 in float32 4.7 in one
pass, 6.7 in two and 29 by sparse matrix products; in float64 6.5, 7.3 and 32. Fixing the width at compile time,
splitting a row's residuals from its products, or one loop for both updates were each slower.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.completion.kernels import gather_columns
from rankwise.completion.observations import Observations

numba: Any = None
prange: Any = range
with suppress(ImportError):  # numpy_chunks needs neither
    numba = import_module("numba")
    prange = numba.prange

Floats = NDArray[np.floating]

# measured: below, starting a second thread costs more than it computes
_ONE_THREAD_BELOW = 1_000_000
# sums may be reordered and multiply-adds fused; NaN and infinity must survive, descent watches for them
_MATH = {"reassoc", "contract", "nsz"}
# how many entries' factor rows the numpy kernel gathers at a time: 16,384 rows of 16 float64 are 2 MiB
_CHUNK = 16_384


@dataclass(frozen=True)
class EntryProducts:
    """E = Ω⊙(ABᵀ − Φ) at the observed entries, and what descent on A and B needs of it.

    Attributes:
        residual: (nnz,) E, in row order.
        left: (m, w) E B.
        right: (n, w) Eᵀ A.
        row_squares: (m,) Σ_j E_ij², float64 whatever the dtype of the rest.
    """

    residual: Floats
    left: Floats
    right: Floats
    row_squares: NDArray[np.float64]

    @classmethod
    def empty(cls, observations: Observations, width: int) -> "EntryProducts":
        """Unfilled arrays for factors of this width, in the dtype of the observed values."""
        (m, n), dtype = observations.shape, observations.values.dtype
        return cls(
            np.empty(observations.count, dtype), np.empty((m, width), dtype), np.empty((n, width), dtype), np.empty(m)
        )

    @property
    def squared_norm(self) -> float:
        """‖E‖_F², summed in one order whatever the number of threads."""
        return float(self.row_squares.sum())


Kernel = Callable[[Observations, Floats, Floats, EntryProducts], None]


def entry_products(
    observations: Observations,
    left: Floats,
    right: Floats,
    *,
    out: EntryProducts | None = None,
    kernel: Kernel | None = None,
) -> EntryProducts:
    """E = Ω⊙(ABᵀ − Φ), E B and Eᵀ A: with A = U W̃_L ⋯ W̃_1 and B = V, all that the gradient of eq. 11 needs.

    6·nnz·w operations, and no array larger than the observations and the factors.

    Args:
        observations: Ω⊙Φ, (m, n) with nnz entries, float32 or float64.
        left: A, (m, w), of the observations' dtype.
        right: B, (n, w), likewise.
        out: filled and returned instead of new arrays.
        kernel: :func:`numba_serial`, :func:`numba_threads` or :func:`numpy_chunks`; :func:`fastest_kernel` unless given.

    Returns:
        :class:`EntryProducts`. All kernels give the same numbers to rounding.

    Raises:
        ValueError: shapes or dtypes that do not fit each other.

    Example:
        >>> import numpy as np
        >>> from rankwise.completion.entry_products import entry_products
        >>> from rankwise.completion.observations import as_observations
        >>> seen = as_observations(np.array([[5.0, np.nan], [np.nan, 2.0]]))
        >>> products = entry_products(seen, np.array([[1.0], [2.0]]), np.array([[3.0], [4.0]]))
        >>> products.residual.tolist(), products.left.tolist(), products.squared_norm
        ([-2.0, 6.0], [[-6.0], [24.0]], 40.0)
    """
    m, n = observations.shape
    width = left.shape[-1]
    if left.shape != (m, width) or right.shape != (n, width):
        raise ValueError(f"expected factors of shapes ({m}, w) and ({n}, w), got {left.shape} and {right.shape}")
    if not left.dtype == right.dtype == observations.values.dtype:
        raise ValueError(f"expected factors of {observations.values.dtype}, got {left.dtype} and {right.dtype}")
    if out is None:
        out = EntryProducts.empty(observations, width)
    elif out.left.shape != left.shape or out.right.shape != right.shape or out.left.dtype != left.dtype:
        raise ValueError(f"out was made for other factors, of shapes {out.left.shape} and {out.right.shape}")
    chosen = kernel or fastest_kernel(observations)
    chosen(observations, np.ascontiguousarray(left), np.ascontiguousarray(right), out)
    return out


def fastest_kernel(observations: Observations) -> Kernel:
    """The compiled kernels where numba is installed, with threads from a million entries on; otherwise numpy's."""
    if numba is None:
        return numpy_chunks
    threads = numba.get_num_threads() > 1 and observations.count >= _ONE_THREAD_BELOW
    return numba_threads if threads else numba_serial


def numba_serial(observations: Observations, A: Floats, B: Floats, out: EntryProducts) -> None:
    """One thread, one pass: each entry's two factor rows are read once for all three results."""
    seen = observations
    _compiled(_fused, False)(
        seen.row_starts, seen.columns, seen.values, A, B, out.residual, out.left, out.right, out.row_squares
    )


def numba_threads(observations: Observations, A: Floats, B: Floats, out: EntryProducts) -> None:
    """All of numba's threads: over rows for E and E B, then over columns for Eᵀ A, so that no two write one place."""
    seen = observations
    _compiled(_over_rows, True)(
        seen.row_starts, seen.columns, seen.values, A, B, out.residual, out.left, out.row_squares
    )
    gather_columns(seen.column_starts, seen.rows, seen.order, A, out.residual, out=out.right)


def numpy_chunks(observations: Observations, A: Floats, B: Floats, out: EntryProducts) -> None:
    """Without numba: the residual in chunks of entries, then two sparse-times-tall products."""
    rows = observations.row_of_each()
    for start in range(0, observations.count, _CHUNK):
        part = slice(start, start + _CHUNK)
        np.einsum("ek,ek->e", A[rows[part]], B[observations.columns[part]], out=out.residual[part])
    out.residual[:] -= observations.values
    E = observations.matrix(out.residual)
    out.left[:] = E @ B
    out.right[:] = E.T @ A
    out.row_squares[:] = np.bincount(rows, np.square(out.residual, dtype=np.float64), minlength=len(A))


@cache
def _compiled(loop: Callable[..., None], parallel: bool) -> Callable[..., None]:
    compiled: Any = numba.njit(cache=True, fastmath=_MATH, parallel=parallel)(loop)
    return compiled


def _fused(
    row_starts: NDArray[np.int64],
    columns: NDArray[np.int32],
    values: Floats,
    A: Floats,
    B: Floats,
    residual: Floats,
    EB: Floats,
    EtA: Floats,
    row_squares: NDArray[np.float64],
) -> None:
    width = A.shape[1]
    EtA[:] = 0
    for i in range(A.shape[0]):
        squares = 0.0
        for k in range(width):
            EB[i, k] = 0
        for e in range(row_starts[i], row_starts[i + 1]):
            j = columns[e]
            difference = -values[e]
            for k in range(width):
                difference += A[i, k] * B[j, k]
            residual[e] = difference
            squares += np.float64(difference) * np.float64(difference)
            for k in range(width):
                EB[i, k] += difference * B[j, k]
            for k in range(width):
                EtA[j, k] += difference * A[i, k]
        row_squares[i] = squares


def _over_rows(
    row_starts: NDArray[np.int64],
    columns: NDArray[np.int32],
    values: Floats,
    A: Floats,
    B: Floats,
    residual: Floats,
    EB: Floats,
    row_squares: NDArray[np.float64],
) -> None:
    width = A.shape[1]
    for i in prange(A.shape[0]):
        squares = 0.0
        for k in range(width):
            EB[i, k] = 0
        for e in range(row_starts[i], row_starts[i + 1]):
            j = columns[e]
            difference = -values[e]
            for k in range(width):
                difference += A[i, k] * B[j, k]
            residual[e] = difference
            squares += np.float64(difference) * np.float64(difference)
            for k in range(width):
                EB[i, k] += difference * B[j, k]
        row_squares[i] = squares
