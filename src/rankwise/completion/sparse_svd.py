"""The leading singular triplets of a sparse matrix, as exactly as a search direction needs them."""

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from rankwise.completion.collective import ALONE, Collective

Array = NDArray[np.floating]

_STEPS_BEYOND = 7


def leading_triplets(
    matrix: sp.csr_array, count: int, seed: int, *, collective: Collective = ALONE, height: int | None = None
) -> tuple[Array, Array, Array]:
    """``count`` leading triplets by a few steps of Golub–Kahan bidiagonalization with full reorthogonalization.

    Seven steps beyond ``count`` put σ₁ within a few per cent; exact triplets would buy nothing where they only start an
    iteration. Costs two products a step.

    Args:
        matrix: (m, n), sparse; with several processes each one's rows.
        count: k, reduced to min(m, n) where larger.
        seed: of the random start.
        collective: the processes that have the rows.
        height: m of all of them together.

    Returns:
        U (m, k), the singular values (k,) falling (lower bounds of the true ones), V (n, k).
    """
    rows, width = matrix.shape
    steps = min(count + _STEPS_BEYOND, rows if height is None else height, width)
    count = min(count, steps)
    dtype = matrix.dtype
    U, V = np.zeros((steps, rows), dtype), np.zeros((steps, width), dtype)
    alpha, beta = np.zeros(steps), np.zeros(steps)
    transposed = matrix.T
    v = np.random.default_rng(seed).standard_normal(width).astype(dtype)
    v /= np.linalg.norm(v)
    done = 0
    for j in range(steps):
        V[j] = v
        u = matrix @ v
        u -= U[:j].T @ collective.total(U[:j] @ u)
        u -= U[:j].T @ collective.total(U[:j] @ u)
        alpha[j] = collective.total(float(np.linalg.norm(u)) ** 2) ** 0.5
        done = j + 1
        if alpha[j] <= np.finfo(dtype).eps * max(1e-300, alpha[0]):
            break
        U[j] = u / alpha[j]
        v = collective.total(transposed @ U[j])
        v -= V[: j + 1].T @ (V[: j + 1] @ v)
        v -= V[: j + 1].T @ (V[: j + 1] @ v)
        beta[j] = collective.agreed(float(np.linalg.norm(v)))
        if beta[j] <= np.finfo(dtype).eps * max(1e-300, alpha[0]):
            break
        v /= beta[j]
    # A V = U B with B upper bidiagonal: α on the diagonal, β above it
    B = np.diag(alpha[:done]) + np.diag(beta[: done - 1], 1)
    left, s, right = np.linalg.svd(B)
    return (U[:done].T @ left[:, :count].astype(dtype)), s[:count], (V[:done].T @ right[:count].T.astype(dtype))
