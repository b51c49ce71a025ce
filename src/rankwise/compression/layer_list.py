"""Where low-rank layers stand in a model, and which share a factor: as plain JSON values, and back into a model."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rankwise.compression.low_rank_layers import LowRankConv2d, LowRankLinear
from rankwise.compression.model_layers import ConvolutionMatrix, LinearMatrix, MatrixLayer, TransposedMatrix
from rankwise.model_structure import conv1d_types

FORMAT_VERSION = 1
CONFIG_KEY = "rankwise"  # of a transformers model's config

Description = dict[str, Any]


def record_layers(model: nn.Module) -> None:
    """Write the low-rank layers of a transformers model into its config, where ``save_pretrained`` takes them from."""
    config = getattr(model, "config", None)
    if hasattr(model, "save_pretrained") and config is not None:
        setattr(config, CONFIG_KEY, describe_layers(model))


def describe_layers(model: nn.Module) -> Description:
    """Where low-rank layers stand, of what rank, and which share their ``right``, as plain JSON values."""
    layers: dict[str, dict[str, Any]] = {}
    owner: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LowRankConv2d):
            layers[name] = {"rank": module.rank}
        elif isinstance(module, LowRankLinear):
            first = owner.setdefault(id(module.right), name)
            shared = first != name and model.get_submodule(first) is not module
            layers[name] = {"rank": module.rank} | ({"right_of": first} if shared else {})
    return {"format_version": FORMAT_VERSION, "low_rank_layers": layers}


def share_right(layer: LowRankLinear, with_layer: LowRankLinear) -> None:
    """Let a layer use another's ``right``, as one parameter that is trained, moved and stored once."""
    layer.right = with_layer.right
    # transformers asks every module which of its parameters are another's before it saves
    layer._tied_weights_keys = {"right": "right"}  # type: ignore[assignment]


def put_layers(model: nn.Module, description: Description) -> None:
    """Put empty low-rank layers of the described ranks where they stand; the model may be on the meta device.

    Raises:
        ValueError: a layer that the model does not have, or that cannot have this rank.
    """
    layers = description["low_rank_layers"]
    new: dict[int, nn.Module] = {}  # a layer that is used at several places is one layer again
    for name, entry in layers.items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the model has no layer {name}; it is not of the architecture that was saved") from None
        kind = _matrix_kind(old)
        if kind is None and id(old) not in new:
            raise ValueError(f"{name} is a {type(old).__name__} in this model, which has no low-rank form")
        if kind is not None and id(old) not in new:
            try:
                new[id(old)] = kind(old, (name,)).skeleton(entry["rank"]).train(old.training)
            except ValueError as error:
                raise ValueError(f"{name}: {error}; the model is not of the architecture that was saved") from None
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new[id(old)])
    for name, source in shared_factors(layers):
        layer, owner = model.get_submodule(name), model.get_submodule(source)
        if not (isinstance(layer, LowRankLinear) and isinstance(owner, LowRankLinear)):
            raise ValueError(f"{name} and {source} are no linear layers in this model and cannot share a factor")
        if layer.right.shape != owner.right.shape:
            raise ValueError(f"{name} cannot share the factor of {source}: {tuple(layer.right.shape)} is not its shape")
        share_right(layer, owner)


def described_layers(found: Any, file: Path) -> Description:
    """What the "rankwise" of a config.json, or factorization.json, says of the layers, if it is of the form written here.

    Raises:
        ValueError: it is of another form, or of a newer rankwise.
    """
    if not isinstance(found, dict) or "low_rank_layers" not in found:
        raise ValueError(
            f"{file} lists no low-rank layers: the model in it is a dense one, or was not saved by rankwise"
        )
    version = found.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {version!r}; this rankwise reads {FORMAT_VERSION}: install a newer one"
        )
    layers = found["low_rank_layers"]
    fits = isinstance(layers, dict) and all(isinstance(entry, dict) for entry in layers.values())
    fits = fits and all(
        isinstance(entry.get("rank"), int) and ("right_of" not in entry or _owns(layers, entry["right_of"]))
        for entry in layers.values()
    )
    if not fits:
        raise ValueError(
            f"{file} is damaged: its low_rank_layers are no list of layers with a rank; save the model again"
        )
    return found


def shared_factors(layers: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    """(layer, layer whose ``right`` it uses), of all that use another's."""
    return [(name, entry["right_of"]) for name, entry in layers.items() if "right_of" in entry]


def _matrix_kind(module: nn.Module) -> type[MatrixLayer] | None:
    if type(module) is nn.Linear:
        return LinearMatrix
    if isinstance(module, conv1d_types()):
        return TransposedMatrix
    return ConvolutionMatrix if type(module) is nn.Conv2d else None


def _owns(layers: Mapping[str, Mapping[str, Any]], name: Any) -> bool:
    """Whether there is such a layer, with a ``right`` of its own that others may share."""
    return isinstance(name, str) and name in layers and "right_of" not in layers[name]
