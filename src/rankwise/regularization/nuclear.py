"""Shrinking singular values: the closed-form minimizers of a squared distance plus a penalty on the spectrum."""

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.regularization.schatten import require_depth
from rankwise.spectral.precision import compute_dtype, require_finite, require_matrix

# from x = s Newton takes 6 at most (measured from s = s* up, depths 3 to 1000); it stops by itself
_MOST_NEWTON_STEPS = 50


def singular_value_threshold(M: Float[Tensor, "m n"], threshold: float) -> Float[Tensor, "m n"]:
    """U (S − τ)₊ Vᵀ = argmin_Z ½‖Z − M‖_F² + τ‖Z‖_*, for M = U S Vᵀ.

    With τ = λ this is the product W_2 W_1 of two factors at the global minimum of weight decay λ (overview, eq. 26 at
    L = 2 and the remark below it), if their inner width is at least its rank.

    Args:
        M: (m, n).
        threshold: τ ≥ 0, in the units of M.

    Returns:
        (m, n), float64 for float64 input and float32 for anything narrower; it carries no gradient.

    Raises:
        ValueError: a threshold that is negative or not finite, or M empty, not a matrix or not finite.

    Example:
        >>> import torch
        >>> from rankwise.regularization import singular_value_threshold
        >>> singular_value_threshold(torch.diag(torch.tensor([5.0, 1.0])), 2.0).tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    return schatten_prox(M, threshold, depth=2)


def schatten_prox(M: Float[Tensor, "m n"], weight: float, depth: int) -> Float[Tensor, "m n"]:
    """argmin_Z ½‖Z − M‖_F² + λ(L/2)·Σσ_i(Z)^{2/L}: what L factors under weight decay λ make of a target.

    The right-hand side of eq. 26 of the overview, with L/2 for its printed 2/L (:func:`factored_norm`), so that the result
    is the product of L factors at the *global* minimum of ½‖W_L ⋯ W_1 − M‖² + (λ/2)Σ‖W_l‖². From L = 3 on Z = 0 is a
    strict local minimum for every λ > 0, and descent on the factors from a small start ends there.

    Singular vectors stay; every singular value s goes to

        s/(1 + λ)                                              L = 1,
        (s − λ)₊                                               L = 2,
        0 up to s*, above it the larger root of x − s + λx^{2/L−1} = 0      L ≥ 3,

    which jumps at s* (:func:`schatten_prox_threshold`), where both are minimizers and 0 is returned.

    Args:
        M: (m, n).
        weight: λ ≥ 0, in units of σ^{2−2/L}.
        depth: L ≥ 1.

    Returns:
        (m, n), float64 for float64 input and float32 for anything narrower; it carries no gradient.

    Raises:
        ValueError: a weight that is negative or not finite, depth below 1, or M empty, not a matrix or not finite.

    Example:
        >>> import torch
        >>> from rankwise.regularization import schatten_prox
        >>> schatten_prox(torch.diag(torch.tensor([3.0, 1.0])), weight=2.0, depth=3).round(decimals=4).tolist()
        [[0.0, 0.0], [0.0, 0.0]]
        >>> round(schatten_prox(torch.diag(torch.tensor([10.0, 1.0])), weight=2.0, depth=3)[0, 0].item(), 4)
        9.0399
    """
    U, S, Vh = _svd(M)
    return U * shrink_singular_values(S, weight, depth) @ Vh


def shrink_singular_values(S: Float[Tensor, " r"], weight: float, depth: int) -> Float[Tensor, " r"]:
    """:func:`schatten_prox` on the singular values themselves.

    Args:
        S: (r,), not negative, in any order.
        weight: λ ≥ 0.
        depth: L ≥ 1.

    Returns:
        (r,), in the order of ``S``.

    Raises:
        ValueError: values that are negative or not finite, a weight that is negative or not finite, depth below 1.

    Example:
        >>> import torch
        >>> from rankwise.regularization import shrink_singular_values
        >>> shrink_singular_values(torch.tensor([5.0, 1.0]), weight=2.0, depth=2).tolist()
        [3.0, 0.0]
    """
    threshold = schatten_prox_threshold(weight, depth)
    s = S.detach().to(compute_dtype(S.dtype))
    require_finite(s, "S")
    if bool((s < 0).any()):
        raise ValueError(f"singular values cannot be negative, got {float(s.min()):.3g}")
    if depth == 1:
        return s / (1 + weight)
    if depth == 2:
        return (s - weight).clamp(min=0)
    above = s > threshold
    power = 2 / depth - 1
    # x − s + λx^power is convex and its larger root is its last, so Newton from the right descends to it and cannot
    # overshoot; at x ≥ x* its slope is at least 1 − 1/L, so it converges quadratically. Values below s* ride along at a
    # harmless place and are replaced.
    at = torch.where(above, s, max(2 * threshold, 1.0))
    x = at.clone()
    for _ in range(_MOST_NEWTON_STEPS):
        pull = weight * x.pow(power)
        lower = x - (x - at + pull) / (1 + power * pull / x)
        moved = lower < x
        if not bool(moved.any()):
            break
        x = torch.where(moved, lower, x)
    return torch.where(above, x, 0.0)


def schatten_prox_threshold(weight: float, depth: int) -> float:
    """s*, the largest singular value that :func:`schatten_prox` sets to zero.

        0 for L = 1,   λ for L = 2,   ((L−1)/(L−2))·x*,  x* = (λ(L−2))^{L/(2(L−1))}  for L ≥ 3.

    Just above s* the prox is x*, not zero: no singular value of a minimizer lies strictly between 0 and x*.

    Args:
        weight: λ ≥ 0, in units of σ^{2−2/L}.
        depth: L ≥ 1.

    Raises:
        ValueError: a weight that is negative or not finite, depth below 1.

    Example:
        >>> from rankwise.regularization import schatten_prox_threshold
        >>> schatten_prox_threshold(0.5, depth=2), schatten_prox_threshold(16.0, depth=3)
        (0.5, 16.0)
    """
    require_depth(depth)
    _require_weight("weight", weight)
    if depth <= 2:
        return weight if depth == 2 else 0.0
    return (depth - 1) / (depth - 2) * (weight * (depth - 2)) ** (depth / (2 * (depth - 1)))


def squared_nuclear_prox(
    M: Float[Tensor, "m n"], weight: float, *, max_rank: int | None = None
) -> Float[Tensor, "m n"]:
    """argmin_Z ‖M − Z‖_F² + c‖Z‖_*², over all Z or those of rank at most ``max_rank``.

    Singular vectors stay; the singular values s_1 ≥ s_2 ≥ … go to

        z_i = (s_i − c·S_j/(1 + cj))₊,   S_j = Σ_{i≤j} s_i,   j the largest with s_j > c·S_j/(1 + cj),

    since zero slope asks for z_i = (s_i − cΣz)₊, and summing over the j positive ones gives Σz = S_j/(1 + cj). The amount
    taken off depends on the whole spectrum: unlike soft thresholding this scales, prox(aM) = a·prox(M), and never returns
    0 unless M is 0.

    Args:
        M: (m, n).
        weight: c ≥ 0, no unit.
        max_rank: most singular values that may stay; all of them unless given.

    Returns:
        (m, n), float64 for float64 input and float32 for anything narrower; it carries no gradient.

    Raises:
        ValueError: a weight that is negative or not finite, a max_rank below 1, or M empty, not a matrix or not finite.

    Example:
        >>> import torch
        >>> from rankwise.regularization import squared_nuclear_prox
        >>> squared_nuclear_prox(torch.diag(torch.tensor([4.0, 2.0, 1.0])), weight=0.5).tolist()
        [[2.5, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]]
    """
    _require_weight("weight", weight)
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, got {max_rank}")
    U, S, Vh = _svd(M)
    kept = S[:max_rank]
    taken_off = weight * kept.cumsum(0) / (1 + weight * torch.arange(1, len(kept) + 1).to(kept))
    # s_j > cS_j/(1+cj) is s_j > cΣ_{i<j}(s_i − s_j): once it fails it fails for all that follow
    j = int((kept > taken_off).sum())
    if j == 0:  # only the zero matrix: s_1 > c·s_1/(1+c) for any other
        return torch.zeros_like(U @ Vh)
    return U[:, :j] * (kept[:j] - taken_off[j - 1]) @ Vh[:j]


def _svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    require_matrix(M, "M")
    # detached: the derivative of an SVD divides by differences of singular values, and shrinking makes them equal
    wide = M.detach().to(compute_dtype(M.dtype))
    require_finite(wide, "M")
    U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    return U, S, Vh


def _require_weight(name: str, weight: float) -> None:
    if not 0 <= weight < float("inf"):
        raise ValueError(f"{name} must be finite and cannot be negative, got {weight}")
