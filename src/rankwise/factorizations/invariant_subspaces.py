"""From a gradient to the frames U and V in which a compressed factorization trains."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.spectral import MatrixOperator, haar_frame, truncated_svd
from rankwise.spectral.operators import as_operator
from rankwise.spectral.orthogonal import residual_frame

Variant = Literal["compressed", "spectral", "random"]
VARIANTS: tuple[Variant, ...] = ("compressed", "spectral", "random")


@dataclass(frozen=True)
class InvariantSubspaces:
    """Orthonormal frames and what they were made from.

    Attributes:
        left: U, (d_out, w).
        right: V, (d_in, w). Column j of U and column j of V are joined by the inner factors' ε·I.
        singular_values: of the gradient, the k leading ones; empty for ``random``.
        gradient_norm: ‖G‖_F; nan for ``random``.
        captured: Σσ²/‖G‖_F² of the k directions, in [0, 1]; nan for ``random``.
    """

    left: Float[Tensor, "m w"]
    right: Float[Tensor, "n w"]
    singular_values: Float[Tensor, " k"]
    gradient_norm: float
    captured: float


def invariant_subspaces(
    gradient: Float[Tensor, "m n"] | MatrixOperator,
    rank: int,
    *,
    variant: Variant = "compressed",
    width: int | None = None,
    generator: torch.Generator | None = None,
) -> InvariantSubspaces:
    """Frames U, V for U W̃_L ⋯ W̃_1 Vᵀ from the gradient G = ∂loss/∂f at f = 0.

    ``compressed`` (ICML 2024, §2.3) is in distribution the block that a full-width orthogonal factorization would
    train, found without building one. With U_k, V_k the top singular vectors of G, Z a Haar frame and Y a Haar frame
    in the complement of U_k,

        V = [Z, orth((I − ZZᵀ)V_k)],   U = [U_k, Y],

    for d_out ≥ d_in; for d_out < d_in the two sides change roles, so that Z always lies on the smaller side. The
    pairing is *crossed* on purpose: gradient directions on one side meet random ones on the other. Joining U_k to
    V_k directly with +G starts uphill, and gradient descent then stays at the saddle.

    ``spectral`` joins the top directions of **−G** directly (not in the paper; faster where G can be trusted).
    ``random`` ignores G's values: two independent Haar frames.

    Args:
        gradient: G, (d_out, d_in), a tensor or an operator (only its products are used when large).
        rank: k, number of gradient directions.
        variant: see above.
        width: w, columns of both frames; 2k for ``compressed`` and k otherwise unless given. ``compressed`` accepts
            k ≤ w ≤ 2k (w = 2k − 1 drops the weakest pair).
        generator: source of the random frames and of the SVD's sketch.

    Returns:
        :class:`InvariantSubspaces`; frames in float64 for a float64 gradient, else float32.

    Raises:
        ValueError: unknown variant, rank or width out of range, zero or non-finite gradient.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import invariant_subspaces
        >>> G = torch.outer(torch.arange(1.0, 7.0), torch.ones(5))
        >>> frames = invariant_subspaces(G, 1, generator=torch.Generator().manual_seed(0))
        >>> frames.left.shape, frames.right.shape, round(frames.captured, 4)
        (torch.Size([6, 2]), torch.Size([5, 2]), 1.0)
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: expected one of {', '.join(VARIANTS)}")
    A = as_operator(gradient)
    m, n = A.shape
    width = width if width is not None else (2 * rank if variant == "compressed" else rank)
    if variant == "random":
        _check_sizes(rank, width, width, m, n)
        left, right = (haar_frame(d, width, generator=generator, dtype=A.dtype, device=A.device) for d in (m, n))
        return InvariantSubspaces(left, right, left.new_zeros(0), float("nan"), float("nan"))
    _check_sizes(rank, width, 2 * rank if variant == "compressed" else rank, m, n)

    squared_norm = A.squared_norm()
    if not squared_norm > 0 or squared_norm == float("inf"):
        kind = "zero" if squared_norm == 0 else "not finite"
        raise ValueError(f"the {m}×{n} gradient is {kind}, so it points in no direction")
    svd = truncated_svd(A, rank, generator=generator, estimate_error=False)
    captured = min(float(svd.S.double().square().sum()) / squared_norm, 1.0)
    U, V = svd.U, svd.Vh.mT
    if variant == "spectral":
        left, right = -U, V
    else:
        smaller = min(m, n)
        Z = haar_frame(smaller, rank, generator=generator, dtype=A.dtype, device=A.device)
        gradient_side = U if m >= n else V
        Y = haar_frame(
            max(m, n), width - rank, complement_of=gradient_side, generator=generator, dtype=A.dtype, device=A.device
        )
        left, right = compressed_frames(U, V, Z, Y)
    return InvariantSubspaces(left.contiguous(), right.contiguous(), svd.S, squared_norm**0.5, captured)


def compressed_frames(
    U: Float[Tensor, "m k"], V: Float[Tensor, "n k"], Z: Float[Tensor, "s k"], Y: Float[Tensor, "l j"]
) -> tuple[Float[Tensor, "m w"], Float[Tensor, "n w"]]:
    """The crossed frames from gradient directions U, V, overlap frame Z (smaller side) and complement Y (larger side).

    With a given full-width P = Q_L ⋯ Q_1 (square case), Z = PᵀU and Y = P·orth((I − ZZᵀ)V) reproduce its block
    exactly: that is the test that ties this construction to the paper's.
    """
    larger, smaller = (U, V) if U.shape[0] >= V.shape[0] else (V, U)
    residual = residual_frame(Z, smaller)[:, : Y.shape[1]]
    on_larger, on_smaller = torch.cat([larger, Y], dim=1), torch.cat([Z, residual], dim=1)
    return (on_larger, on_smaller) if U.shape[0] >= V.shape[0] else (on_smaller, on_larger)


def _check_sizes(rank: int, width: int, widest: int, m: int, n: int) -> None:
    if rank < 1 or width < 1:
        raise ValueError(f"rank and width must be at least 1, got {rank} and {width}")
    if not min(rank, widest) <= width <= min(widest, m, n):
        raise ValueError(
            f"width {width} does not fit: for rank {rank} on a {m}×{n} gradient it must lie "
            f"between {min(rank, widest)} and {min(widest, m, n)}"
        )
