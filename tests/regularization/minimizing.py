"""Numerical minima to hold closed forms against: L-BFGS of scipy on tensors, gradients by autograd."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

F64 = torch.float64


def lbfgs(function: Callable[..., Tensor], start: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """The value and the tensors at a local minimum of function(*tensors), from ``start``, to float64's last digits."""
    shapes = [tensor.shape for tensor in start]

    def tensors(flat: np.ndarray) -> list[Tensor]:
        pieces = torch.tensor(flat, dtype=F64).split([shape.numel() for shape in shapes])
        return [piece.reshape(shape).requires_grad_() for piece, shape in zip(pieces, shapes, strict=True)]

    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        at = tensors(flat)
        value = function(*at)
        gradients = torch.autograd.grad(value, at)
        return value.item(), torch.cat([gradient.reshape(-1) for gradient in gradients]).numpy()

    found = minimize(
        value_and_gradient,
        torch.cat([tensor.reshape(-1) for tensor in start]).numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 20000, "ftol": 0, "gtol": 1e-11, "maxcor": 30},
    )
    return float(found.fun), [tensor.detach() for tensor in tensors(found.x)]


def best_lbfgs(function: Callable[..., Tensor], starts: Sequence[Sequence[Tensor]]) -> tuple[float, list[Tensor]]:
    """The lowest of several."""
    return min((lbfgs(function, start) for start in starts), key=lambda found: found[0])


def gaussians(shapes: Sequence[tuple[int, int]], seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(*shape, dtype=F64, generator=generator) for shape in shapes]
