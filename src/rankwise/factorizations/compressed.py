"""The compressed deep factorization U W̃_L ⋯ W̃_1 Vᵀ."""

from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.factorizations.deep_linear import DeepLinear
from rankwise.factorizations.invariant_subspaces import InvariantSubspaces
from rankwise.spectral import MatrixOperator, truncated_svd
from rankwise.spectral.orthogonal import residual_frame


def compose(inner: Float[Tensor, "L *e w w"]) -> Float[Tensor, "*e w w"]:
    """The core W̃_L ⋯ W̃_1 of stacked inner factors (index 0 is applied first); a stack of cores where e is given.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import compose
        >>> compose(torch.stack([torch.eye(2), 3 * torch.eye(2)])).diagonal().tolist()
        [3.0, 3.0]
    """
    return reduce(lambda below, factor: factor @ below, inner.unbind(0))


def identity_factors(
    depth: int, width: int, init_scale: float | Sequence[float], *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "L w w"]:
    """The starting inner factors ε_l·I (ICML 2024, Theorem 2.1: W̃_l(0) = ε_l I)."""
    scales = torch.as_tensor(init_scale, dtype=dtype)
    if scales.ndim and scales.shape != (depth,):
        raise ValueError(f"expected one init_scale or {depth} of them, got {scales.numel()}")
    return scales.expand(depth)[:, None, None] * torch.eye(width, dtype=dtype)


class CompressedDeepLinear(nn.Module):
    """f_C = U W̃_L ⋯ W̃_1 Vᵀ, the factorization that stands in for a wide one (ICML 2024, eq. 8, 9 and 11).

    Args:
        left: U, (m, w), orthonormal columns.
        right: V, (n, w), orthonormal columns.
        inner: W̃, (L, w, w), index 0 applied first; usually :func:`identity_factors`.
        train_outer: also train U and V (eq. 11); eq. 9 keeps them fixed.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import CompressedDeepLinear, identity_factors
        >>> frame = torch.eye(5)[:, :2]
        >>> f = CompressedDeepLinear(frame, frame, identity_factors(3, 2, 0.1))
        >>> f(torch.ones(5)).tolist()[-1], round(f.product()[0, 0].item(), 6)
        (0.0, 0.001)
    """

    def __init__(
        self,
        left: Float[Tensor, "m w"],
        right: Float[Tensor, "n w"],
        inner: Float[Tensor, "L w w"],
        *,
        train_outer: bool = False,
    ):
        super().__init__()
        width = inner.shape[-1]
        if inner.ndim != 3 or inner.shape[1] != width or left.shape[1] != width or right.shape[1] != width:
            raise ValueError(
                "expected left (m, w), right (n, w) and inner (L, w, w), got shapes "
                f"{tuple(left.shape)}, {tuple(right.shape)} and {tuple(inner.shape)}"
            )
        self.left = nn.Parameter(left.detach().clone(), requires_grad=train_outer)
        self.right = nn.Parameter(right.detach().clone(), requires_grad=train_outer)
        self.inner = nn.Parameter(inner.detach().clone())

    @classmethod
    def from_subspaces(
        cls,
        subspaces: InvariantSubspaces,
        depth: int,
        init_scale: float | Sequence[float],
        *,
        train_outer: bool = False,
    ) -> "CompressedDeepLinear":
        """Start from ε_l·I between the frames that :func:`invariant_subspaces` found."""
        width = subspaces.left.shape[1]
        inner = identity_factors(depth, width, init_scale, dtype=subspaces.left.dtype).to(subspaces.left.device)
        return cls(subspaces.left, subspaces.right, inner, train_outer=train_outer)

    @classmethod
    def from_full_width(
        cls,
        deep: DeepLinear,
        gradient: Float[Tensor, "d d"] | MatrixOperator,
        rank: int,
        *,
        train_outer: bool = False,
        generator: torch.Generator | None = None,
    ) -> "CompressedDeepLinear":
        """Compress a given square orthogonal factorization at its start (ICML 2024, §2.3).

        With P = Q_L ⋯ Q_1 the trainable block is V₁ = orth[V_k, PᵀU_k], U₁ = P V₁, inner factors ε_l·I. The paper
        reaches the same space by intersecting null spaces of d × d matrices.

        Args:
            deep: factors ε_l Q_l with Q_l orthogonal, d × d each, d > 2·rank.
            gradient: G = ∂loss/∂f at f = 0.
            rank: k, an upper bound on the rank of G.
            train_outer: whether U₁ and V₁ get gradients.
            generator: of the sketch that finds the singular vectors of a large G.

        Raises:
            ValueError: factors not square or not scaled-orthogonal, or 2·rank > d.
        """
        scales, rotation = scaled_orthogonal(list(deep.weights))
        if 2 * rank > rotation.shape[0]:
            raise ValueError(f"2·rank = {2 * rank} exceeds the width {rotation.shape[0]}: nothing to compress")
        svd = truncated_svd(gradient, rank, generator=generator)
        Vk, overlap = svd.Vh.mT.to(rotation.dtype), rotation.mT @ svd.U.to(rotation.dtype)
        right = torch.cat([Vk, residual_frame(Vk, overlap)], dim=1)
        inner = identity_factors(deep.depth, 2 * rank, scales, dtype=rotation.dtype).to(rotation.device)
        return cls(rotation @ right, right, inner, train_outer=train_outer)

    def core(self) -> Float[Tensor, "w w"]:
        """W̃_L ⋯ W̃_1."""
        return compose(self.inner)

    def product(self) -> Float[Tensor, "m n"]:
        """The whole matrix, dense: for tests and small sizes."""
        return self.left @ self.core() @ self.right.mT

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """U W̃_L ⋯ W̃_1 Vᵀ x without forming an m × n matrix."""
        return ((x @ self.right) @ self.core().mT) @ self.left.mT


def scaled_orthogonal(weights: Sequence[Float[Tensor, "_ _"]]) -> tuple[list[float], Float[Tensor, "d d"]]:
    """ε_l of every factor and P = Q_L ⋯ Q_1, or an error where a factor is not ε·orthogonal."""
    scales, rotation = [], None
    for number, weight in enumerate(weights, start=1):
        d = weight.shape[0]
        if weight.shape != (d, d):
            raise ValueError(f"expected square factors, got shape {tuple(weight.shape)} for factor {number}")
        scale = float(weight.detach().norm()) / d**0.5
        Q = weight.detach() / scale if scale else weight.detach()
        if not torch.allclose(Q.mT @ Q, torch.eye(d).to(Q), atol=1e3 * torch.finfo(Q.dtype).eps):
            raise ValueError(
                f"factor {number} is not a scaled orthogonal matrix; compress at the start, before any training step"
            )
        scales.append(scale)
        rotation = Q if rotation is None else Q @ rotation
    if rotation is None:
        raise ValueError("a deep factorization needs at least one factor")
    return scales, rotation
