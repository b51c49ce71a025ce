"""Dropout on the hidden layer of W_2 W_1 X: the penalty it amounts to, and the minimum it has in closed form.

The one probability here is μ, ``keep_rate``: the chance that a hidden unit *stays*. What deep-learning libraries call the
dropout rate is 1 − μ, ``drop_rate`` in these names.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.regularization.nuclear import squared_nuclear_prox
from rankwise.spectral import numerical_rank
from rankwise.spectral.precision import compute_dtype, require_finite, require_matrix


def dropout_penalty(
    W1: Float[Tensor, "h d"], W2: Float[Tensor, "k h"], X: Float[Tensor, "d n"], keep_rate: float
) -> Float[Tensor, ""]:
    """((1 − μ)/μ)·Σ_i ‖(W_2)_{:,i}‖² ‖Xᵀ(W_1)_{i,:}‖², what dropout adds to the squared loss on average (overview, eq. 32).

        E_z ‖Y − (1/μ)·W_2 Diag(z) W_1 X‖_F² = ‖Y − W_2 W_1 X‖_F² + penalty,   z_i ~ Bernoulli(μ) independent,

    whatever Y, and whether one z serves all samples (eq. 31) or every sample draws its own.

    Args:
        W1: (h, d), h hidden units.
        W2: (k, h).
        X: (d, n), one sample a column.
        keep_rate: μ in (0, 1], the probability that a unit is *kept*; torch's ``nn.Dropout(p)`` has μ = 1 − p.

    Returns:
        A scalar tensor in the units of ‖Y‖²; autograd goes through.

    Raises:
        ValueError: a keep_rate outside (0, 1], sizes that do not chain, empty or non-finite input.

    Example:
        >>> import torch
        >>> from rankwise.regularization import dropout_penalty
        >>> W1, W2, X = torch.eye(2), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [1.0]])
        >>> dropout_penalty(W1, W2, X, keep_rate=0.5).item()
        13.0
    """
    _require_keep_rate(keep_rate)
    for name, matrix in (("W1", W1), ("W2", W2), ("X", X)):
        _require_finite_matrix(name, matrix)
    if W2.shape[1] != W1.shape[0] or W1.shape[1] != X.shape[0]:
        raise ValueError(
            "W2 (k × hidden), W1 (hidden × d) and X (d × samples) must chain, got shapes "
            f"{tuple(W2.shape)}, {tuple(W1.shape)} and {tuple(X.shape)}"
        )
    return (1 - keep_rate) / keep_rate * (W2.square().sum(0) @ (W1 @ X).square().sum(1))


class DropoutMinimum(NamedTuple):
    """The global minimum of squared loss under dropout.

    Attributes:
        outputs: Z = W_2 W_1 X, (k, n), unique.
        W1: (h, d) and
        W2: (k, h), one pair that attains it; every hidden unit carries the same share ‖(W_2)_{:,i}‖·‖Xᵀ(W_1)_{i,:}‖.
        value: the expected loss there, eq. 31 and eq. 32 alike.
    """

    outputs: Float[Tensor, "k n"]
    W1: Float[Tensor, "h d"]
    W2: Float[Tensor, "k h"]
    value: float


def dropout_minimizer(X: Float[Tensor, "d n"], Y: Float[Tensor, "k n"], width: int, keep_rate: float) -> DropoutMinimum:
    """The minimum over W_1, W_2 of E_z ‖Y − (1/μ)·W_2 Diag(z) W_1 X‖_F², z_i ~ Bernoulli(μ), in closed form.

    The outputs Z = W_2 W_1 X solve

        min_Z ‖Y − Z‖_F² + c‖Z‖_*²,   c = (1 − μ)/(μ·h),   rows of Z in the row space of X, rank Z ≤ h,

    which is :func:`squared_nuclear_prox` of Y X⁺X: Σ_i a_i² over the units' shares a_i = ‖(W_2)_{:,i}‖·‖Xᵀ(W_1)_{i,:}‖ is
    least, ‖Z‖_*²/h, where all h shares are equal, and they can always be made so. *Erratum*: eq. 33 of the overview has
    c = (1 − μ)/μ, without the width h, and X as if it were invertible. At a fixed rate wider layers are penalized *less*.

    Args:
        X: (d, n), one sample a column.
        Y: (k, n).
        width: h, number of hidden units, at least 1.
        keep_rate: μ in (0, 1], the probability that a unit is *kept*.

    Returns:
        :class:`DropoutMinimum`, float64 if anything given is, else float32; no gradient.

    Raises:
        ValueError: a keep_rate outside (0, 1], a width below 1, different numbers of samples, empty or non-finite input.

    Example:
        >>> import torch
        >>> from rankwise.regularization import dropout_minimizer, dropout_penalty
        >>> X, Y = torch.eye(3), torch.diag(torch.tensor([4.0, 2.0, 1.0]))
        >>> best = dropout_minimizer(X, Y, width=4, keep_rate=1 / 3)
        >>> best.outputs.diag().tolist(), round(best.value, 4)
        ([2.5, 0.5, 0.0], 10.0)
        >>> loss = (Y - best.W2 @ best.W1 @ X).square().sum() + dropout_penalty(best.W1, best.W2, X, keep_rate=1 / 3)
        >>> round(loss.item(), 4)
        10.0
    """
    _require_keep_rate(keep_rate)
    _require_width(width)
    X, Y = _samples(X, Y)
    fit = _least_squares_fit(X, Y)
    c = (1 - keep_rate) / (keep_rate * width)
    Z = squared_nuclear_prox(fit, c, max_rank=width)
    U, S, Vh = torch.linalg.svd(Z, full_matrices=False)
    rank = numerical_rank(S, shape=(Z.shape[0], Z.shape[1]))
    turn = _equalizing_rows(S[:rank], width)
    root = S[:rank].sqrt()
    W2 = (U[:, :rank] * root) @ turn
    W1 = turn.mT @ (root.unsqueeze(1) * Vh[:rank]) @ torch.linalg.pinv(X)
    return DropoutMinimum(Z, W1, W2, float((Y - Z).square().sum() + c * S.sum().square()))


def dropout_rate_for_rank(X: Float[Tensor, "d n"], Y: Float[Tensor, "k n"], rank: int, width: int) -> float:
    """The smallest drop rate 1 − μ at which :func:`dropout_minimizer` has outputs of rank at most ``rank``.

    With s the singular values of Y X⁺X, rank Z ≤ j if and only if c ≥ s_{j+1} / Σ_{i≤j}(s_i − s_{j+1}); from
    c = (1 − μ)/(μ·h) the drop rate is c·h/(1 + c·h). A higher one keeps the rank as low or makes it lower, never 0.

    Args:
        X: (d, n), one sample a column.
        Y: (k, n).
        rank: j ≥ 1, the rank wanted.
        width: h, number of hidden units.

    Returns:
        The probability that a unit is *dropped*, 1 − μ in [0, 1): pass ``keep_rate=1 - rate``. 0 where the fit without
        dropout, or the width, has no higher rank anyhow.

    Raises:
        ValueError: rank or width below 1, no rate that does it (the leading rank + 1 singular values are equal),
            different numbers of samples, empty or non-finite input.

    Example:
        >>> import torch
        >>> from rankwise.regularization import dropout_rate_for_rank
        >>> X, Y = torch.eye(3), torch.diag(torch.tensor([4.0, 2.0, 1.0]))
        >>> round(dropout_rate_for_rank(X, Y, rank=2, width=4), 6)
        0.5
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}; dropout never makes the outputs zero")
    _require_width(width)
    X, Y = _samples(X, Y)
    fit = _least_squares_fit(X, Y)
    S = torch.linalg.svdvals(fit)
    if rank >= min(width, numerical_rank(S, shape=(fit.shape[0], fit.shape[1]))):
        return 0.0
    gap = float((S[:rank] - S[rank]).sum())
    # equal up to rounding is equal: a rate of 1 − 1e-14 would keep no unit at all
    if gap <= torch.finfo(S.dtype).eps * max(fit.shape) * rank * float(S[0]):
        raise ValueError(
            f"the leading {rank + 1} singular values of the fit are all {float(S[0]):.4g}: no drop rate below 1 tells them "
            f"apart, so none gives rank {rank}; ask for another rank"
        )
    c = float(S[rank]) / gap
    return c * width / (1 + c * width)


def _least_squares_fit(X: Tensor, Y: Tensor) -> Tensor:
    """Y X⁺X: Y's rows, projected on the row space of X."""
    _, S, Vh = torch.linalg.svd(X, full_matrices=False)
    rows = Vh[: numerical_rank(S, shape=(X.shape[0], X.shape[1]))]
    return (Y @ rows.mT) @ rows


def _equalizing_rows(S: Tensor, width: int) -> Tensor:
    """R, (r, h) with orthonormal rows, such that every diagonal entry of Rᵀ diag(S) R is ΣS/h (Schur–Horn).

    One plane rotation after another mixes the columns of the largest and the smallest entry so that the first becomes the
    mean; it is then done with, and after h − 1 rotations all are. Columns not yet done with have no row in common, so an
    entry after the rotation by t = tan φ is (a + t²b)/(1 + t²), with no cross term.
    """
    R = torch.zeros(len(S), width, dtype=S.dtype, device=S.device)
    R.diagonal().fill_(1)
    mean = float(S.sum()) / width
    left = list(range(width))
    while len(left) > 1:
        entries = (R[:, left].square() * S.unsqueeze(1)).sum(0)
        high, low = left[int(entries.argmax())], left[int(entries.argmin())]
        a, b = float(entries.max()), float(entries.min())
        if not a > mean > b:
            break  # equal up to rounding
        t = ((a - mean) / (mean - b)) ** 0.5
        cosine = (1 + t * t) ** -0.5
        first, second = R[:, high].clone(), R[:, low].clone()
        R[:, high] = cosine * (first - t * second)
        R[:, low] = cosine * (t * first + second)
        left.remove(high)
    return R


def _samples(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """X and Y checked, in one dtype of float32 or better, without gradients."""
    _require_finite_matrix("X", X)
    _require_finite_matrix("Y", Y)
    if X.shape[1] != Y.shape[1]:
        raise ValueError(f"X has {X.shape[1]} samples and Y {Y.shape[1]}; both hold one sample a column")
    dtype = torch.promote_types(compute_dtype(X.dtype), compute_dtype(Y.dtype))
    return X.detach().to(dtype), Y.detach().to(dtype)


def _require_finite_matrix(name: str, matrix: Tensor) -> None:
    require_matrix(matrix, name)
    require_finite(matrix, name)


def _require_keep_rate(keep_rate: float) -> None:
    if not 0 < keep_rate <= 1:
        raise ValueError(
            f"keep_rate is the probability that a unit stays and must lie in (0, 1], got {keep_rate}; "
            "a dropout layer's p is 1 − keep_rate"
        )


def _require_width(width: int) -> None:
    if width < 1:
        raise ValueError(f"width is the number of hidden units and must be at least 1, got {width}")
