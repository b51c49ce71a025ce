"""Theorem 2.1's bases, in which every factor stays block diagonal, and how far given factors are from that."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.factorizations.compressed import CompressedDeepLinear
from rankwise.factorizations.deep_linear import DeepLinear
from rankwise.factorizations.dynamics import left_behind
from rankwise.spectral import MatrixOperator


@dataclass(frozen=True)
class InvariantBases:
    """U_l and V_l of Theorem 2.1, V_{l+1} = U_l.

    Attributes:
        left: U_1 … U_L, orthogonal, (d, d) each; the first 2r columns span what trains.
        right: V_1 … V_L, likewise.
        width: 2r.
    """

    left: list[Float[Tensor, "d d"]]
    right: list[Float[Tensor, "d d"]]
    width: int


@dataclass(frozen=True)
class InvariantBlocks:
    """Factors read in the bases: UᵀWV = [[W̃, B], [C, D]].

    Attributes:
        inner: W̃_l, (w, w) each.
        rho: mean diagonal of D for every factor, (L,); nan where D is empty.
        leakage: √(‖B‖² + ‖C‖²) for every factor, (L,); zero in exact arithmetic.
        rho_error: ‖D − ρI‖_F for every factor, (L,), with the ρ given or else that mean.
    """

    inner: list[Float[Tensor, "_ _"]]
    rho: Float[Tensor, " L"]
    leakage: Float[Tensor, " L"]
    rho_error: Float[Tensor, " L"]


def invariant_bases(deep: DeepLinear, gradient: Float[Tensor, "d d"] | MatrixOperator, rank: int) -> InvariantBases:
    """The bases of a given start (Theorem 2.1): V_1 from the gradient, U_l = W_l(0)V_l/ε_l, V_{l+1} = U_l.

    L d × d matrices: for tests and study. :func:`invariant_subspaces` finds the trained block alone without any of them.

    Args:
        deep: the start, factors ε_l·orthogonal, d × d.
        gradient: G = ∂loss/∂f at f = 0, −Φ for the squared loss.
        rank: r, an upper bound on the rank of G.

    Raises:
        ValueError: factors not scaled orthogonal, or d ≤ 2r.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import DeepLinear, invariant_bases, invariant_blocks
        >>> deep = DeepLinear.orthogonal(6, 2, 0.1, generator=torch.Generator().manual_seed(0))
        >>> bases = invariant_bases(deep, torch.diag(torch.tensor([1.0, 0, 0, 0, 0, 0])), rank=1)
        >>> blocks = invariant_blocks(deep.weights, bases.left, bases.right, width=2)
        >>> bool(blocks.leakage.max() < 1e-6), [round(value, 4) for value in blocks.rho.tolist()]
        (True, [0.1, 0.1])
    """
    left_behind(deep.weights[0].shape[0], rank)
    block = CompressedDeepLinear.from_full_width(deep, gradient, rank).right.detach()
    width = block.shape[1]
    complement = torch.linalg.qr(block, mode="complete").Q[:, width:]
    chain = [torch.cat([block, complement], dim=1)]
    for weight in deep.weights:
        scale = torch.linalg.matrix_norm(weight.detach()) / weight.shape[0] ** 0.5
        chain.append(weight.detach() @ chain[-1] / scale)
    return InvariantBases(chain[1:], chain[:-1], width)


def invariant_blocks(
    weights: Iterable[Float[Tensor, "_ _"]],
    U: Sequence[Float[Tensor, "_ _"]],
    V: Sequence[Float[Tensor, "_ _"]],
    *,
    width: int,
    rho: Float[Tensor, " L"] | None = None,
) -> InvariantBlocks:
    """How block diagonal the factors are in the bases U_l, V_l, and how equal their remaining singular values (eq. 5).

    Args:
        weights: W_1 … W_L.
        U: U_1 … U_L, orthogonal, one for each factor's output.
        V: V_1 … V_L, for its input.
        width: w, columns of U_l and V_l that belong to the trained block.
        rho: the values to hold the remaining block against, ρ_l of :func:`rho_trajectory` at this iteration; its own mean
            unless given.

    Raises:
        ValueError: different numbers of factors and bases.

    Example: see :func:`invariant_bases`.

        >>> import torch
        >>> from rankwise.factorizations import invariant_blocks
        >>> eye = [torch.eye(3)]
        >>> invariant_blocks([torch.ones(3, 3)], eye, eye, width=1).leakage.item()
        2.0
    """
    weights = list(weights)
    if not len(weights) == len(U) == len(V):
        raise ValueError(f"expected a U and a V for each factor, got {len(weights)} factors, {len(U)} U and {len(V)} V")
    inner, values, leakage, errors = [], [], [], []
    for number, (weight, left, right) in enumerate(zip(weights, U, V, strict=True)):
        whole = left.mT @ weight.detach() @ right
        rest = whole[width:, width:]
        value = rest.diagonal().mean() if rho is None else rho[number].to(rest)
        inner.append(whole[:width, :width])
        values.append(rest.diagonal().mean())
        leakage.append(torch.hypot(whole[width:, :width].norm(), whole[:width, width:].norm()))
        errors.append((rest - value * torch.eye(*rest.shape).to(rest)).norm())
    return InvariantBlocks(inner, torch.stack(values), torch.stack(leakage), torch.stack(errors))
