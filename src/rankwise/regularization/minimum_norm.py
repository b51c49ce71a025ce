"""The solution that gradient descent finds when there are more unknowns than equations."""

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.spectral import numerical_rank
from rankwise.spectral.precision import compute_dtype, require_finite, require_matrix


def minimum_norm_solution(
    X: Float[Tensor, "n d"], y: Float[Tensor, "n *k"], *, start: Float[Tensor, "d *k"] | None = None
) -> Float[Tensor, "d *k"]:
    """w* = Xᵀ(XXᵀ)⁺ y, the least-squares solution of least norm, from a problem of min(n, d) unknowns.

    Where gradient descent on ½‖y − Xw‖² ends from w = 0: every iterate is w(0) + Xᵀz (overview, eq. 8), so that descent
    never leaves the row space of X and solves for the n numbers z alone (eq. 10). From another ``start`` it ends at

        w* = w(0) + Xᵀ(XXᵀ)⁺ (y − X w(0)),

    the solution *nearest* to the start: what w(0) has outside the row space stays. *Erratum*: the overview prints
    w* = Xz* and X(XXᵀ)⁻¹y without the transpose, and asks for rank n, which the pseudo-inverse does without.

    Computed from a QR of Xᵀ (of X where n ≥ d) and an SVD of its triangle, min(n, d) on a side: O(n²d) for n ≪ d. XXᵀ
    itself is never formed, which would square the condition number and lose every direction below 1e-8·σ₁; singular
    values up to eps·max(n, d)·σ₁ count as zero.

    Args:
        X: (n, d), one sample a row.
        y: (n,), or (n, k) for k right-hand sides.
        start: w(0), of the result's shape; zero unless given.

    Returns:
        (d,) or (d, k), float64 if anything given is, else float32. Where y is out of reach, the least-squares solution of
        least norm (or nearest to the start). It carries no gradient.

    Raises:
        ValueError: shapes that do not go together, empty or non-finite input.

    Example:
        >>> import torch
        >>> from rankwise.regularization import minimum_norm_solution
        >>> w = minimum_norm_solution(torch.tensor([[3.0, 4.0]]), torch.tensor([5.0]))
        >>> [round(v, 5) for v in w.tolist()]
        [0.6, 0.8]
    """
    require_matrix(X, "X")
    if y.ndim not in (1, 2) or y.shape[0] != X.shape[0] or 0 in y.shape:
        raise ValueError(
            f"y must be ({X.shape[0]},) or ({X.shape[0]}, k), a row for every row of X, got shape {tuple(y.shape)}"
        )
    if start is not None and start.shape != (X.shape[1], *y.shape[1:]):
        raise ValueError(f"start must have the solution's shape {(X.shape[1], *y.shape[1:])}, got {tuple(start.shape)}")
    given = {"X": X, "y": y} if start is None else {"X": X, "y": y, "start": start}
    dtype = torch.float32
    for name, tensor in given.items():
        require_finite(tensor, name)
        dtype = torch.promote_types(dtype, compute_dtype(tensor.dtype))
    X, y = X.detach().to(dtype), y.detach().to(dtype)
    columns = y.reshape(y.shape[0], -1)
    if start is None:
        return _pseudo_inverse_times(X, columns).reshape(X.shape[1], *y.shape[1:])
    offset = start.detach().to(dtype).reshape(X.shape[1], -1)
    return (offset + _pseudo_inverse_times(X, columns - X @ offset)).reshape(X.shape[1], *y.shape[1:])


def _pseudo_inverse_times(X: Tensor, y: Tensor) -> Tensor:
    """X⁺y through the triangle of a tall QR."""
    wide = X.shape[0] < X.shape[1]
    Q, R = torch.linalg.qr(X.mT if wide else X)
    U, S, Vh = torch.linalg.svd(R)
    rank = numerical_rank(S, shape=(X.shape[0], X.shape[1]))
    U, S, Vh = U[:, :rank], S[:rank].unsqueeze(1), Vh[:rank]
    if wide:  # X = (QUSVh)ᵀ
        return Q @ (U @ ((Vh @ y) / S))
    return Vh.mT @ ((U.mT @ (Q.mT @ y)) / S)
