"""The low-rank target of the documents' factorization figures."""

import numpy as np
import torch
from torch import Tensor


def low_rank_target(size: int, rank: int, seed: int, rows: int | None = None) -> Tensor:
    """A Gaussian matrix cut to its top r singular values, unscaled (σ ≈ 2√d for a square one), float64.

    Args:
        size: d, columns.
        rank: r.
        seed: of the Gaussian.
        rows: d unless given.

    Example:
        >>> from reproduction.planted import low_rank_target
        >>> low_rank_target(6, 2, seed=0).shape
        torch.Size([6, 6])
    """
    gaussian = np.random.default_rng(seed).standard_normal((rows or size, size))
    U, S, Vh = np.linalg.svd(gaussian, full_matrices=False)
    return torch.from_numpy((U[:, :rank] * S[:rank]) @ Vh[:rank])
