"""The ridge start: with few labels, solve for the adapter instead of training it.

Near its pretrained weights a model is almost linear in them: f(x) ≈ f₀(x) + Σ_l ⟨G_l(x), ΔW_l⟩ with G_l(x) = ∂f(x)/∂W_l.
For a handful of labelled rows the ridge problem

    min Σ_i (a·f₀(x_i) + b + Σ_l ⟨G_l(x_i), ΔW_l⟩ − y_i)² + λ Σ_l ‖ΔW_l‖²_F / w_l

then has its solution in closed form, ΔW_l = w_l Σ_i c_i G_l(x_i), with c from an n×n system of the kernel
K = Σ_l w_l K_l, K_l[i, j] = ⟨G_l(x_i), G_l(x_j)⟩ (the model's empirical tangent kernel: Jacot et al., 2018; for
fine-tuning: Malladi et al., 2023). Three things make it an adapter that can be trusted:

* w_l = 1/tr K_l: every layer gets the same say, so that no few layers fit the labels alone.
* The leave-one-out error of every λ is exact and free, so λ is chosen on the labels themselves, and λ = ∞ (no change at
  all) is one of the choices: where the labels do not support a change, the adapter abstains.
* a and b, the calibration of the output, are free: the weights are not bent for what a scale and an offset explain.

ΔW_l is kept as the best rank-r product, which becomes U, core and V of a Deep LoRA layer.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.adapters.gradient_capture import GradientCapture, LayerGradient, unadapted
from rankwise.adapters.initialization import layers_with, require_writable_factors, to_device
from rankwise.adapters.layers import DeepLoraLayer, ParamWrapper
from rankwise.adapters.sharded_weights import gathered, share_first
from rankwise.spectral import MatrixOperator, OuterProduct, truncated_svd
from rankwise.spectral.operators import as_operator

# Of the kernel's mean diagonal. Larger ones win on squared error with many rows and lose on ranking (docs/few-labels.md).
PENALTIES = (0.01, 0.03, 0.1)
_SMALLEST_SCALE = 0.2  # below it the outputs hardly know the targets, and dividing by it would blow the update up
_BLOCK = 2**25  # numbers in one block of gradients: 128 MiB


@dataclass(frozen=True)
class RidgeFit:
    """A ridge problem solved in its dual, at the penalty with the smallest leave-one-out error.

    Attributes:
        coefficients: c, one a row; zeros if the fit abstains.
        penalty: λ over the kernel's mean diagonal; inf if it abstains.
        error: mean squared leave-one-out error at that penalty.
        reference: the same of the calibration alone (λ = ∞).
        scale, offset: a and b.
    """

    coefficients: Float[Tensor, " n"]
    penalty: float
    error: float
    reference: float
    scale: float
    offset: float

    @property
    def abstains(self) -> bool:
        """Whether the labels support no change of the weights."""
        return math.isinf(self.penalty)


def ridge_in_dual(
    kernel: Float[Tensor, "n n"],
    outputs: Float[Tensor, " n"],
    targets: Float[Tensor, " n"],
    penalties: Iterable[float] = PENALTIES,
) -> RidgeFit:
    """min over a, b, h of Σ(a·outputs + b + h − targets)² + λ‖h‖²_K, with λ chosen by leave-one-out.

    With A = (K + λI)⁻¹ and the columns F = [1, outputs], M = A − AF(FᵀAF)⁻¹FᵀA gives c = M·targets, and the residual of
    row i in a fit without it is c_i / M_ii: all leave-one-out fits for the price of one.

    Args:
        kernel: K, positive semidefinite.
        outputs: of the unadapted model.
        targets: what they should be.
        penalties: values of λ over the kernel's mean diagonal to choose from; ∞ is always among them.

    Raises:
        ValueError: fewer than 3 rows, a kernel that is zero, or numbers that are not finite.

    Example:
        >>> import torch
        >>> from rankwise.adapters.tangent import ridge_in_dual
        >>> x = torch.linspace(-1, 1, 20, dtype=torch.float64)
        >>> fit = ridge_in_dual(torch.outer(x**2, x**2), x, 2 * x + x**2)
        >>> round(fit.scale, 3), fit.abstains
        (2.0, False)
    """
    K, f0, y = kernel.double(), outputs.double(), targets.double()
    n = len(y)
    if n < 3:
        raise ValueError(f"a ridge fit needs at least 3 labelled rows, got {n}")
    if not all(bool(torch.isfinite(values).all()) for values in (K, f0, y)):
        raise ValueError("the kernel, outputs and targets must be finite numbers")
    size = float(K.diagonal().mean())
    if not size > 0:
        raise ValueError("the kernel is zero: the outputs do not depend on the adapted layers")
    spread = float(f0.std())
    centred = (f0 - f0.mean()) / spread if spread > 0 else f0.new_zeros(n)
    free = torch.stack([torch.ones_like(f0), centred], dim=1)[:, : 2 if spread > 0 else 1]

    def solved(penalized: Tensor) -> tuple[Tensor, Tensor, float]:
        """c, (b, a) and the leave-one-out error of a prior covariance plus noise, the calibration eliminated exactly."""
        inverse = torch.linalg.inv(penalized)
        reduced = inverse @ free
        calibration = torch.linalg.solve(free.mT @ reduced, reduced.mT)
        projected = inverse - reduced @ calibration
        c = projected @ y
        return c, calibration @ y, float((c / projected.diagonal()).square().mean())

    identity = torch.eye(n).to(K)
    c, slopes, reference = solved(identity)
    best, penalty, c = reference, math.inf, torch.zeros_like(y)
    for candidate in penalties:
        found, found_slopes, error = solved(K + candidate * size * identity)
        if error < best:
            c, slopes, best, penalty = found, found_slopes, error, candidate
    scale = float(slopes[1]) / spread if spread > 0 else 0.0
    return RidgeFit(c, penalty, best, reference, scale, float(slopes[0]) - scale * float(f0.mean()))


@dataclass(frozen=True)
class RidgeSummary:
    """What :func:`solve_deeplora_weights` found.

    Attributes:
        rows: labelled rows used.
        fit: the ridge problem's solution.
        captured: share of ‖ΔW‖² that rank r holds, over all layers; nan if the fit abstains.
        update_norm: ‖ΔW‖_F over all layers.
        seconds: the time it took.
    """

    rows: int
    fit: RidgeFit
    captured: float
    update_norm: float
    seconds: float

    def __str__(self) -> str:
        if self.fit.abstains:
            return (
                f"{self.rows} labelled rows support no change (leave-one-out error {self.fit.reference:.4g} without one, "
                f"not less with any); the adapter stays a no-op ({self.seconds:.1f} s)"
            )
        gain = 1 - self.fit.error / self.fit.reference
        return (
            f"solved for {self.rows} labelled rows: leave-one-out error {self.fit.reference:.4g} -> {self.fit.error:.4g} "
            f"({gain:.0%} less) at penalty {self.fit.penalty:.3g}, {self.captured:.0%} of the update kept "
            f"({self.seconds:.1f} s)"
        )


def solve_deeplora_weights(
    model: nn.Module,
    examples: Iterable[Any],
    targets: Float[Tensor, " n"],
    *,
    outputs_fn: Callable[[nn.Module, Any], Tensor],
    adapter_name: str = "default",
    penalties: Iterable[float] = PENALTIES,
    seed: int = 0,
) -> RidgeSummary:
    """Set every Deep LoRA layer to the ridge solution for these labelled rows; no learning rate, no steps.

    One forward and backward pass a row on the *unadapted* model, in eval mode; its weights, flags and gradients stay
    as they were. Memory: every row's layer inputs and output gradients, O(tokens · (d_in + d_out)) a layer, for all layers
    at once; time grows with the square of the number of rows. Under ``torch.distributed`` every process calls it, before
    the model is wrapped or sharded, and ends with the first one's solution.

    Args:
        model: a model with Deep LoRA layers, from ``get_peft_model(model, DeepLoraConfig(...))``.
        examples: batches of one labelled row each.
        targets: what ``outputs_fn`` should give on them.
        outputs_fn: ``outputs_fn(model, example)`` → one number as a tensor.
        adapter_name: which adapter.
        penalties: see :func:`ridge_in_dual`.
        seed: of the randomized SVD.

    Returns:
        :class:`RidgeSummary`; printable. If the fit abstains the adapter is an exact no-op.

    Raises:
        ValueError: no such adapter, fewer than three rows, numbers of rows and targets that differ, outputs that are
            not one finite number, a layer the outputs do not depend on, or adapted parameters (``target_parameters``).

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from rankwise.adapters import DeepLoraConfig, solve_deeplora_weights
        >>> _ = torch.manual_seed(0)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 12)), DeepLoraConfig(r=4, target_modules=["0"]))
        >>> x = torch.randn(20, 16)
        >>> summary = solve_deeplora_weights(model, x.split(1), x[:, 0], outputs_fn=lambda m, row: m(row)[0, 0])
        >>> summary.fit.error < 0.5 * summary.fit.reference
        True
    """
    start = time.perf_counter()
    where = next(model.parameters()).device
    layers = layers_with(model, adapter_name)
    require_writable_factors(layers, adapter_name)
    parameters = [name for name, layer in layers.items() if isinstance(layer, ParamWrapper)]
    if parameters:
        raise ValueError(
            f"the ridge start keeps every row's gradient of every layer, which for {parameters[0]} of target_parameters would be "
            "rows × the whole weight; leave target_parameters out, or train"
        )
    per_row: dict[str, list[LayerGradient]] = {name: [] for name in layers}
    outputs: list[float] = []
    capture = GradientCapture(layers, lambda name, gradient: per_row[name].append(gradient))
    with unadapted(model, layers):
        for example in examples:
            on_device = to_device(example, where)
            outputs.append(capture.run(lambda on_device=on_device: outputs_fn(model, on_device).squeeze()))  # type: ignore[misc]
    if len(outputs) != len(targets):
        raise ValueError(f"{len(outputs)} examples but {len(targets)} targets; each row needs one")
    unreached = [name for name, gradients in per_row.items() if len(gradients) != len(outputs)]
    if unreached:
        raise ValueError(
            f"the output does not depend on {', '.join(unreached[:3])} for every row; leave such layers out with "
            "exclude_modules"
        )
    kernels = {name: _gram(per_row[name], layers[name]) for name in layers}
    weights = {
        name: 1 / max(float(kernel.trace()), torch.finfo(torch.float64).tiny) for name, kernel in kernels.items()
    }
    kernel = sum((weights[name] * kernels[name] for name in layers), torch.zeros(()).double())
    fit = ridge_in_dual(kernel, torch.tensor(outputs).double(), targets.detach().cpu().double(), penalties)

    generator = torch.Generator().manual_seed(seed)
    kept = total = 0.0
    for name, layer in layers.items():
        if fit.abstains:
            factors = layer.factors(adapter_name)
            with gathered(factors):
                left, right = factors.left.detach().clone(), factors.right.detach().mT.clone()
            layer.set_frames(adapter_name, left, right)
            continue
        # a·f is what is fitted, f is what the weights change: hence the division by a
        coefficients = fit.coefficients * (weights[name] / (fit.scale if fit.scale > _SMALLEST_SCALE else 1.0))
        update = _combined(per_row.pop(name), coefficients)
        svd = truncated_svd(update, layer.r[adapter_name], generator=generator, estimate_error=False)
        layer.set_update(adapter_name, svd.U, svd.S, svd.Vh.mT)
        kept += float(svd.S.double().square().sum())
        total += float(coefficients @ kernels[name] @ coefficients)
    share_first(factor for layer in layers.values() for factor in layer.factors(adapter_name))
    captured = kept / total if total > 0 else float("nan")
    return RidgeSummary(len(outputs), fit, captured, math.sqrt(kept), time.perf_counter() - start)


def _gram(gradients: list[LayerGradient], layer: DeepLoraLayer) -> Float[Tensor, "n n"]:
    """⟨G_i, G_j⟩ of one layer, a block of output rows at a time: never all n gradients at once."""
    n, step = len(gradients), max(1, _BLOCK // (len(gradients) * layer.in_features))
    gram = torch.zeros(n, n, dtype=torch.float64)
    for first in range(0, layer.out_features, step):
        block = torch.stack([_rows(g, first, first + step) for g in gradients]).flatten(1)
        gram += (block @ block.mT).double().cpu()
    return gram


def _rows(gradient: LayerGradient, first: int, last: int) -> Tensor:
    """Output rows first…last of Σ δxᵀ, as float32 or better."""
    if gradient.dense is not None:
        return gradient.dense[first:last]
    products = [_wide(delta)[:, first:last].mT @ _wide(x) for delta, x in gradient.pairs]
    return sum(products[1:], products[0])


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _combined(gradients: list[LayerGradient], coefficients: Float[Tensor, " n"]) -> MatrixOperator:
    """Σ_i c_i G_i as an operator: in factored form, or dense where the rows' gradients are."""
    if any(gradient.dense is not None for gradient in gradients):
        parts = [float(c) * _rows(g, 0, g.out_features) for g, c in zip(gradients, coefficients, strict=True)]
        return as_operator(sum(parts[1:], parts[0]))
    pairs = [(float(c) * _wide(d), _wide(x)) for g, c in zip(gradients, coefficients, strict=True) for d, x in g.pairs]
    return OuterProduct(torch.cat([d for d, _ in pairs]), torch.cat([x for _, x in pairs]))
