"""Which dtype the algebra runs in, and what input is refused."""

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything narrower is computed in float32 (a bf16 SVD does not exist, and its eps lies)."""
    if not dtype.is_floating_point:
        raise TypeError(f"expected a floating-point matrix, got {dtype}; convert it with .float() first")
    return torch.float64 if dtype == torch.float64 else torch.float32


def require_matrix(matrix: Tensor, name: str = "matrix") -> None:
    """Refuse anything that is not a non-empty 2-D tensor."""
    if matrix.ndim != 2:
        raise ValueError(f"expected {name} to be 2-D, got shape {tuple(matrix.shape)}")
    if 0 in matrix.shape:
        raise ValueError(f"expected a non-empty {name}, got shape {tuple(matrix.shape)}")


def require_finite(values: Tensor, name: str = "matrix") -> None:
    """Refuse NaN and infinity: LAPACK would loop or return garbage."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"{name} of shape {tuple(values.shape)} has NaN or infinite entries; check the data or the step that made it"
        )
