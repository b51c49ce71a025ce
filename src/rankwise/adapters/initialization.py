"""Placing U and V from the first gradient of the user's own loss."""

import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters.config import ZERO_LEFT
from rankwise.adapters.gradient_capture import GradientCapture, LayerGradient, unadapted
from rankwise.adapters.layers import DeepLoraLayer
from rankwise.adapters.saved_updates import read_tensors
from rankwise.adapters.sharded_weights import gathered, is_first_process, require_writable, share_first
from rankwise.factorizations import InvariantSubspaces, invariant_subspaces
from rankwise.files import save_tensors
from rankwise.spectral import MatrixOperator, OuterProduct, truncated_svd
from rankwise.spectral.operators import DenseMatrix
from rankwise.spectral.precision import compute_dtype

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class LayerInitialization:
    """What one layer started from.

    ``captured`` is the share of ‖G‖_F² in the gradient directions used; nan where there was no gradient: none was needed, or
    it is zero (``gradient_norm`` 0) and the frames are random.
    """

    name: str
    width: int
    gradient_norm: float
    captured: float


@dataclass(frozen=True)
class InitializationSummary:
    """The start of every layer, the loss it was measured at (averaged over batches), and the time it took."""

    layers: list[LayerInitialization]
    loss: float
    seconds: float

    @property
    def captured(self) -> float:
        """Share of the whole gradient's energy: Σ captured·‖G‖² / Σ‖G‖²."""
        placed = [layer for layer in self.layers if layer.gradient_norm != 0]
        energy = sum(layer.gradient_norm**2 for layer in placed)
        return sum(layer.captured * layer.gradient_norm**2 for layer in placed) / energy if energy else float("nan")

    @property
    def without_gradient(self) -> list[str]:
        """Layers that got random frames because their gradient is zero: experts without tokens in these batches."""
        return [layer.name for layer in self.layers if layer.gradient_norm == 0]

    def __str__(self) -> str:
        rows = [f"{'layer':<48} {'width':>5} {'|G|':>10} {'captured':>9}"]
        rows += [
            f"{x.name:<48} {x.width:>5} {x.gradient_norm:>10.3g} "
            + (f"{x.captured:>9.1%}" if x.gradient_norm else "   random")
            for x in self.layers
        ]
        return "\n".join([*rows, f"loss {self.loss:.4g}, {self.captured:.1%} captured, {self.seconds:.2f} s"])


def initialize_deeplora_weights(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    loss_fn: Loss | None = None,
    num_batches: int = 1,
    adapter_name: str = "default",
    seed: int = 0,
    subspaces: str | os.PathLike[str] | None = None,
) -> InitializationSummary:
    """Start every Deep LoRA layer as its config's ``variant`` says: U and V from the gradient of the unadapted model.

    The variants ``zero-left`` (the default) and ``random`` ask for no gradient: V (and U) are drawn at random.

    Under ``torch.distributed`` all processes call it, before the model is wrapped or sharded by FSDP, and end with the frames
    of the first process. Under DeepSpeed's ZeRO-3 it is called after ``deepspeed.initialize``, on the wrapped model.

    A layer whose gradient is zero while others have one gets random frames, as an expert that no token of these batches was
    sent to; the summary names it, and more ``num_batches`` help. A layer that is computed but that the loss does not depend on
    is refused.

    The adapter stays an exact no-op: only the directions in which it will learn are chosen. Each layer's gradient is
    decomposed and dropped during the backward pass, so the extra peak is about one layer's weight. With several
    batches the running sum is kept in factored form, at four times the directions needed (at least 32).

    Base weights, gradients (``.grad``), ``requires_grad``, train/eval flags and the global random state stay as they
    were. The model runs in eval mode, in the dtype and autocast context of the caller.

    Args:
        model: a model with Deep LoRA layers, usually from ``get_peft_model(model, DeepLoraConfig(...))``.
        batches: iterable of dicts of tensors (a DataLoader does); only the first ``num_batches`` are drawn. Not
            needed for ``zero-left`` and ``random``.
        loss_fn: ``loss_fn(model, batch) -> scalar tensor``; by default ``model(**batch).loss``.
        num_batches: how many batches to average the gradient over.
        adapter_name: which adapter.
        seed: seeds the random parts of the frames; the same seed and batches give the same frames.
        subspaces: a file of :func:`save_subspaces` to take the frames from instead.

    Returns:
        :class:`InitializationSummary`: printable, with the captured share of ‖G‖² per layer.

    Raises:
        ValueError: no such adapter, merged adapters, no batches, gradients that are all zero or one that is not finite, a layer
            that the loss does not depend on, a loss that is not one finite number, a subspace file that does not fit, or an
            adapter that FSDP has sharded already. The adapter is then unchanged.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from rankwise.adapters import DeepLoraConfig, initialize_deeplora_weights
        >>> _ = torch.manual_seed(0)
        >>> config = DeepLoraConfig(r=4, variant="compressed", target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 12)), config)
        >>> batch = {"x": torch.randn(8, 16), "y": torch.randn(8, 12)}
        >>> loss = lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean()
        >>> summary = initialize_deeplora_weights(model, [batch], loss_fn=loss)
        >>> [layer.name for layer in summary.layers], 0 < summary.captured <= 1
        (['0'], True)
    """
    start = time.perf_counter()
    layers = layers_with(model, adapter_name)
    require_writable_factors(layers, adapter_name)
    generator = torch.Generator().manual_seed(seed)
    if subspaces is not None:
        _load_subspaces(layers, adapter_name, Path(subspaces))
        rows = [LayerInitialization(n, x.r[adapter_name], float("nan"), float("nan")) for n, x in layers.items()]
        return InitializationSummary(rows, float("nan"), time.perf_counter() - start)

    variant = _variant(model, adapter_name)
    loss, count = float("nan"), 1
    if variant in ("random", ZERO_LEFT):
        found = {
            slot: _frames(_shape_only(layer, adapter_name), layer.r[adapter_name], "random", generator)
            for slot, layer in _by_matrix(layers).items()
        }
    else:
        with torch.random.fork_rng(devices=[]):  # a shuffling DataLoader draws from the global state
            first = _first(batches, num_batches)
            count = len(first)
            found, loss = _frames_from_gradient(model, layers, adapter_name, variant, first, loss_fn, generator)
    for name, layer in layers.items():
        frames = [found[slot] for slot in layer.matrix_names(name)]
        left, right = layer.stacked([x.left for x in frames]), layer.stacked([x.right for x in frames])
        layer.set_frames(adapter_name, left, right)
    share_first(factor for layer in layers.values() for factor in layer.factors(adapter_name))
    rows = [
        LayerInitialization(slot, layer.r[adapter_name], found[slot].gradient_norm / count, found[slot].captured)
        for slot, layer in _by_matrix(layers).items()
    ]
    return InitializationSummary(rows, loss, time.perf_counter() - start)


@torch.no_grad()
def save_subspaces(model: nn.Module, path: str | os.PathLike[str], *, adapter_name: str = "default") -> None:
    """Write the current U and V of every layer to a safetensors file, for ``initialize_deeplora_weights(subspaces=…)``.

    Call it right after initialization: training moves the frames.
    """
    tensors = {}
    for name, layer in layers_with(model, adapter_name).items():
        factors = layer.factors(adapter_name)
        with gathered(factors):
            tensors[f"{name}.left"], tensors[f"{name}.right"] = factors.left.clone(), factors.right.mT.clone()
    if is_first_process():
        save_tensors(tensors, Path(path), kind="deeplora-subspaces")


def _frames_from_gradient(
    model: nn.Module,
    layers: dict[str, DeepLoraLayer],
    adapter_name: str,
    variant: str,
    batches: list[Any],
    loss_fn: Loss | None,
    generator: torch.Generator,
) -> tuple[dict[str, InvariantSubspaces], float]:
    slots = _by_matrix(layers)
    found: dict[str, InvariantSubspaces] = {}
    running: dict[str, OuterProduct] = {}
    problems: dict[str, str] = {}
    # Seeds per layer, not one stream: the frames must not depend on the order in which backward reaches the layers.
    seeds = dict(zip(slots, torch.randint(2**62, (len(slots),), generator=generator).tolist(), strict=True))
    is_last = False

    def consume(name: str, gradient: LayerGradient) -> None:
        operator = _plus(running.pop(name, None), gradient)
        local = torch.Generator().manual_seed(seeds[name])
        width = slots[name].r[adapter_name]
        try:
            if is_last:
                found[name] = _frames(operator, width, variant, local)
            else:
                running[name] = _recompressed(operator, width, local)
        except ValueError as error:
            problems[name] = str(error)

    capture = GradientCapture(layers, consume)
    total = 0.0
    with unadapted(model, layers):
        for number, batch in enumerate(batches, start=1):
            is_last = number == len(batches)
            on_device = to_device(batch, next(model.parameters()).device)
            total += capture.run(partial(_loss, model, on_device, loss_fn))
        for name in list(running):  # reached by an earlier batch, not by the last
            found[name] = _frames(running[name], slots[name].r[adapter_name], variant, generator)
    missing = [name for name in slots if name not in found and name not in problems]
    _refuse(problems, [])
    if all(frames.gradient_norm == 0 for frames in found.values()):
        _refuse(dict.fromkeys(found, "its gradient is zero"), missing)
    _refuse({}, [name for name in missing if name in capture.with_rows])
    for name in missing:  # no row went through: an expert that nothing was sent to
        found[name] = _frames(_shape_only(slots[name], adapter_name), slots[name].r[adapter_name], variant, generator)
    return found, total / len(batches)


def _by_matrix(layers: dict[str, DeepLoraLayer]) -> dict[str, DeepLoraLayer]:
    """Every matrix that gets frames, by name: one a layer, or one an expert."""
    return {slot: layer for name, layer in layers.items() for slot in layer.matrix_names(name)}


def _frames(gradient: MatrixOperator, width: int, variant: str, generator: torch.Generator) -> InvariantSubspaces:
    """Random ones where a gradient is asked for and zero."""
    if variant != "random" and _is_zero(gradient):
        return replace(_frames(gradient, width, "random", generator), gradient_norm=0.0)
    directions = (width + 1) // 2 if variant == "compressed" else width
    return invariant_subspaces(gradient, directions, variant=variant, width=width, generator=generator)  # type: ignore[arg-type]


def _is_zero(gradient: MatrixOperator) -> bool:
    """Cheaper than its norm, which costs as much as the frames."""
    parts = (gradient.left, gradient.right) if isinstance(gradient, OuterProduct) else (gradient.matrix,)  # type: ignore[attr-defined]
    return not all(bool(part.any()) for part in parts)


def _plus(running: OuterProduct | None, gradient: LayerGradient) -> MatrixOperator:
    operator = gradient.operator()
    if operator is None:
        raise RuntimeError("a layer was reported without a gradient; please file a bug")
    if running is None:
        return operator
    if isinstance(operator, DenseMatrix):
        operator.matrix.addmm_(running.left.mT, running.right)
        return operator
    return OuterProduct(torch.cat([running.left, operator.left]), torch.cat([running.right, operator.right]))  # type: ignore[attr-defined]


def _recompressed(operator: MatrixOperator, width: int, generator: torch.Generator) -> OuterProduct:
    kept = min(max(2 * width, 32), *operator.shape)
    svd = truncated_svd(operator, kept, generator=generator, estimate_error=False)
    return OuterProduct((svd.U * svd.S).mT, svd.Vh)


def _refuse(problems: dict[str, str], unreached: list[str]) -> None:
    if unreached:
        raise ValueError(
            f"the loss does not depend on {_names(unreached)}: their gradient is zero. Leave them out with "
            "exclude_modules (a pooler that the loss does not use, for example), or pass a loss_fn that uses them"
        )
    if problems:
        name, reason = next(iter(problems.items()))
        raise ValueError(
            f"cannot place the adapter of {_names(list(problems))}: {reason} ({name}). A zero gradient comes from a "
            "loss already at its minimum or a layer that is switched off; a non-finite one from a bad batch or fp16 "
            "overflow: try another batch or bfloat16"
        )


def _names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, DeepLoraLayer]:
    """Name in the base model → layer, of all layers with this adapter; an error if there are none or it is merged."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DeepLoraLayer)}
    here = {name: layer for name, layer in layers.items() if adapter_name in layer.deeplora_left}
    if not layers:
        raise ValueError("the model has no Deep LoRA layers; wrap it first: get_peft_model(model, DeepLoraConfig(...))")
    if not here:
        known = sorted({key for layer in layers.values() for key in layer.deeplora_left})
        raise ValueError(f"no adapter named {adapter_name!r}; this model has {', '.join(known)}")
    if any(layer.merged for layer in here.values()):
        raise ValueError("the adapter is merged into the base weights; call unmerge_adapter() before initializing it")
    return {layer.name_in_model(name.removeprefix("base_model.model.")): layer for name, layer in here.items()}


def require_writable_factors(layers: dict[str, DeepLoraLayer], adapter_name: str) -> None:
    """Refuse an adapter that FSDP has sharded: see :func:`rankwise.adapters.sharded_weights.require_writable`."""
    for name, layer in layers.items():
        shape = (*layer.experts, layer.out_features, layer.r[adapter_name])
        require_writable(name, layer.factors(adapter_name).left, shape)


def _variant(model: nn.Module, adapter_name: str) -> str:
    configs = getattr(model, "peft_config", None)
    if configs is None:
        raise ValueError(
            "the adapter's settings are not on this model; give the model inside that has peft_config (of a "
            "SentenceTransformer, model.transformers_model)"
        )
    return configs[adapter_name].variant


def _shape_only(layer: DeepLoraLayer, adapter_name: str) -> OuterProduct:
    """A zero operator of the layer's shape: the random variant asks only for sizes."""
    left = layer.factors(adapter_name).left
    empty = left.new_zeros(0, dtype=compute_dtype(left.dtype))
    return OuterProduct(empty.new_zeros(0, layer.out_features), empty.new_zeros(0, layer.in_features))


def _first(batches: Iterable[Any] | None, num_batches: int) -> list[Any]:
    if num_batches < 1:
        raise ValueError(f"num_batches must be at least 1, got {num_batches}")
    if isinstance(batches, Mapping | Tensor):
        raise ValueError("batches must be an iterable of batches; wrap a single one in a list: [batch]")
    first = list(itertools.islice(batches, num_batches)) if batches is not None else []
    if not first:
        raise ValueError(
            "this variant places U and V from a gradient and needs at least one batch: pass an iterable of dicts of "
            "tensors (a DataLoader does), or use DeepLoraConfig(variant='zero-left')"
        )
    return first


def _loss(model: nn.Module, batch: Any, loss_fn: Loss | None) -> Tensor:
    if loss_fn is not None:
        return loss_fn(model, batch)
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"the default loss calls model(**batch) and needs dicts of tensors, got {type(batch).__name__}; "
            "pass loss_fn=lambda model, batch: ..."
        )
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError("model(**batch) returned no .loss; add labels to the batch or pass a loss_fn")
    return loss


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch's tensors on the device, detached."""
    if isinstance(batch, Tensor):
        return batch.detach().to(device)  # a batch is data: no gradient may reach it
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _load_subspaces(layers: dict[str, DeepLoraLayer], adapter_name: str, path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"no subspace file at {path}; write one with save_subspaces(model, path)")
    tensors = read_tensors(path)
    frames = {}
    for name, layer in layers.items():
        width = layer.r[adapter_name]
        sizes = {"left": layer.out_features, "right": layer.in_features}
        expected = {side: (*layer.experts, size, width) for side, size in sizes.items()}
        for side, shape in expected.items():
            got = tensors.get(f"{name}.{side}")
            if got is None or tuple(got.shape) != shape:
                found = "nothing" if got is None else f"shape {tuple(got.shape)}"
                raise ValueError(f"{path} does not fit: expected {name}.{side} of shape {shape}, found {found}")
            if not bool(torch.isfinite(got).all()):
                raise ValueError(f"{path} holds NaN or infinite numbers in {name}.{side}; write it again")
        frames[name] = (tensors[f"{name}.left"], tensors[f"{name}.right"])
    for name, (left, right) in frames.items():
        layers[name].set_frames(adapter_name, left, right)
