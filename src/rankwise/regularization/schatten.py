"""Schatten powers of a matrix, and the squared norms of factors that they are the least value of."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.spectral import numerical_rank, singular_values
from rankwise.spectral.precision import compute_dtype, require_finite, require_matrix


def schatten_power(M: Float[Tensor, "m n"], p: float) -> Float[Tensor, ""]:
    """Σ_i σ_i(M)^p, the p-th power of the Schatten-p norm, or quasi-norm below 1 (overview, eq. 21).

    Singular values up to eps·max(m, n)·σ₁ are rounding and count as zero: at p = 0.1 one of 1e-17 would add 0.02.

    Autograd returns the subgradient of least norm, p·U_r diag(σ^{p−1}) V_rᵀ over the r singular values that are not
    zero. It is the gradient where M has full rank, for p > 1 everywhere; repeated singular values do no harm. For p < 1
    the true slope is +∞ in every direction that raises the rank: this one is finite, grows like σ^{p−1} as a singular
    value nears the cutoff, and leaves singular values that are zero at zero. First derivatives only.

    Args:
        M: (m, n), any floating dtype.
        p: the power, positive and finite. With L factors, p = 2/L (:func:`factored_norm`).

    Returns:
        A scalar tensor in units of σ^p, float64 for float64 input and float32 for anything narrower.

    Raises:
        ValueError: p out of range, or M empty, not a matrix or not finite.

    Example:
        >>> import torch
        >>> from rankwise.regularization import schatten_power
        >>> M = torch.tensor([[0.0, 9.0], [4.0, 0.0]], requires_grad=True)
        >>> schatten_power(M, 0.5).item()
        5.0
    """
    if not 0 < p < float("inf"):
        raise ValueError(f"p must be positive and finite, got {p}; the rank is numerical_rank, the norm at p = ∞ is σ₁")
    require_matrix(M, "M")
    S = singular_values(M)
    return S[: numerical_rank(S, shape=(M.shape[0], M.shape[1]))].pow(p).sum()


def factored_norm(weights: Sequence[Float[Tensor, "_ _"]]) -> Float[Tensor, ""]:
    """½ Σ_l ‖W_l‖_F², what weight decay adds to a loss (overview, eq. 22, right-hand side).

    Its least value over all W_L ⋯ W_1 = M is (L/2)·Σ_i σ_i(M)^{2/L}, reached by :func:`balanced_factors`, provided that
    no inner width is below rank M. The overview prints 2/L for L/2 (eqs. 22, 25 and 26); the two agree at L = 2 only.

    Args:
        weights: W_1, …, W_L, first applied first.

    Raises:
        ValueError: no weights.

    Example:
        >>> import torch
        >>> from rankwise.regularization import balanced_factors, factored_norm, schatten_power
        >>> M = torch.tensor([[0.0, 8.0], [1.0, 0.0]])
        >>> round(factored_norm(balanced_factors(M, depth=3)).item(), 5), round(1.5 * schatten_power(M, 2 / 3).item(), 5)
        (7.5, 7.5)
    """
    if not weights:
        raise ValueError("expected at least one weight matrix, got none")
    return 0.5 * torch.stack([weight.square().sum() for weight in weights]).sum()


def balanced_factors(M: Float[Tensor, "m n"], depth: int, *, width: int | None = None) -> list[Float[Tensor, "_ _"]]:
    """W_1, …, W_L with W_L ⋯ W_1 = M and the least ½Σ‖W_l‖_F², which is (L/2)·Σσ_i(M)^{2/L} (overview, Cor. 1).

        M = U diag(σ) Vᵀ,   W_1 = diag(σ^{1/L}) Vᵀ,   W_l = diag(σ^{1/L}),   W_L = U diag(σ^{1/L}),

    filled up with zeros to the inner width. Singular values up to eps·max(m, n)·σ₁ are dropped: they are rounding, and
    the L-th root would bring them back.

    Args:
        M: (m, n).
        depth: L ≥ 1.
        width: of the inner layers, at least rank M; min(m, n) unless given. One factor has no inner layer.

    Returns:
        L matrices, first applied first: (width, n), (width, width), …, (m, width). They carry no gradient.

    Raises:
        ValueError: depth below 1, a width below rank M, or M empty, not a matrix or not finite.

    Example:
        >>> import torch
        >>> from rankwise.regularization import balanced_factors
        >>> W1, W2 = balanced_factors(torch.tensor([[0.0, 9.0], [4.0, 0.0]]), depth=2)
        >>> (W2 @ W1).round(decimals=5).tolist()
        [[0.0, 9.0], [4.0, 0.0]]
    """
    require_matrix(M, "M")
    require_depth(depth)
    wide = M.detach().to(compute_dtype(M.dtype))
    require_finite(wide, "M")
    if depth == 1:
        return [wide.clone()]
    U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    rank = numerical_rank(S, shape=(M.shape[0], M.shape[1]))
    width = S.numel() if width is None else width
    if width < max(rank, 1):
        raise ValueError(
            f"factors of inner width {width} cannot multiply to a matrix of rank {rank}; give a width of at least "
            f"{max(rank, 1)}, or reduce M to rank {width} first (rankwise.spectral.truncated_svd)"
        )
    root = S[:rank].pow(1 / depth)
    first, inner, last = (
        wide.new_zeros(width, M.shape[1]),
        wide.new_zeros(width, width),
        wide.new_zeros(M.shape[0], width),
    )
    first[:rank] = root.unsqueeze(1) * Vh[:rank]
    inner.diagonal()[:rank] = root
    last[:, :rank] = U[:, :rank] * root
    return [first, *(inner.clone() for _ in range(depth - 2)), last]


def require_depth(depth: int) -> None:
    """Refuse a number of factors below 1."""
    if depth < 1:
        raise ValueError(f"depth is the number of factors W_1, …, W_L and must be at least 1, got {depth}")
