"""A matrix as left·rightᵀ with both factors sharing its singular values evenly, and the deep form of the same product."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rankwise.completion.collective import ALONE, Collective

Array = NDArray[np.floating]


class Balanced(NamedTuple):
    """left = U√S, right = V√S: of all factor pairs of this product, the one of least norm.

    ``left`` (m, k) and ``right`` (n, k) have orthogonal columns of squared norm ``singular_values`` (k,), falling.
    """

    left: Array
    right: Array
    singular_values: Array

    def keep(self, kept: NDArray[np.bool_] | slice) -> "Balanced":
        return Balanced(self.left[:, kept], self.right[:, kept], self.singular_values[kept])


def balanced(left: Array, right: Array, collective: Collective = ALONE) -> Balanced:
    """The balanced factors of left·rightᵀ, by two thin QRs and one k × k SVD: O((m + n)k²).

    With several processes ``left`` is each one's rows, ``right`` the same for all.

    Example:
        >>> import numpy as np
        >>> from rankwise.completion.balanced import balanced
        >>> balanced(np.array([[3.0], [4.0]]), np.array([[2.0]])).singular_values.tolist()
        [10.0]
    """
    Q_left, T_left = _tall_qr(left, collective)
    Q_right, T_right = np.linalg.qr(right)
    U, s, Vh = np.linalg.svd(T_left @ T_right.T)
    width = len(s)
    half = np.sqrt(s)
    return Balanced(
        np.ascontiguousarray(Q_left @ (U[:, :width] * half)), np.ascontiguousarray(Q_right @ (Vh[:width].T * half)), s
    )


def _tall_qr(left: Array, collective: Collective) -> tuple[Array, Array]:
    """QR of everybody's rows: the triangles of everybody's own, one below the other, have the same triangle."""
    Q, T = np.linalg.qr(left)
    if collective.size == 1:
        return Q, T
    counts = collective.parts(len(T))
    start = sum(counts[: collective.rank])
    Q_all, T = np.linalg.qr(collective.stacked(T))
    return Q @ Q_all[start : start + counts[collective.rank]], T


def deep_factors(factors: Balanced, depth: int) -> tuple[Array, Array, Array]:
    """The same matrix as U W̃_L ⋯ W̃_1 Vᵀ with L = ``depth`` equal inner factors, the deep factorization of least norm.

    ½Σ‖W̃_l‖² is then (L/2)Σσ^{2/L}, the smallest it can be (overview, Corollary 1, with the factor corrected).

    Returns:
        U (m, k) and V (n, k) with orthonormal columns, and the diagonals of the inner factors (L, k).
    """
    s = factors.singular_values
    half = np.sqrt(np.where(s > 0, s, 1))
    return factors.left / half, factors.right / half, np.tile(s ** (1 / depth), (depth, 1))
