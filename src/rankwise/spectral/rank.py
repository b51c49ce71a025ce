"""How many directions a matrix has: hard counts with stated cutoffs, and soft ones.

All functions take a matrix, or its singular values as a 1-D tensor. The hard counts then also need the matrix's
``shape``, since their cutoffs grow with it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.spectral.precision import compute_dtype, require_finite, require_matrix


def singular_values(matrix: Float[Tensor, "..."]) -> Float[Tensor, " k"]:
    """Singular values, largest first, in float32 or better; a 1-D tensor is taken to hold them already.

    Example:
        >>> import torch
        >>> from rankwise.spectral import singular_values
        >>> singular_values(torch.tensor([[0.0, 2.0], [1.0, 0.0]])).tolist()
        [2.0, 1.0]
    """
    wide = matrix.to(compute_dtype(matrix.dtype))
    require_finite(wide)
    if wide.ndim == 1:
        if not wide.numel():
            raise ValueError("expected at least one singular value, got an empty tensor")
        if bool((wide < 0).any()):
            raise ValueError("singular values cannot be negative; pass a 2-D matrix to have them computed")
        return wide.sort(descending=True).values
    require_matrix(wide)
    return torch.linalg.svdvals(wide)


def _shape_of(matrix: Tensor, shape: tuple[int, int] | None) -> tuple[int, int]:
    if shape is not None:
        return shape
    if matrix.ndim != 2:
        raise ValueError("singular values alone do not say how large the matrix is: pass shape=(rows, columns)")
    return matrix.shape[0], matrix.shape[1]


def numerical_rank(
    matrix: Float[Tensor, "..."], *, shape: tuple[int, int] | None = None, tol: float | None = None
) -> int:
    """Number of singular values strictly above ``tol``, by default eps·max(m, n)·σ₁.

    eps is that of the dtype the singular values are *computed* in (float32 for bf16 input: bf16's own eps times 768
    is 6, and every matrix would have rank 0).

    Args:
        matrix: (m, n), or its singular values (k,).
        shape: (m, n), needed with singular values. For a factored ΔW these are the layer's sizes.
        tol: absolute cutoff, in the matrix's units.

    Example:
        >>> import torch
        >>> from rankwise.spectral import numerical_rank
        >>> numerical_rank(torch.outer(torch.ones(5), torch.ones(4))), numerical_rank(torch.zeros(3, 3))
        (1, 0)
    """
    S = singular_values(matrix.detach())
    cutoff = torch.finfo(S.dtype).eps * max(_shape_of(matrix, shape)) * float(S[0]) if tol is None else tol
    # strictly above: with ≥ the zero matrix, whose cutoff is 0, would have full rank
    return int((cutoff < S).sum())


def numerical_rank_icml24(matrix: Float[Tensor, "..."], *, shape: tuple[int, int] | None = None) -> int:
    """The Deep LoRA paper's own count (ICML 2024, Fig. 7): singular values above both 1e-8 and d·σ₁·eps.

    Kept under its own name because its absolute floor of 1e-8 makes it depend on the matrix's scale.

    Example:
        >>> import torch
        >>> from rankwise.spectral import numerical_rank, numerical_rank_icml24
        >>> tiny = 1e-9 * torch.eye(3)
        >>> numerical_rank(tiny), numerical_rank_icml24(tiny)
        (3, 0)
    """
    S = singular_values(matrix.detach())
    cutoff = max(1e-8, max(_shape_of(matrix, shape)) * float(S[0]) * torch.finfo(S.dtype).eps)
    return int((cutoff < S).sum())


def stable_rank(matrix: Float[Tensor, "..."]) -> float:
    """‖A‖_F² / σ₁², between 1 and the rank; 0 for a zero matrix.

    Example:
        >>> import torch
        >>> from rankwise.spectral import stable_rank
        >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0])))
        1.25
    """
    S = singular_values(matrix.detach())
    if float(S[0]) == 0:
        return 0.0
    return float((S / S[0]).square().sum())


def effective_rank(matrix: Float[Tensor, "..."], *, power: int = 1) -> float:
    """exp of the entropy of σ^power / Σσ^power; 0 for a zero matrix.

    ``power=1`` weighs singular values (Roy & Vetterli 2007), ``power=2`` weighs their squares, the energies.

    Example:
        >>> import torch
        >>> from rankwise.spectral import effective_rank
        >>> round(effective_rank(torch.eye(4)), 4)
        4.0
    """
    if power not in (1, 2):
        raise ValueError(f"power must be 1 (singular values) or 2 (energies), got {power}")
    S = singular_values(matrix.detach()).double()
    if float(S[0]) == 0:
        return 0.0
    p = (S / S[0]).pow(power)
    p = p / p.sum()
    return float(torch.exp(torch.special.entr(p).sum()))


def rank_for_energy(matrix: Float[Tensor, "..."], energy: float) -> int:
    """Smallest k whose leading singular values hold at least ``energy`` of Σσ²; 0 for a zero matrix.

    Example:
        >>> import torch
        >>> from rankwise.spectral import rank_for_energy
        >>> rank_for_energy(torch.diag(torch.tensor([3.0, 1.0])), 0.9)
        1
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy is a share of Σσ² and must lie in (0, 1], got {energy}")
    S = singular_values(matrix.detach()).double()
    if float(S[0]) == 0:
        return 0
    share = (S / S[0]).square().cumsum(0)
    # a hair below: at energy = 1 rounding must not ask for directions of size zero
    return int(torch.searchsorted(share, share[-1] * energy * (1 - 1e-12))) + 1
