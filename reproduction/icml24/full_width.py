"""Gradient descent on the full-width completion problem (eq. 10), dense: what compression is compared with."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def full_width_descent(
    weights: list[Matrix],
    masked_target: Matrix,
    mask: NDArray[np.bool_],
    learning_rate: float,
    max_iter: int,
    callback: Callable[[int, float, Matrix], bool],
) -> int:
    """min ½‖Ω⊙(W_L ⋯ W_1 − Φ)‖² over all W_l, d × d each, in place; 2L d³-products an iteration.

    Args:
        weights: W_1 … W_L, first applied first.
        masked_target: Ω⊙Φ.
        mask: Ω.
        learning_rate: η, in units of the sum.
        max_iter: most updates.
        callback: called with (iteration, loss, f) before every update; True ends descent.

    Returns:
        Updates made.
    """
    for iteration in range(max_iter + 1):
        below = [weights[0]]
        for weight in weights[1:]:
            below.append(weight @ below[-1])
        E = np.where(mask, below[-1], 0.0) - masked_target
        if callback(iteration, 0.5 * float(np.square(E).sum()), below[-1]) or iteration == max_iter:
            return iteration
        above = E  # (W_L ⋯ W_{l+1})ᵀ E
        for layer in range(len(weights) - 1, -1, -1):
            gradient = above @ below[layer - 1].T if layer else above
            above = weights[layer].T @ above if layer else above
            weights[layer] = weights[layer] - learning_rate * gradient
    return max_iter
