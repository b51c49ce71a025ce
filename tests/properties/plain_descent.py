"""Descent on factors as its definition says, nothing shared with the library: the oracle of these tests."""

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

Step = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


def product(weights: list[Tensor]) -> Tensor:
    return reduce(lambda below, weight: weight @ below, weights)


def gradients(weights: list[Tensor], G: Tensor) -> list[Tensor]:
    """∇_{W_l} = (W_L ⋯ W_{l+1})ᵀ G (W_{l−1} ⋯ W_1)ᵀ (eq. 14)."""
    depth = len(weights)
    above, below = [G] * depth, [None] * depth
    for l in range(depth - 2, -1, -1):  # noqa: E741
        above[l] = weights[l + 1].mT @ above[l + 1]
    for l in range(1, depth):  # noqa: E741
        below[l] = weights[l - 1] if below[l - 1] is None else weights[l - 1] @ below[l - 1]
    return [a if b is None else a @ b.mT for a, b in zip(above, below, strict=True)]


def descend(weights: list[Tensor], G: Tensor, lr: float, decay: float) -> list[Tensor]:
    """One simultaneous step of gradient descent with weight decay on all factors."""
    steps = gradients(weights, G)
    return [(1 - lr * decay) * weight - lr * step for weight, step in zip(weights, steps, strict=True)]


def heavy_ball(lr: float, decay: float, momentum: float, nesterov: bool) -> Step:
    """W(t+1) = W(t) − ηg + μ(W(t) − W(t−1)), with g at W(t) or, for Nesterov, as one step further along."""
    velocities: list[Tensor] = []

    def step(weights: list[Tensor], slopes: list[Tensor]) -> list[Tensor]:
        g = [slope + decay * weight for slope, weight in zip(slopes, weights, strict=True)]
        before = velocities or [torch.zeros_like(weight) for weight in weights]
        velocities[:] = [momentum * v + a for v, a in zip(before, g, strict=True)]
        moves = [a + momentum * v for a, v in zip(g, velocities, strict=True)] if nesterov else velocities
        return [weight - lr * move for weight, move in zip(weights, moves, strict=True)]

    return step


def trajectory(
    weights: list[Tensor], gradient: Callable[[Tensor], Tensor], step: Step, steps: int
) -> list[list[Tensor]]:
    """The factors before every step and after the last, for a loss with gradient(f) = ∂loss/∂f."""
    path = [weights]
    for _ in range(steps):
        path.append(step(path[-1], gradients(path[-1], gradient(product(path[-1])))))
    return path
