"""The best low-rank pair for a weight: for all inputs alike, or for those that a layer really gets.

With x drawn from the calibration data and C = E[xxᵀ], the mean squared error of the outputs is ‖(W − W_k)C^{1/2}‖_F², least
at W_k = [W·C^{1/2}]_k·C^{-1/2} where [·]_k keeps the k leading singular triplets. Let U_k be the left singular vectors of
W·C^{1/2}. As [A]_k = U_kU_kᵀA, this is W_k = U_kU_kᵀW: nothing is divided by, and a singular C needs no care. U depends on
W·C·Wᵀ alone, so that any root does: C = LLᵀ by Cholesky costs a tenth of an eigendecomposition.

C gets a ridge, damping·tr(C)/n. The minimum then weighs the error of the weight a little, against directions that the
calibration data has too few rows to know. Its error on that data is never above plain truncation's: the sum of both errors is
at most plain truncation's, and plain truncation has the least error of the weight.
"""

import math
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.spectral.precision import compute_dtype, require_finite

DAMPING = 1e-3  # measured on MiniLM: the score is the same from 1e-6 to 1e-2, with 32 and with 512 texts


def output_directions(
    W: Float[Tensor, "m n"], C: Float[Tensor, "n n"] | None = None, damping: float = DAMPING
) -> tuple[Float[Tensor, "m p"], Float[Tensor, " p"]]:
    """U and S of W·C^{1/2}, p = min(m, n): directions of the output by how much of it they carry.

    An exact SVD: a randomized one is close to optimal only where the spectrum falls, which a trained weight's does slowly.

    Args:
        W: the weight, of any floating dtype.
        C: second moment E[xxᵀ] of the layer's inputs; plain singular vectors of W without it, or where all inputs are 0.
        damping: ridge on C in units of its mean diagonal.

    Raises:
        ValueError: NaN or infinite entries.
    """
    U, S, _ = torch.linalg.svd(_rooted(W, C, damping), full_matrices=False)
    return U, S


def output_spectrum(
    W: Float[Tensor, "m n"], C: Float[Tensor, "n n"] | None = None, damping: float = DAMPING
) -> Float[Tensor, " p"]:
    """S alone of :func:`output_directions`, in a fraction of the time. Σ_{i>k}S_i² is the error left by rank k."""
    return torch.linalg.svdvals(_rooted(W, C, damping))


def require_damping(damping: float) -> None:
    """Refuse a ridge that would leave no second moment."""
    if not isinstance(damping, Real) or isinstance(damping, bool) or not 0 <= damping < math.inf:
        raise ValueError(f"damping must be a number of at least 0, got {damping!r}; leave it out for {DAMPING:g}")


def balanced_factors(
    W: Float[Tensor, "m n"], U: Float[Tensor, "m k"]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "k n"]]:
    """UUᵀW as a pair (left, right) in W's dtype whose columns and rows are equally long; √σ each for singular vectors U."""
    projected = U.mT @ W.to(U.dtype)
    lengths = projected.norm(dim=1)
    scale = torch.where(lengths > 0, lengths, 1.0).sqrt()  # a direction that W does not have stays 0
    return (U * scale).to(W.dtype), (projected / scale.unsqueeze(1)).to(W.dtype)


def _rooted(W: Tensor, C: Tensor | None, damping: float) -> Tensor:
    """W·L with LLᵀ = C + ridge."""
    A = W.to(compute_dtype(W.dtype))
    require_finite(A, "a weight")
    if C is None or float(C.diagonal().sum()) == 0:
        return A
    require_finite(C, "a layer's second moment")
    C = C.double()
    ridge = damping * C.diagonal().mean()
    L, failed = torch.linalg.cholesky_ex(C + ridge * torch.eye(len(C), dtype=C.dtype, device=C.device))
    if failed:  # singular to rounding, with no ridge or next to none
        values, vectors = torch.linalg.eigh(C)
        L = vectors * (values.clamp(min=0) + ridge).sqrt()
    return (A.double() @ L).to(A.dtype)
