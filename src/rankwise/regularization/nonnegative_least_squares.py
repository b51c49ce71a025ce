"""Least squares with nonnegative unknowns, from the Gram matrix: what multipliers of inequalities need."""

import torch
from jaxtyping import Float
from torch import Tensor

# full exchanges tolerated without progress before one unknown at a time is exchanged, as Kim & Park do
_PATIENCE = 3


def nonnegative_least_squares(K: Float[Tensor, "m m"], b: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """argmin_{α ≥ 0} ½αᵀKα − bᵀα, which is min ‖Aα − v‖ for K = AᵀA and b = Aᵀv.

    Block principal pivoting (Portugal, Júdice & Vicente 1994; Kim & Park 2011, SIAM J. Sci. Comput. 33, Algorithm 1):
    all unknowns that are negative become bound to zero and all bound ones with an upward slope become free, at once, and
    the free ones are solved for. A handful of solves where Lawson and Hanson's method, one unknown at a time, takes m.

    K is scaled to a unit diagonal and m·eps added to it, so that repeated columns of A do no harm; they share what one
    would have.

    Args:
        K: (m, m), symmetric and positive semidefinite.
        b: (m,), zero where the diagonal of K is.

    Returns:
        (m,), not negative; one of the minimizers where there are several.

    Raises:
        ValueError: shapes that do not go together, or non-finite input.

    Example:
        >>> import torch
        >>> from rankwise.regularization import nonnegative_least_squares
        >>> [round(a, 6) for a in nonnegative_least_squares(torch.eye(2), torch.tensor([2.0, -1.0])).tolist()]
        [2.0, 0.0]
    """
    if K.ndim != 2 or K.shape[0] != K.shape[1] or b.shape != K.shape[:1]:
        raise ValueError(f"expected K of shape (m, m) and b of shape (m,), got {tuple(K.shape)} and {tuple(b.shape)}")
    if not bool(torch.isfinite(K).all() and torch.isfinite(b).all()):
        raise ValueError("K and b must be finite; check the matrix they come from")
    m, eps = len(b), torch.finfo(b.dtype).eps
    if not m:
        return torch.zeros_like(b)
    scale = torch.where(K.diagonal() > 0, K.diagonal(), 1.0).rsqrt()
    K = scale.unsqueeze(1) * K * scale
    K.diagonal().add_(m * eps)
    b = scale * b
    slack = 10 * m * eps * float(b.abs().max())

    alpha = torch.zeros_like(b)
    free = torch.zeros_like(b, dtype=torch.bool)
    fewest, patience = m + 1, _PATIENCE
    for _ in range(10 * m + 10):
        wrong = torch.where(free, alpha < 0, b - K @ alpha > slack)
        count = int(wrong.sum())
        if not count:
            break
        if count < fewest:
            fewest, patience = count, _PATIENCE
        elif patience:
            patience -= 1
        else:  # Murty's rule, which cannot cycle: the last of them alone
            last = wrong.nonzero()[-1]
            wrong = torch.zeros_like(wrong).index_fill_(0, last, True)
        free = free ^ wrong
        alpha = torch.zeros_like(b)
        alpha[free] = torch.linalg.solve(K[free][:, free], b[free])
    # rounding may keep the last exchanges going round: what is negative then is so by rounding
    return scale * alpha.clamp(min=0)
