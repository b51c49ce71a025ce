"""What LoRA-RITE computes for one factor of a product: its other factor's basis, and moments that follow it as it turns."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FactorBasis:
    """F = U·R of a factor F, (d, r).

    Attributes:
        U: (d, r) orthonormal columns; those that F does not have, where its rank is below r, are zero.
        R_inverse: (r, r) with F·R⁻¹ = U.
    """

    U: Tensor
    R_inverse: Tensor


def factor_basis(F: Tensor) -> FactorBasis:
    """U and R⁻¹ by QR and an r×r SVD.

    The paper takes any F = U·R; what is computed does not depend on which. Here U's columns are F's left singular vectors, so
    that directions can be left out: those below √eps·σ₁, along which half the digits of a gradient Fᵀ·G are rounding. With a
    column of U left at zero nothing of a past step is carried into it. Of F = 0, where LoRA starts, all are.
    """
    Q, R = torch.linalg.qr(F)
    E, S, Wh = torch.linalg.svd(R, full_matrices=False)
    kept = torch.finfo(F.dtype).eps ** 0.5 * S[:1] < S  # not ≤: a zero matrix has no directions
    inverse = torch.where(kept, 1 / S, torch.zeros_like(S))
    return FactorBasis((Q @ E) * kept, Wh.mT * inverse)


@dataclass(frozen=True)
class RiteMoments:
    """What is remembered of one factor X, (d, r), of a product X·Yᵀ, in the coordinates of Y's basis.

    Attributes:
        momentum: M, (d, r), of preconditioned gradients.
        second_moment: V, (r, r), of ∇ᵀ∇.
        escaped: ρ ≥ 0, (), of what V lost when its basis turned away.
        basis: U_Y, of Y as (d', r), when they were last changed.
    """

    momentum: Tensor
    second_moment: Tensor
    escaped: Tensor
    basis: Tensor


def rite_moments(
    gradient: Tensor,
    other: FactorBasis,
    before: RiteMoments | None,
    step: int,
    *,
    betas: tuple[float, float],
    eps: float,
) -> tuple[RiteMoments, Tensor]:
    """New moments of X and the direction M̂, (d, r), in the coordinates of Y's basis.

        ∇ = G_X·R_Y⁻¹,   P = U_Yᵀ·U_Y(before),
        ρ ← β₂(ρ + max_i |λ_i(V) − λ_i(PVPᵀ)|),   V ← β₂·PVPᵀ + (1−β₂)·∇ᵀ∇,
        M ← β₁·MPᵀ + (1−β₁)·∇·((V + ρI)/(1−β₂ᵗ))^{−1/2},   M̂ = M/(1−β₁ᵗ).

    Args:
        gradient: G_X, (d, r).
        other: of Y.
        before: None at the first step.
        step: t, counted from 1.
    """
    beta1, beta2 = betas
    G = gradient @ other.R_inverse
    if before is None:
        M, V, escaped = torch.zeros_like(G), G.new_zeros(G.shape[1], G.shape[1]), G.new_zeros(())
    else:
        P = other.U.mT @ before.basis
        M, V = before.momentum @ P.mT, P @ before.second_moment @ P.mT
        lost = torch.linalg.eigvalsh(before.second_moment) - torch.linalg.eigvalsh(V)
        escaped = beta2 * (before.escaped + lost.abs().max())
    V = beta2 * V + (1 - beta2) * (G.mT @ G)
    M = beta1 * M + (1 - beta1) * (G @ inverse_root(V, escaped, 1 - beta2**step, eps))
    return RiteMoments(M, V, escaped, other.U), M / (1 - beta1**step)


def inverse_root(V: Tensor, escaped: Tensor, weight: float, eps: float) -> Tensor:
    """(√((V + ρI)/weight) + eps·I)⁻¹ by eigenvalues, clamped from below to r·eps·λ₁, what rounding leaves of them; 0 of 0."""
    values, E = torch.linalg.eigh(V)
    least = len(V) * torch.finfo(V.dtype).eps * values[-1:].clamp(min=0)
    roots = ((torch.maximum(values, least) + escaped) / weight).sqrt() + eps
    return E * torch.where(roots > 0, 1 / roots, torch.zeros_like(roots)) @ E.mT
