"""Max margin: gradient descent on a deep linear classifier, far beyond perfect classification.

Theorem 3 of the overview (after Lyu & Li 2020): once the loss is below 1 the direction Θ/‖Θ‖ of the weights tends to a KKT
point of min ½Σ‖W_l‖² s. t. q_ic(Θ) ≥ 1 (eq. 29). The weights grow without bound and the loss passes below every float on the
way, so everything here is in log F.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rankwise.regularization.margin import (
    LOSSES,
    MarginLoss,
    activations,
    layer_gradients,
    output_margins,
    pull_on_outputs,
    require_classifier,
    require_labelled,
    squared_norm,
)
from rankwise.regularization.schatten import require_depth
from rankwise.spectral import haar_frame
from rankwise.spectral.precision import compute_dtype

# halvings after which no step lowers log F any more: what is left is rounding
_MOST_HALVINGS = 60


@dataclass(frozen=True)
class MaxMarginFit:
    """How descent went.

    Attributes:
        weights: W_1, …, W_L, first applied first.
        log_losses: log F before every step and after the last, steps + 1 numbers.
        separated: F is below the value that Theorem 3 needs, so every margin is positive.
        normalized_margin: min_ic q_ic / ‖Θ‖^L, which is locally largest where Theorem 3 ends.
    """

    weights: list[Tensor]
    log_losses: list[float]
    separated: bool
    normalized_margin: float


class MaxMarginError(ValueError):
    """Descent did not get to where Theorem 3 begins, or diverged; ``result`` holds the last finite state."""

    def __init__(self, message: str, result: MaxMarginFit):
        super().__init__(message)
        self.result = result


def fit_max_margin(
    X: Float[Tensor, "d n"],
    y: Int[Tensor, " n"],
    *,
    depth: int = 2,
    width: int | None = None,
    loss: str = "exponential",
    steps: int = 2000,
    step: float | None = None,
    init_scale: float = 0.1,
    start: Sequence[Float[Tensor, "_ _"]] | None = None,
    generator: torch.Generator | None = None,
) -> MaxMarginFit:
    """Gradient descent on a deep linear classifier in steps that stay useful however small the loss (overview, eq. 28).

        W_l ← W_l − (δ/‖∇log F‖²)·∇_{W_l} log F,

    all layers at once, gradients in closed form. A step lowers log F by δ to first order; a step ∝ 1 on F itself no longer
    moves once F is small. δ doubles after a step that lowers log F by at least δ/2 (Armijo) and is halved until one does,
    so F never grows.

    Theorem 3 begins where F < 1 (exponential) or F < log 2 (logistic): correct labels alone do not suffice. From there
    Θ/‖Θ‖ tends to a KKT point of eq. 29, slowly: :func:`kkt_residual` falls like what remains of the start,
    ‖Θ(0)‖/‖Θ‖ ~ log(1/F)^{−1/L} (tested). A small start therefore ends nearer; at three and more layers it first passes
    saddles of lower rank, for hundreds of steps.

    Args:
        X: (d, n), one sample a column.
        y: (n,), integer labels; k = max y + 1 classes, at least 2.
        depth: L ≥ 1.
        width: of the inner layers; max(d, k) unless given.
        loss: "exponential", F = Σ_i Σ_{c≠y_i} e^{−q_ic}, or "logistic", the cross-entropy summed over samples.
        steps: updates, each about 3L products with the data.
        step: a fixed δ, in nats of log F, in place of the adapted one.
        init_scale: ε, length of the orthonormal columns (or rows) of every W_l(0).
        start: weights to go on from; ``depth``, ``width`` and ``init_scale`` then count for nothing.
        generator: source of the random start.

    Returns:
        :class:`MaxMarginFit`, in float64 if X is, else float32.

    Raises:
        ValueError: labels out of range or of one class, settings out of range, sizes that do not chain, empty or
            non-finite input.
        MaxMarginError: a ValueError too; F is not below 1 (log 2) after all steps, as with labels that no linear map
            separates, or a fixed ``step`` brought F to e times its start or out of the finite numbers.

    Example:
        >>> import torch
        >>> from rankwise.regularization import fit_max_margin
        >>> X, y = torch.tensor([[2.0, -1.0], [1.0, 2.0]], dtype=torch.float64), torch.tensor([0, 1])
        >>> fit = fit_max_margin(X, y, depth=1, steps=1000, generator=torch.Generator().manual_seed(0))
        >>> w = fit.weights[0][0] - fit.weights[0][1]
        >>> [round(v, 2) for v in (w / w.norm()).tolist()]  # (0.6, −0.2), normalized
        [0.95, -0.32]
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is one of {', '.join(LOSSES)}, got {loss!r}")
    if steps < 0:
        raise ValueError(f"steps is the number of updates and cannot be negative, got {steps}")
    if step is not None and not 0 < step < math.inf:
        raise ValueError(f"step is a decrease of log F in nats and must be positive and finite, got {step}")
    if start is None:
        require_labelled(X, y)
        weights = _orthogonal_start(X, int(y.max()) + 1, depth, width, init_scale, generator)
    else:
        weights = [weight.detach().to(X.device, compute_dtype(X.dtype)) for weight in start]
    require_classifier(weights, X, y)
    descent = _LogDescent(LOSSES[loss], X.detach().to(weights[0].dtype), y.long(), weights, step)
    take_step = descent.adapted_step if step is None else descent.fixed_step
    for _ in range(steps):
        if not take_step():
            break
    result = descent.result()
    if not result.separated:
        raise MaxMarginError(
            f"log F is {result.log_losses[-1]:.4g} after {len(result.log_losses) - 1} steps of the {loss} loss, but Theorem "
            f"3 begins below {math.log(LOSSES[loss].of_no_margin):.3g}: either no linear map separates these labels, or "
            "more steps are needed (go on with start=error.result.weights)",
            result,
        )
    return result


class _LogDescent:
    """The weights, and log F with its gradient there."""

    def __init__(self, loss: MarginLoss, X: Tensor, y: Tensor, weights: list[Tensor], delta: float | None):
        self.loss, self.X, self.y = loss, X, y
        self.log_losses: list[float] = []
        self._move_to(weights, *self._evaluate(weights))
        # the first adapted step moves the weights by 1 %: near 0 the slope ~ ε^{L−1} is small, and δ = 1 would leap away
        self.delta = 0.01 * math.sqrt(self.squared_slope * squared_norm(weights)) if delta is None else delta

    def _evaluate(self, weights: list[Tensor]) -> tuple[float, list[Tensor], Tensor]:
        H = activations(weights, self.X)
        log_loss, pull = self.loss.log_value_and_pull(output_margins(H[-1], self.y))
        return float(log_loss), H, pull

    def _move_to(self, weights: list[Tensor], log_loss: float, H: list[Tensor], pull: Tensor) -> None:
        self.weights, self.outputs = weights, H[-1]
        self.log_losses.append(log_loss)
        self.gradients = layer_gradients(weights, H, -pull_on_outputs(pull, self.y))
        self.squared_slope = squared_norm(self.gradients)

    def _stepped(self) -> list[Tensor]:
        length = self.delta / self.squared_slope
        return [weight - length * gradient for weight, gradient in zip(self.weights, self.gradients, strict=True)]

    def adapted_step(self) -> bool:
        """One step that lowers log F by at least half of what its slope says; False where there is none."""
        if self.squared_slope == 0:
            return False
        for _ in range(_MOST_HALVINGS):
            weights = self._stepped()
            log_loss, H, pull = self._evaluate(weights)
            if log_loss <= self.log_losses[-1] - self.delta / 2:  # not so for nan either
                self._move_to(weights, log_loss, H, pull)
                self.delta *= 2
                return True
            self.delta /= 2
        return False

    def fixed_step(self) -> bool:
        """One step of δ; False where log F is flat."""
        if self.squared_slope == 0:
            return False
        weights = self._stepped()
        log_loss, H, pull = self._evaluate(weights)
        if not (math.isfinite(log_loss) and log_loss <= self.log_losses[0] + 1):
            raise MaxMarginError(
                f"descent diverged: step {len(self.log_losses)} brought log F from {self.log_losses[-1]:.4g} to "
                f"{log_loss:.4g}; lower step from {self.delta:.3g}, or leave it out and it is adapted. "
                "result holds the state before that step",
                self.result(),
            )
        self._move_to(weights, log_loss, H, pull)
        return True

    def result(self) -> MaxMarginFit:
        smallest = float(output_margins(self.outputs, self.y).min())
        size = math.sqrt(squared_norm(self.weights))
        return MaxMarginFit(
            weights=self.weights,
            log_losses=self.log_losses,
            separated=self.log_losses[-1] < math.log(self.loss.of_no_margin),
            normalized_margin=smallest / size ** len(self.weights) if size else 0.0,
        )


def _orthogonal_start(
    X: Tensor, classes: int, depth: int, width: int | None, scale: float, generator: torch.Generator | None
) -> list[Tensor]:
    require_depth(depth)
    if width is not None and width < 1:
        raise ValueError(f"width is that of the inner layers and must be at least 1, got {width}")
    if not 0 < scale < math.inf:
        raise ValueError(
            f"init_scale must be positive and finite, got {scale}; no gradient leads away from zero weights"
        )
    inner = max(X.shape[0], classes) if width is None else width
    weights = []
    for columns, rows in pairwise([X.shape[0], *[inner] * (depth - 1), classes]):
        long, short = max(rows, columns), min(rows, columns)
        frame = haar_frame(long, short, scale=scale, generator=generator, dtype=compute_dtype(X.dtype), device=X.device)
        weights.append(frame if rows == long else frame.mT.contiguous())
    return weights
