"""The step size that descent takes unless told: below the stability limit, from the spectrum of what it starts and ends at."""

import math
from collections.abc import Sequence

from torch import Tensor

from rankwise.factorizations.loss import Loss
from rankwise.factorizations.squared_losses import leading_singular_value

# η in units of 1/λ_max, where 2 is the limit; completion's descent and the paper's own 5e-3 take the same 0.9
SAFE_STEP = 0.9


def stable_learning_rate(
    factors: Sequence[Tensor],
    loss: Loss,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    ratios: Sequence[float] | None = None,
) -> float:
    """A step η at which gradient descent on the factors of W_L ⋯ W_1 is stable.

    With q the loss's curvature in f, a_l = σ₁(W_l(0)) and rates γ_l·η, the curvature of the loss in the factors is at most

        at the start     q·(Σ_l γ_l ∏_{k≠l} a_k² + ‖E‖·max_l Σ_{j≠l} √(γ_l γ_j) ∏_{k≠l,j} a_k),   ‖E‖ ≤ σ₁ + ∏a_l,
        at the solution  q·Σ_l γ_l ∏_{k≠l} s_k²,

    where ∏ s_l = σ₁ is the leading singular value that the loss asks for and descent's conserved quantity fixes how the
    factors share it: s_l² = a_l² + γ_l·x with one x (balanced factors: L·σ₁^{2−2/L}). Returned is 0.9/(λ + the larger of
    the two), λ the weight decay; the limit is 2. With momentum μ the factors overshoot, by energy up to the loss of the
    start, so that f may reach 2σ₁ + ∏a_l and the second line is taken there, together with its residual; and the result
    is multiplied by min(1, 2(1 − μ)), or the factors coast along the valley of equal products, where nothing holds them and
    the curvature grows. Measured for L = 2, 3, 5 and μ from .8 to .997: 5(1 − μ) is where the first of 36 starts diverges.

    It is a bound for modes that stay aligned with the start, which orthogonal starts do; tests run it on all kinds.

    Args:
        factors: W_1 … W_L at the start, first applied first.
        loss: one whose spectrum is known.
        weight_decay: λ.
        momentum: μ, of heavy ball or Nesterov.
        ratios: γ_l, one a factor; 0 for a factor that stays.

    Raises:
        ValueError: a loss of unknown spectrum.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import SquaredLoss
        >>> from rankwise.factorizations.stable_step import stable_learning_rate
        >>> round(stable_learning_rate([1e-3 * torch.eye(4)] * 3, SquaredLoss(8 * torch.eye(4))), 5)
        0.01875
    """
    spectrum = loss.spectrum()
    if spectrum is None:
        raise ValueError(f"no step size follows from a {type(loss).__name__}, whose spectrum is unknown; give lr")
    sigma, q = spectrum
    start = [leading_singular_value(factor) for factor in factors]
    rates = [1.0] * len(start) if ratios is None else list(ratios)
    at_zero = _product(start)
    end = 2 * sigma + at_zero if momentum else sigma
    reached = shared_scales(start, rates, end)
    limit = max(
        _curvature(start, rates) + (sigma + at_zero) * _coupling(start, rates),
        _curvature(reached, rates) + (end - sigma) * _coupling(reached, rates),
    )
    curvature = q * limit + weight_decay
    safe = SAFE_STEP * min(1.0, 2 * (1 - momentum))
    return safe / curvature if curvature else safe  # zero factors asked for a zero matrix: at rest anyhow


def shared_scales(start: Sequence[float], rates: Sequence[float], product: float) -> list[float]:
    """s_l = √(a_l² + γ_l·x) with ∏ s_l = product, as gradient flow from a_l shares it; x ≥ −min a_l²/γ_l."""

    def scales(x: float) -> list[float]:
        return [max(a * a + rate * x, 0.0) ** 0.5 for a, rate in zip(start, rates, strict=True)]

    moving = [a * a / rate for a, rate in zip(start, rates, strict=True) if rate]
    if not moving:
        return list(start)
    low, high = -min(moving), 1.0
    while _product(scales(high)) < product:
        low, high = high, 2 * high
        if high > 1e300:
            return list(start)  # a factor that stays is zero: nothing is reached
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _product(scales(middle)) < product else (low, middle)
    return scales(high)


def _curvature(scales: Sequence[float], rates: Sequence[float]) -> float:
    """Σ_l γ_l ∏_{k≠l} s_k²."""
    return math.fsum(rate * _product(scales, without=(layer,)) ** 2 for layer, rate in enumerate(rates))


def _coupling(scales: Sequence[float], rates: Sequence[float]) -> float:
    """max_l Σ_{j≠l} √(γ_l γ_j) ∏_{k≠l,j} s_k, which bounds what a residual of norm 1 adds to the curvature."""
    layers = range(len(scales))
    return max(
        math.fsum((rates[i] * rates[j]) ** 0.5 * _product(scales, without=(i, j)) for j in layers if j != i)
        for i in layers
    )


def _product(values: Sequence[float], without: tuple[int, ...] = ()) -> float:
    result = 1.0
    for place, value in enumerate(values):
        if place not in without:
            result *= value
    return result
