"""How far the direction of a classifier's weights is from a KKT point of the max-margin problem."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rankwise.regularization.margin import (
    activations,
    layer_gradients,
    output_margins,
    pull_on_outputs,
    require_classifier,
    squared_norm,
)
from rankwise.regularization.nonnegative_least_squares import nonnegative_least_squares


class KKTResidual(NamedTuple):
    """How far weights are from a KKT point of eq. 29, free of all scales; 0 at one.

    Attributes:
        total: √(stationarity² + complementarity²).
        stationarity: ‖Θ − Σ_ic α_ic ∇q_ic‖ / ‖Θ‖.
        complementarity: √Σ_ic (α_ic (q_ic − 1))² / (‖Θ‖²/L), relative to what Σα is at a KKT point.
        multipliers: α ≥ 0, (k, n), 0 at c = y_i.
        weights: Θ scaled to min q = 1.
    """

    total: float
    stationarity: float
    complementarity: float
    multipliers: Float[Tensor, "k n"]
    weights: list[Tensor]


def kkt_residual(weights: Sequence[Float[Tensor, "_ _"]], X: Float[Tensor, "d n"], y: Int[Tensor, " n"]) -> KKTResidual:
    """The KKT residual of min ½Σ_l ‖W_l‖_F² s. t. q_ic(Θ) ≥ 1 in the direction of Θ (overview, eq. 29).

    Θ is scaled so that its smallest margin is 1, hence feasible. Multipliers α ≥ 0 are then chosen to minimize

        ‖Θ − Σ α_ic ∇q_ic‖²/‖Θ‖² + Σ (α_ic (q_ic − 1))²·L²/‖Θ‖⁴

    by nonnegative least squares: without the second term a sample far behind the margin could pass for a support vector.
    The Gram matrix of the ∇q has a closed form, so that the m = n(k − 1) gradients are never written out:

        ⟨∇q_ic, ∇q_jd⟩ = Σ_l ⟨A_lᵀ(e_{y_i} − e_c), A_lᵀ(e_{y_j} − e_d)⟩·⟨h_i, h_j⟩,   A_l = W_L⋯W_{l+1},   h = W_{l−1}⋯W_1x.

    Args:
        weights: W_1, …, W_L, first applied first, with positive margins.
        X: (d, n), one sample a column.
        y: (n,), labels from 0 to k − 1.

    Returns:
        :class:`KKTResidual`. Neither the scale of Θ nor that of X changes its numbers. O(m²) memory.

    Raises:
        ValueError: weights that misclassify a sample, sizes that do not chain, labels out of range, empty or non-finite
            input.

    Example:
        >>> import torch
        >>> from rankwise.regularization import kkt_residual
        >>> X, y = torch.tensor([[1.0, -1.0]]), torch.tensor([0, 1])
        >>> kkt_residual([torch.tensor([[0.5], [-0.5]])], X, y).total < 1e-12
        True
        >>> round(kkt_residual([torch.tensor([[0.5], [-0.4]])], X, y).stationarity, 4)  # sin of the angle to (1, −1)
        0.1104
    """
    require_classifier(weights, X, y)
    depth, y = len(weights), y.long()
    # float64: multipliers come from normal equations
    wide, X = [weight.detach().double() for weight in weights], X.detach().double()
    smallest = float(output_margins(activations(wide, X)[-1], y).min())
    if not smallest > 0:
        raise ValueError(
            f"the smallest margin is {smallest:.4g}: these weights misclassify a sample, and no scaling makes them "
            "feasible; train them further (fit_max_margin)"
        )
    wide = [weight * smallest ** (-1 / depth) for weight in wide]
    H = activations(wide, X)
    Q = output_margins(H[-1], y)
    classes, samples = torch.isfinite(Q).nonzero(as_tuple=True)
    q = Q[classes, samples]
    slack, squared_size = q - 1, squared_norm(wide)

    K = _gram_of_margin_gradients(wide, H, y, classes, samples)
    # ⟨Θ, ∇q⟩ = L·q by Euler, since q is homogeneous of degree L
    alpha = nonnegative_least_squares(K + torch.diag(slack.square() * (depth**2 / squared_size)), depth * q)

    multipliers = torch.zeros_like(Q)
    multipliers[classes, samples] = alpha
    combined = layer_gradients(wide, H, pull_on_outputs(multipliers, y))
    left_over = [weight - gradient for weight, gradient in zip(wide, combined, strict=True)]
    stationarity = math.sqrt(squared_norm(left_over) / squared_size)
    complementarity = float((alpha * slack).norm()) * depth / squared_size
    return KKTResidual(math.hypot(stationarity, complementarity), stationarity, complementarity, multipliers, wide)


def _gram_of_margin_gradients(
    weights: Sequence[Tensor], H: Sequence[Tensor], y: Tensor, classes: Tensor, samples: Tensor
) -> Tensor:
    """⟨∇q_ic, ∇q_jd⟩ over all layers, (m, m) for the m pairs (c, i)."""
    pairs = torch.arange(len(classes), device=y.device)
    above = H[-1].new_zeros(len(weights[-1]), len(classes))  # A_lᵀ(e_{y_i} − e_c), a column a pair
    above[y[samples], pairs] = 1.0
    above[classes, pairs] = -1.0
    K = above.new_zeros(len(classes), len(classes))
    for weight, inputs in zip(reversed(weights), reversed(H[:-1]), strict=True):
        K += (above.mT @ above) * (inputs.mT @ inputs)[samples][:, samples]
        above = weight.mT @ above
    return K
