"""Matrices whose singular values and vectors are known because they were put there."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

F64_EPS = torch.finfo(torch.float64).eps


class Planted(NamedTuple):
    matrix: Tensor
    U: Tensor
    S: Tensor
    V: Tensor


def frame(rows: int, columns: int, seed: int) -> Tensor:
    """Orthonormal float64 columns, made without rankwise."""
    gaussian = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(gaussian).Q


def planted(rows: int, columns: int, spectrum: Sequence[float] | Tensor, seed: int = 0) -> Planted:
    """U diag(S) Vᵀ in float64 with the given singular values (largest first)."""
    S = torch.as_tensor(spectrum, dtype=torch.float64)
    U, V = frame(rows, len(S), 2 * seed), frame(columns, len(S), 2 * seed + 1)
    return Planted(U * S @ V.mT, U, S, V)


def projector(basis: Tensor) -> Tensor:
    return basis.double() @ basis.double().mT


def spectral_norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), 2))
