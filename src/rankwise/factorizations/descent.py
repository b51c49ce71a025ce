"""Gradient descent on a factorization's factors: the loop, what it reports, and where it stops."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.factorizations.compressed import CompressedDeepLinear
from rankwise.factorizations.deep_linear import DeepLinear
from rankwise.factorizations.loss import AutogradLoss, Loss
from rankwise.factorizations.products import factor_gradients, prefix_products
from rankwise.factorizations.stable_step import shared_scales, stable_learning_rate
from rankwise.factorizations.trained_chain import TrainedChain, trained_chain
from rankwise.factorizations.update_rules import GradientDescent, TorchOptimizer, UpdateRule

Factorization = DeepLinear | CompressedDeepLinear

# Stable descent never exceeds the loss of its start and momentum hardly; a thousand times that is no overshoot.
_DIVERGED = 1e3
# Adam moves every entry by about lr: this share of the scale to be reached, spread over a row, is what a factor may turn
_ADAM_SHARE = 0.01


@dataclass(frozen=True)
class DescentStep:
    """What a callback sees before each update.

    Attributes:
        iteration: updates made so far.
        loss: at the model's present parameters.
        model: live; copy what you keep.
    """

    iteration: int
    loss: float
    model: Factorization


@dataclass(frozen=True)
class FitResult:
    """How descent went; the model itself holds the factors.

    Attributes:
        losses: before every update and after the last one, iterations + 1 numbers.
        iterations: updates made.
        converged: the loss reached ``tol``.
        reason: "tolerance", "steps", "callback" or, on a :class:`DivergedError`, "diverged".
        lr: η as used; nan where a torch optimizer brought its own.
    """

    losses: list[float]
    iterations: int
    converged: bool
    reason: str
    lr: float


class DivergedError(ValueError):
    """The loss grew beyond all bounds; ``result`` says how far it came and the model holds the last finite state."""

    def __init__(self, message: str, result: FitResult):
        super().__init__(message)
        self.result = result


def fit_factorization(
    model: Factorization,
    loss: Loss | Callable[[Tensor], Tensor],
    *,
    lr: float | None = None,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    nesterov: bool = False,
    optimizer: str | torch.optim.Optimizer = "gd",
    outer_lr_ratio: float = 1.0,
    steps: int = 10_000,
    tol: float = 1e-10,
    callbacks: Sequence[Callable[[DescentStep], object]] = (),
) -> FitResult:
    """Train every factor of W_L ⋯ W_1, or of U W̃_L ⋯ W̃_1 Vᵀ, at once (ICML 2024, eq. 4, 9 and 11), in place.

        W_l ← (1 − ηλ)W_l − η (W_L ⋯ W_{l+1})ᵀ G (W_{l−1} ⋯ W_1)ᵀ,     G = ∂loss/∂f.

    3(L − 1) products an iteration. Frames that do not train are folded into the loss first: a squared or regression loss
    then costs O(L w³) an iteration, whatever the size of f, and its value still counts what the frames cannot reach.

    Progress may pause for thousands of iterations before a singular value appears, so lack of it ends nothing: descent
    stops at ``tol``, after ``steps``, or when a callback returns True.

    Args:
        model: its parameters with ``requires_grad`` are trained and hold the result.
        loss: a :class:`Loss`, or any differentiable function of the dense f (:class:`AutogradLoss`).
        lr: η, in units of 1/loss. Unless given, 0.9 over a bound on the curvature from start to solution, where 2 is the
            limit of stability (:func:`stable_learning_rate`; balanced from a small start: 0.9/(L·σ₁^{2−2/L}), and less with momentum). For "adam",
            where an entry moves by about η whatever the gradient: a hundredth of the scale that the factors have to reach,
            over the longest side.
        weight_decay: λ; part of the gradient under "gd" (eq. 4), decoupled under "adam".
        momentum: μ of heavy ball, under "gd".
        nesterov: take the gradient step after the momentum's.
        optimizer: "gd", "adam" (elementwise; it does not keep compression, EquivariantAdam of
            ``rankwise.optimizers`` does, to the order of Proposition 2.2's bound), or a torch optimizer over the model's parameters, which brings its
            own lr, weight_decay and momentum.
        outer_lr_ratio: γ, rate of U and V over that of the inner factors, where they train.
        steps: most updates.
        tol: the loss, in units of the loss at f = 0 (½‖Φ‖²), at which descent has converged; for a loss without
            such a unit the loss itself.
        callbacks: called with a :class:`DescentStep` before every update and after the last.

    Returns:
        :class:`FitResult`.

    Raises:
        ValueError: settings out of range, nothing to train, no step size to derive, or shapes that do not fit.
        DivergedError: a ValueError too; the loss left the finite numbers or a thousand times its starting value.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import DeepLinear, SquaredLoss, fit_factorization
        >>> target = torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0]))
        >>> deep = DeepLinear.orthogonal(4, depth=3, init_scale=0.1, generator=torch.Generator().manual_seed(0))
        >>> result = fit_factorization(deep, SquaredLoss(target), tol=1e-6)
        >>> result.reason, bool(torch.allclose(deep.product(), target, atol=1e-2))
        ('tolerance', True)
    """
    if not isinstance(loss, Loss):
        loss = AutogradLoss(loss)
    _check(lr, weight_decay, momentum, nesterov, optimizer, outer_lr_ratio, steps)
    chain = trained_chain(model, loss, outer_lr_ratio)
    grads_before = [parameter.grad for parameter in chain.gradients]
    eta, rule = _update_rule(chain, optimizer, lr, weight_decay, momentum, nesterov)
    parameters = [parameter.detach() for parameter in chain.gradients]
    last_finite = [parameter.clone() for parameter in parameters]

    goal = tol if loss.at_zero is None else tol * loss.at_zero
    ceiling = math.inf
    losses: list[float] = []

    def result(reason: str) -> FitResult:
        return FitResult(losses, max(len(losses) - 1, 0), reason == "tolerance", reason, eta)

    try:
        with torch.no_grad():
            while True:
                prefixes = prefix_products(chain.factors)
                value, G = chain.loss.value_and_gradient(prefixes[-1])
                now = float(value)
                if not (math.isfinite(now) and now <= ceiling):
                    for parameter, kept in zip(parameters, last_finite, strict=True):
                        parameter.copy_(kept)
                    raise DivergedError(_divergence(len(losses), now, eta), result("diverged"))
                losses.append(now)
                iteration = len(losses) - 1
                if iteration == 0 and loss.at_zero is not None:
                    ceiling = _DIVERGED * max(now, loss.at_zero)
                told = [callback(DescentStep(iteration, now, model)) is True for callback in callbacks]
                for reason, holds in (
                    ("tolerance", now <= goal),
                    ("callback", any(told)),
                    ("steps", iteration >= steps),
                ):
                    if holds:
                        return result(reason)
                factor_gradients(chain.factors, prefixes, G, out=chain.factor_gradients)
                for parameter, kept in zip(parameters, last_finite, strict=True):
                    kept.copy_(parameter)
                rule.step()
    finally:
        for parameter, grad in zip(chain.gradients, grads_before, strict=True):
            parameter.grad = grad


def _update_rule(
    chain: TrainedChain,
    optimizer: str | torch.optim.Optimizer,
    lr: float | None,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
) -> tuple[float, UpdateRule]:
    parameters, gradients = list(chain.gradients), list(chain.gradients.values())
    if isinstance(optimizer, torch.optim.Optimizer):
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not held & {id(parameter) for parameter in parameters}:
            raise ValueError("the optimizer holds none of the model's parameters; build it from model.parameters()")
        return math.nan, TorchOptimizer(optimizer, parameters, gradients)
    if optimizer == "adam":
        eta = _adam_learning_rate(chain) if lr is None else lr
        groups = [{"params": [p], "lr": eta * rate} for p, rate in zip(parameters, chain.rates, strict=True)]
        adam = torch.optim.AdamW(groups, lr=eta, weight_decay=weight_decay)
        return eta, TorchOptimizer(adam, parameters, gradients)
    if lr is None:
        lr = stable_learning_rate(
            chain.factors, chain.loss, weight_decay=weight_decay, momentum=momentum, ratios=chain.factor_rates
        )
    lrs = [lr * rate for rate in chain.rates]
    moved = [parameter.detach() for parameter in parameters]
    return lr, GradientDescent(moved, gradients, lrs, weight_decay, momentum, nesterov)


def _adam_learning_rate(chain: TrainedChain) -> float:
    spectrum = chain.loss.spectrum()
    if spectrum is None:
        raise ValueError(f"no step size follows from a {type(chain.loss).__name__}, whose spectrum is unknown; give lr")
    depth = len(chain.factors)
    reached = max(shared_scales([0.0] * depth, [1.0] * depth, spectrum[0]))
    return _ADAM_SHARE * reached / max(max(factor.shape) for factor in chain.factors)


def _divergence(iterations: int, loss: float, lr: float) -> str:
    if iterations == 0:
        return "the loss is not finite at the start; check the target, the starting factors and the loss itself"
    advice = "lower the optimizer's lr" if math.isnan(lr) else f"lower lr from {lr:.3g}, a tenth is a good next try"
    return (
        f"descent diverged: update {iterations} brought the loss to {loss:.3g}; {advice}. "
        "The model holds the state before that update"
    )


def _check(
    lr: float | None,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    optimizer: str | torch.optim.Optimizer,
    outer_lr_ratio: float,
    steps: int,
) -> None:
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    if not 0 <= weight_decay < math.inf or not 0 <= outer_lr_ratio < math.inf:
        raise ValueError(f"weight_decay and outer_lr_ratio cannot be negative, got {weight_decay} and {outer_lr_ratio}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
    if nesterov and not momentum:
        raise ValueError("nesterov needs a momentum above 0; 0.9 is usual")
    if steps < 0:
        raise ValueError(f"steps is the number of updates and cannot be negative, got {steps}")
    if isinstance(optimizer, torch.optim.Optimizer):
        if lr is not None or weight_decay or momentum:
            raise ValueError("a torch optimizer brings its own lr, weight_decay and momentum; set them there")
    elif optimizer not in ("gd", "adam"):
        raise ValueError(f'optimizer is "gd", "adam" or a torch optimizer, got {optimizer!r}')
    elif optimizer == "adam" and momentum:
        raise ValueError('momentum belongs to "gd"; "adam" has its own')
