"""Which layers of a model are matrices that can be factorized, and why the others are not."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rankwise.compression.low_rank_layers import LowRankConv2d, LowRankLinear
from rankwise.model_structure import Names, conv1d_types, is_called, output_layer


class MatrixLayer(ABC):
    """A layer as an m × n matrix W that maps rows of inputs to rows of outputs.

    Attributes:
        module: the layer.
        places: its names in the model; several where it is used at several places.
    """

    kind: str

    def __init__(self, module: Any, places: tuple[str, ...]):
        self.module, self.places = module, places

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.places[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        m, *rest = self.module.weight.shape
        return int(m), math.prod(rest)

    @abstractmethod
    def matrix(self) -> Tensor:
        """W, (m, n), in the layer's dtype."""

    @abstractmethod
    def input_rows(self, x: Tensor) -> Tensor:
        """The inputs (…, n) of W among what the layer was called with."""

    @abstractmethod
    def skeleton(self, rank: int) -> nn.Module:
        """A low-rank layer for its place, at a random start."""

    @abstractmethod
    def from_factors(self, left: Tensor, right: Tensor) -> nn.Module:
        """The low-rank layer with the weight left·right, (m, k) and (k, n), and this layer's bias."""


class LinearMatrix(MatrixLayer):
    """``nn.Linear``: W is its weight."""

    kind = "linear"

    def matrix(self) -> Tensor:
        return self.module.weight.detach()

    def input_rows(self, x: Tensor) -> Tensor:
        return x

    def skeleton(self, rank: int) -> nn.Module:
        (m, n), weight = self.shape, self.module.weight
        return LowRankLinear(n, m, rank, self.module.bias is not None, weight.device, weight.dtype)

    def from_factors(self, left: Tensor, right: Tensor) -> nn.Module:
        return LowRankLinear.from_factors(left.contiguous(), right.contiguous(), self.module.bias)


class TransposedMatrix(LinearMatrix):
    """transformers' ``Conv1D``, a linear layer whose weight is stored as Wᵀ."""

    @property
    def shape(self) -> tuple[int, int]:
        n, m = self.module.weight.shape
        return int(m), int(n)

    def matrix(self) -> Tensor:
        return self.module.weight.detach().mT


class ConvolutionMatrix(MatrixLayer):
    """An ungrouped ``nn.Conv2d``: W is the kernel as out × in·k·k, its inputs are patches."""

    kind = "conv2d"

    def matrix(self) -> Tensor:
        return self.module.weight.detach().flatten(1)

    def input_rows(self, x: Tensor) -> Tensor:
        c: nn.Conv2d = self.module
        mode = "constant" if c.padding_mode == "zeros" else c.padding_mode
        # the layer's own padding, also where it is given as "same"
        padded = nn.functional.pad(x, c._reversed_padding_repeated_twice, mode=mode)
        return nn.functional.unfold(padded, c.kernel_size, c.dilation, 0, c.stride).mT

    def skeleton(self, rank: int) -> nn.Module:
        return LowRankConv2d.like(self.module, rank)

    def from_factors(self, left: Tensor, right: Tensor) -> nn.Module:
        pair = LowRankConv2d.like(self.module, left.shape[1])
        with torch.no_grad():
            pair.right.weight.copy_(right.reshape(pair.right.weight.shape))
            pair.left.weight.copy_(left[:, :, None, None])
            if pair.left.bias is not None:
                pair.left.bias.copy_(self.module.bias)
        return pair


@dataclass(frozen=True)
class FoundLayers:
    """What :func:`layers_of` finds: the layers in the model's order, and for those left alone the reason."""

    layers: list[MatrixLayer]
    skipped: dict[str, str]


def layers_of(model: nn.Module, include: Names | None = None, exclude: Names | None = None) -> FoundLayers:
    """The linear layers, ``Conv1D`` and ungrouped 2-d convolutions of a model, once each.

    Left alone, with a reason: output heads (what predicts tokens, and what lies outside the body of a transformers model)
    unless ``include`` names them; weights that modules share; grouped, 1-d and 3-d convolutions; subclasses of
    ``nn.Linear``, which may use their weight in ways of their own; layers that are low-rank already or carry an adapter.

    Args:
        model: any module, on the meta device too.
        include: only these: a regex that a whole name must match, or a list of names or their ends, of layers or of modules
            around them, as PEFT's ``target_modules``.
        exclude: not these; written alike.

    Raises:
        ValueError: names that match nothing that can be factorized; a quantized model.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "the model is quantized, and quantized weights cannot be factorized; load it without quantization"
        )
    if include is not None and not include:
        raise ValueError(f"include={include!r} names no layer; leave it out for all of them")
    heads = _heads(model)
    holders = _holders(model)
    layers: list[MatrixLayer] = []
    skipped: dict[str, str] = {}
    for places, module in _modules_by_place(model):
        kind, reason = _kind_of(module, places)
        if kind is None and reason is None:
            continue
        if include is not None and not is_named(places, include):
            continue
        if exclude is not None and is_named(places, exclude):
            skipped[places[0]] = "named in exclude"
            continue
        reason = reason or _shared(module, holders)
        if reason is None and include is None and module in heads:
            reason = "an output head; name it in include to factorize it"
        if reason is not None:
            skipped[places[0]] = reason
        elif kind is not None:
            layers.append(kind(module, places))
    _check_names(model, "include", include, layers, skipped)
    _check_names(model, "exclude", exclude, None, skipped)
    if not layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(f"no layer of this model can be factorized ({why or 'it has no linear layer or convolution'})")
    return FoundLayers(layers, skipped)


def require_values(layers: Iterable[MatrixLayer]) -> None:
    """Refuse weights that have a shape and no values."""
    empty = next((layer.name for layer in layers if layer.module.weight.is_meta), None)
    if empty is not None:
        raise ValueError(
            f"the weight of {empty} is on the meta device, where it has no values; load the whole model into memory first"
        )


def replace_layer(model: nn.Module, places: Iterable[str], layer: nn.Module) -> None:
    """Put a layer at all of these places, in the mode of the one that was there."""
    for place in places:
        parent_name, _, child = place.rpartition(".")
        parent = model.get_submodule(parent_name)
        layer.train(getattr(parent, child).training)
        setattr(parent, child, layer)


def _modules_by_place(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Module]]:
    places: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:  # the model itself has no place to put another in
            places.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    return [(tuple(places[key]), module) for key, module in modules.items()]


def _kind_of(module: nn.Module, places: tuple[str, ...]) -> tuple[type[MatrixLayer] | None, str | None]:
    """How the module is a matrix, or why one that looks like it is not taken; (None, None) for everything else."""
    if isinstance(module, LowRankLinear | LowRankConv2d):
        return None, "low-rank already"
    if "base_layer" in places[0].split("."):
        return None, "it carries an adapter; merge or unload that first"
    if isinstance(module, (nn.Linear, _ConvNd, *conv1d_types())) and torch.is_complex(cast(Tensor, module.weight)):
        return None, "its weight is complex"
    if isinstance(module, nn.Linear):
        if _is_quantized(module):
            raise ValueError(
                f"the weight of {places[0]} is quantized and cannot be factorized; load it without quantization"
            )
        return (
            (LinearMatrix, None)
            if type(module) is nn.Linear
            else (None, f"a subclass of nn.Linear, {type(module).__name__}")
        )
    if isinstance(module, conv1d_types()):
        return TransposedMatrix, None
    if isinstance(module, _ConvNd):
        if module.groups != 1:
            return None, f"a convolution of {module.groups} groups is as many small matrices"
        plain = type(module) is nn.Conv2d
        return (
            (ConvolutionMatrix, None) if plain else (None, f"only nn.Conv2d is factorized, not {type(module).__name__}")
        )
    return None, None


def _is_quantized(module: nn.Linear) -> bool:
    weight = module.weight
    # bitsandbytes: a subclass of nn.Linear with packed integers; torchao: an nn.Linear whose weight is another kind of tensor
    plain = type(weight.data) is Tensor
    return not (plain and weight.is_floating_point() and weight.dtype.itemsize > 1)


def _holders(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter."""
    count: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count


def _shared(module: nn.Module, holders: dict[int, int]) -> str | None:
    """A weight of several modules changes with none of them alone."""
    if holders.get(id(module.weight), 0) > 1:
        return "its weight is another module's too (tied); give it a copy of its own to factorize it"
    return None


def _heads(model: nn.Module) -> set[nn.Module]:
    """What predicts tokens with all that stands around it, and other heads on the body of a transformers model."""
    heads: set[nn.Module] = set()
    for module in model.modules():
        if not hasattr(module, "base_model_prefix"):
            continue
        heads |= set(module.modules()) - set(getattr(module, "base_model", module).modules())
        output = output_layer(module)
        heads |= set() if output is None else set(output.modules())
    return heads


def is_named(places: Iterable[str], pattern: Names) -> bool:
    """Whether a pattern picks one of these places.

    Raises:
        ValueError: a text that is no regular expression.
    """
    try:
        return any(is_called(place, pattern) for place in places)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None


def _check_names(
    model: nn.Module, option: str, names: Names | None, layers: list[MatrixLayer] | None, skipped: dict[str, str]
) -> None:
    """Every name has to pick something: a misspelt one would silently choose other layers."""
    if names is None:
        return
    for pattern in [names] if isinstance(names, str) else [[name] for name in names]:
        if layers is None:
            picked = any(is_named((name,), pattern) for name, _ in model.named_modules(remove_duplicate=False) if name)
        else:
            picked = any(is_named(layer.places, pattern) for layer in layers)
        if not picked:
            reasons = [f"{name} is left alone: {why}" for name, why in skipped.items() if is_named((name,), pattern)]
            said = "; ".join(reasons[:2]) or (
                "a text is a regular expression for a whole name, a list holds names or their ends"
            )
            raise ValueError(f"{option}={pattern!r} names no layer that can be factorized ({said})")
