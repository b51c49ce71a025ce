"""Labelled points, and maximal margins that do not come from rankwise."""

from typing import NamedTuple

import torch
from scipy.optimize import minimize
from torch import Tensor

from tests.regularization.minimizing import F64


class Labelled(NamedTuple):
    X: Tensor  # (d, n)
    y: Tensor


def clouds(classes: int, inputs: int, each: int, noise: float = 0.2, seed: int = 0) -> Labelled:
    """``each`` points around every one of ``classes`` orthonormal centres: separable while the noise is small."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(torch.randn(inputs, inputs, dtype=F64, generator=generator)).Q[:, :classes]
    y = torch.arange(classes).repeat_interleave(each)
    return Labelled(centres[:, y] + noise * torch.randn(inputs, len(y), dtype=F64, generator=generator), y)


def margin_matrices(data: Labelled) -> Tensor:
    """(e_{y_i} − e_c) x_iᵀ for all i and c ≠ y_i: (m, k, d). A margin is their inner product with the matrix f."""
    classes = int(data.y.max()) + 1
    eye = torch.eye(classes, dtype=F64)
    return torch.stack(
        [
            torch.outer(eye[label] - eye[other], x)
            for x, label in zip(data.X.mT, data.y, strict=True)
            for other in range(classes)
            if other != label
        ]
    )


def max_margin_matrix(data: Labelled) -> Tensor:
    """argmin ½‖f‖_F² s. t. all margins ≥ 1: the multi-class support vector machine, by SLSQP."""
    A = margin_matrices(data)
    shape, flat = A.shape[1:], A.flatten(1).numpy()
    found = minimize(
        lambda f: 0.5 * f @ f,
        flat.sum(0),
        jac=lambda f: f,
        constraints={"type": "ineq", "fun": lambda f: flat @ f - 1, "jac": lambda f: flat},
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    assert found.success
    return torch.tensor(found.x, dtype=F64).reshape(shape)
