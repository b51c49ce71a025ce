"""The singular values that gradient descent leaves behind, and how far compression is from full width because of them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def rho_trajectory(
    init_scales: Sequence[float],
    lr: float,
    weight_decay: float,
    steps: int,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> Float[Tensor, "t L"]:
    """ρ_l(t), the singular value that d − 2r directions of W_l share (ICML 2024, Theorem 2.1, eq. 6).

        ρ_l(t+1) = ρ_l(t)·(1 − ηλ − η∏_{k≠l}ρ_k²(t)),     ρ_l(0) = ε_l.

    With heavy-ball momentum (not in the paper) the same directions stay, and ρ obeys, from ρ_l(−1) = ρ_l(0),

        ρ_l(t+1) = ρ_l(t) − η·g_l(t) + μ(ρ_l(t) − ρ_l(t−1)),     g_l = ρ_l(λ + ∏_{k≠l}ρ_k²),

    the recursion of the step itself read in those directions; Nesterov's form of it is that of :func:`fit_factorization`.

    Args:
        init_scales: ε_1 … ε_L.
        lr: η.
        weight_decay: λ.
        steps: number of updates T.
        momentum: μ.
        nesterov: Nesterov's momentum instead of heavy ball.

    Returns:
        (T + 1, L), float64.

    Raises:
        ValueError: no scales, a scale that is not positive, or fewer than 0 steps.

    Example:
        >>> from rankwise.factorizations import rho_trajectory
        >>> rho_trajectory([0.5, 2.0], lr=0.1, weight_decay=0.0, steps=1)[-1].tolist()
        [0.3, 1.95]
    """
    _check_scales(init_scales)
    if steps < 0:
        raise ValueError(f"steps is the number of updates and cannot be negative, got {steps}")
    rho = [float(scale) for scale in init_scales]
    velocity = [0.0] * len(rho)
    path = [rho]
    for _ in range(steps):
        g = [
            value * (weight_decay + others * others)
            for value, others in zip(rho, _products_of_others(rho), strict=True)
        ]
        velocity = [momentum * b + slope for b, slope in zip(velocity, g, strict=True)]
        ahead = [slope + momentum * b for slope, b in zip(g, velocity, strict=True)] if nesterov else velocity
        rho = [value - lr * direction for value, direction in zip(rho, ahead, strict=True)]
        path.append(rho)
    return torch.tensor(path, dtype=torch.float64)


def rho_bounds(
    init_scales: Sequence[float], lr: float, weight_decay: float, steps: int
) -> tuple[Float[Tensor, " t"], Float[Tensor, " t"]]:
    """Lemma E.2: ε(1 − η(λ+ε))^t ≤ ρ(t) ≤ ε(1 − ηλ)^t, for equal ε ≤ 1, η ≤ 1/(λ+ε) and L ≥ 2.

    The last condition is ours: the proof uses ε^{2(L−1)} ≤ ε, and a single factor has 1 on the left.

    Args:
        init_scales: ε_1 … ε_L, all the same.
        lr: η.
        weight_decay: λ.
        steps: T.

    Returns:
        Lower and upper bound, (T + 1,) each, float64.

    Raises:
        ValueError: a condition of the lemma fails; the message says which.

    Example:
        >>> from rankwise.factorizations import rho_bounds
        >>> [bound[-1].item() for bound in rho_bounds([0.5, 0.5], lr=1.0, weight_decay=0.0, steps=1)]
        [0.25, 0.5]
    """
    _check_scales(init_scales)
    epsilon = float(init_scales[0])
    if len(init_scales) < 2 or any(scale != epsilon for scale in init_scales) or epsilon > 1:
        raise ValueError(
            "Lemma E.2 is about two or more factors of one scale of at most 1, "
            f"got init_scales = {list(init_scales)}; rho_trajectory has no such condition"
        )
    if weight_decay < 0 or not 0 < lr <= 1 / (weight_decay + epsilon):
        raise ValueError(
            f"Lemma E.2 needs weight decay λ ≥ 0 and 0 < lr ≤ 1/(λ + ε) = {1 / (weight_decay + epsilon):.4g}, "
            f"got λ = {weight_decay} and lr = {lr}"
        )
    t = torch.arange(steps + 1, dtype=torch.float64)
    return epsilon * (1 - lr * (weight_decay + epsilon)) ** t, epsilon * (1 - lr * weight_decay) ** t


def trajectory_error(rho: Float[Tensor, "t L"], width: int, rank: int) -> Float[Tensor, " t"]:
    """‖f(t) − f_C(t)‖_F² = (d − 2r)·∏_l ρ_l(t)², exactly: the equality that Proposition 2.2 bounds.

    It holds for gradient descent with and without momentum and decay, whatever the step size.

    Args:
        rho: from :func:`rho_trajectory`.
        width: d.
        rank: r, an upper bound on the rank of the target.

    Raises:
        ValueError: d ≤ 2r.

    Example:
        >>> from rankwise.factorizations import rho_trajectory, trajectory_error
        >>> trajectory_error(rho_trajectory([0.5, 2.0], 0.1, 0.0, steps=1), width=7, rank=3).tolist()
        [1.0, 0.34222499999999995]
    """
    return left_behind(width, rank) * rho.prod(dim=1).square()


def trajectory_error_bound(
    init_scales: Sequence[float], width: int, rank: int, *, lr: float, weight_decay: float = 0.0
) -> float:
    """Proposition 2.2: ‖f(t) − f_C(t)‖_F² ≤ (d − 2r)·∏ε_l² at every t of gradient descent.

    The paper leaves out a condition, η(λ + ∏_{k≠l}ε_k²) ≤ 2 for every l, without which some ρ_l may grow at first: with
    ε = (1e-3, 2.5) and η = .35 descent converges and exceeds the bound 26,000 times. With momentum the condition does not
    suffice; use :func:`trajectory_error`.

    Args:
        init_scales: ε_1 … ε_L.
        width: d.
        rank: r.
        lr: η.
        weight_decay: λ.

    Raises:
        ValueError: d ≤ 2r, or the condition fails.

    Example:
        >>> from rankwise.factorizations import trajectory_error_bound
        >>> trajectory_error_bound([0.5, 0.5], width=20, rank=2, lr=0.1)
        1.0
    """
    _check_scales(init_scales)
    fastest = weight_decay + max(others * others for others in _products_of_others(init_scales))
    if lr * fastest > 2:
        raise ValueError(
            f"the bound needs lr·(weight_decay + ∏_(k≠l) ε_k²) ≤ 2 for every l, got {lr * fastest:.4g}; take lr up to "
            f"{2 / fastest:.4g}, or trajectory_error(rho_trajectory(…)), which needs no condition"
        )
    bound = float(left_behind(width, rank))
    for scale in init_scales:
        bound *= scale**2
    return bound


def left_behind(width: int, rank: int) -> int:
    """m = d − 2r, how many singular directions of every factor do not take part (Theorem 2.1).

    Raises:
        ValueError: m is not positive.

    Example:
        >>> from rankwise.factorizations.dynamics import left_behind
        >>> left_behind(width=1000, rank=5)
        990
    """
    if rank < 1 or width <= 2 * rank:
        raise ValueError(
            f"Theorem 2.1 needs 1 ≤ r and a width above 2·rank, got width {width} and rank {rank}; "
            "with rank ≥ width/2 every direction takes part and nothing can be compressed"
        )
    return width - 2 * rank


def _products_of_others(values: Sequence[float]) -> list[float]:
    """∏_{k≠l} values_k for every l, without dividing: a ρ may be 0."""
    above = [1.0]
    for value in reversed(values[1:]):
        above.append(above[-1] * value)
    below, products = 1.0, []
    for value, rest in zip(values, reversed(above), strict=True):
        products.append(below * rest)
        below *= value
    return products


def _check_scales(init_scales: Sequence[float]) -> None:
    if not init_scales or not all(0 < scale < float("inf") for scale in init_scales):
        raise ValueError(f"expected one positive scale for every factor, got {list(init_scales)}")
