"""The compression of a factorization whose target has few rows, which is exact."""

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.factorizations.compressed import CompressedDeepLinear, identity_factors, scaled_orthogonal
from rankwise.factorizations.deep_linear import DeepLinear
from rankwise.spectral import MatrixOperator, truncated_svd
from rankwise.spectral.orthogonal import residual_frame


def compress_wide_target(
    deep: DeepLinear, gradient: Float[Tensor, "k d"] | MatrixOperator, rank: int
) -> CompressedDeepLinear:
    """W_L ⋯ W_1 with W_L of k rows and the others ε_l·orthogonal, d × d, in k + r dimensions and without error.

    The directions v with Φv = 0 and W_L(0)·Q_{L−1}⋯Q_1 v = 0 see no gradient at all: there ρ_l(t) = ε_l(1 − ηλ)^t for
    l ≤ L−1 and W_L stays 0, so that they add nothing to f. With P = Q_{L−1} ⋯ Q_1 what remains is
    V_1 = orth[V_r, Pᵀ·rowspace W_L(0)], inner factors ε_l·I for l ≤ L−1, and W̃_L = W_L(0)·P·V_1, which becomes the
    trainable ``left`` of the result; W_L(0) may be any matrix. (The slides' "wide Y"; the width is our derivation.)

    Args:
        deep: the start; d above k + r.
        gradient: G = ∂loss/∂f at f = 0, (k, d).
        rank: r, an upper bound on the rank of G.

    Returns:
        A :class:`CompressedDeepLinear` whose left and inner factors train, at one rate, and whose right frame does not.

    Raises:
        ValueError: fewer than two factors, factors below the last not scaled orthogonal, or d ≤ k + r.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import DeepLinear, compress_wide_target
        >>> deep = DeepLinear.orthogonal([9, 9, 2], init_scale=0.1, generator=torch.Generator().manual_seed(0))
        >>> compressed = compress_wide_target(deep, torch.ones(2, 9), rank=1)
        >>> compressed.left.shape, compressed.inner.shape, bool(torch.allclose(compressed.product(), deep.product()))
        (torch.Size([2, 3]), torch.Size([1, 3, 3]), True)
    """
    if deep.depth < 2:
        raise ValueError("with one factor there is nothing between the target and the data to compress; take depth ≥ 2")
    last = deep.weights[-1].detach()
    k, d = last.shape
    if rank < 1 or k + rank >= d:
        raise ValueError(f"the block is rows + rank = {k} + {rank} wide and has to be narrower than the width {d}")
    scales, P = scaled_orthogonal(list(deep.weights)[:-1])
    gradient_side = truncated_svd(gradient, rank, estimate_error=False).Vh.mT.to(P.dtype)
    rows = P.mT @ torch.linalg.qr(last.mT).Q
    right = torch.cat([gradient_side, residual_frame(gradient_side, rows)], dim=1)
    inner = identity_factors(deep.depth - 1, k + rank, scales, dtype=P.dtype).to(P.device)
    compressed = CompressedDeepLinear(last @ P @ right, right, inner)
    compressed.left.requires_grad_()
    return compressed
