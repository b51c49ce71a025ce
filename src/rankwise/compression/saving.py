"""A factorized model on disk: what stands where is written down beside the tensors, and built again before they are read.

Of a transformers model ``config.json`` carries the list of low-rank layers under "rankwise", so that ``model.save_pretrained``
alone is enough; of any other model ``factorization.json`` does. transformers itself does not know the layers: its own
``from_pretrained`` would put dense layers with random weights in their places (and warn of missing and unexpected keys).
:func:`load_factorized` is the way back.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rankwise.compression.low_rank_layers import LowRankConv2d, LowRankLinear
from rankwise.compression.model_layers import (
    ConvolutionMatrix,
    LinearMatrix,
    MatrixLayer,
    TransposedMatrix,
    replace_layer,
)
from rankwise.files import replacing_folder, save_tensors, write_json
from rankwise.model_structure import conv1d_types

FORMAT_VERSION = 1
_KEY, _OWN_CONFIG, _CONFIG, _WEIGHTS = "rankwise", "factorization.json", "config.json", "model.safetensors"

Description = dict[str, Any]


def record_layers(model: nn.Module) -> None:
    """Write the low-rank layers of a transformers model into its config, where ``save_pretrained`` takes them from."""
    config = getattr(model, "config", None)
    if hasattr(model, "save_pretrained") and config is not None:
        setattr(config, _KEY, describe_layers(model))


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


def save_factorized(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a factorized model into a new folder, whole or not at all.

    A transformers model goes through its own ``save_pretrained`` (config.json and safetensors); any other becomes
    factorization.json and model.safetensors with its parameters and buffers, shared ones once.

    Args:
        model: after :func:`factorize_model` and its kin.
        folder: to create.

    Raises:
        ValueError: the folder exists and is not empty, or cannot be made; the model has no low-rank layer; it holds an adapter,
            of which ``save_pretrained`` would write nothing else.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from rankwise.compression import factorize_model, load_factorized, save_factorized
        >>> build = lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> model = build()
        >>> _ = factorize_model(model, ranks={"0": 4})
        >>> folder = tempfile.mkdtemp()
        >>> save_factorized(model, folder)
        >>> load_factorized(folder, build())[0].rank
        4
    """
    description = describe_layers(model)
    if not description["low_rank_layers"]:
        raise ValueError(
            "the model has no low-rank layer; call factorize_model first, or save it as you otherwise would"
        )
    record_layers(model)
    save: Any = getattr(model, "save_pretrained", None)
    try:
        with replacing_folder(Path(folder)) as temporary:
            if save is not None:
                save(temporary)
                if not ((temporary / _CONFIG).is_file() and any(temporary.glob("model*.safetensors"))):
                    raise ValueError(
                        f"save_pretrained of {type(model).__name__} wrote no {_CONFIG} with a model's safetensors; if it holds "
                        "an adapter, merge that first (merge_and_unload of peft)"
                    )
            else:
                save_tensors(_own_tensors(model), temporary / _WEIGHTS, kind="factorized-model")
                write_json(temporary / _OWN_CONFIG, description)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ValueError(f"cannot make the folder {folder}: {error.strerror}; choose another") from None


def load_factorized(folder: str | os.PathLike[str], model: nn.Module | None = None, **options: Any) -> nn.Module:
    """A model that :func:`save_factorized`, or ``save_pretrained`` of a factorized transformers model, wrote.

    Args:
        folder: with config.json, or factorization.json, and safetensors.
        model: for a model that is not from transformers, a dense one of the same architecture; its layers are replaced and
            its tensors overwritten. For one from transformers leave it out: the class that the config names is built.
        options: of transformers' ``from_pretrained``, such as ``dtype`` and ``device_map``.

    Returns:
        The model, in eval mode; ``model`` itself where one was given.

    Raises:
        ValueError: missing, damaged or foreign files; tensors that are missing, left over or of other shapes; a model that
            does not fit, which is left as it was; a file of a newer rankwise; an option that transformers does not know.

    Example:
        See :func:`save_factorized`.

        >>> import tempfile
        >>> from rankwise.compression import load_factorized
        >>> load_factorized(tempfile.mkdtemp())
        Traceback (most recent call last):
            ...
        ValueError: ... holds no factorized model: it has neither config.json nor factorization.json
    """
    path = Path(folder)
    if (path / _OWN_CONFIG).is_file():
        if options:
            raise ValueError(f"{', '.join(options)}: such options go with a transformers model; {path} holds another")
        return _load_own(path, model)
    if not (path / _CONFIG).is_file():
        raise ValueError(f"{path} holds no factorized model: it has neither {_CONFIG} nor {_OWN_CONFIG}")
    if model is not None:
        raise ValueError(f"{path} holds a transformers model, which is built from its config; leave model out")
    return _load_pretrained(path, options)


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
    for name, source in _shared(layers):
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


def model_class(architectures: Any) -> Any:
    """The class of transformers that a config names first under "architectures"; None if it names no such class."""
    import transformers

    name = architectures[0] if isinstance(architectures, list) and architectures else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def reason_of(error: Exception) -> str:
    """What an error of transformers says first, which is where it says it; a heading with the line below it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def require_all_tensors(source: str | os.PathLike[str], report: Mapping[str, Any], *, left_over: bool) -> None:
    """Refuse what ``from_pretrained`` would fill in at random, by its ``output_loading_info``.

    Args:
        source: what the model was loaded from, for the message.
        report: with ``ignore_mismatched_sizes``, or else it would have raised a text of its own.
        left_over: whether tensors that the model has no place for are refused too.

    Raises:
        ValueError: tensors that are missing, of other shapes, or left over.
    """
    _require_none(source, "lack", report.get("missing_keys"))
    if left_over:
        _require_none(source, "have, unlike the model,", report.get("unexpected_keys"))
    other = [(name, tuple(found), tuple(wanted)) for name, found, wanted in report.get("mismatched_keys") or ()]
    _require_none(source, "have in another shape", [f"{name} ({a} instead of {b})" for name, a, b in other])


def _require_none(source: str | os.PathLike[str], what: str, names: Iterable[str] | None) -> None:
    found = sorted(names or ())
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"the tensors in {source} {what} {', '.join(found[:3])}{more}; the files do not belong together, or one is damaged"
        )


def _shared(layers: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
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


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); it may be cut short: copy or save it again") from None


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each under its first name only."""
    kept = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {name: tensor for name, tensor in model.state_dict().items() if name in kept}


def _load_own(path: Path, model: nn.Module | None) -> nn.Module:
    description = described_layers(_read_json(path / _OWN_CONFIG), path / _OWN_CONFIG)
    if model is None:
        raise ValueError(
            f"{path} holds a model that is not from transformers; pass a dense one of its architecture as model"
        )
    file = path / _WEIGHTS
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is not a readable safetensors file ({error}); it may be cut short: copy or save it again"
        ) from None
    layers = description["low_rank_layers"]
    before = {name: module for name, module in model.named_modules(remove_duplicate=False) if name in layers}
    try:
        put_layers(model, description)
        wanted = _own_tensors(model)
        _require_same_tensors(path, {n: t.shape for n, t in wanted.items()}, {n: t.shape for n, t in tensors.items()})
    except Exception:
        for name, module in before.items():  # it is somebody's model, trained perhaps
            replace_layer(model, [name], module)
        raise
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])
    return model.eval()


def _require_same_tensors(path: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    both = wanted.keys() & found.keys()
    report = {
        "missing_keys": wanted.keys() - found.keys(),
        "unexpected_keys": found.keys() - wanted.keys(),
        "mismatched_keys": [(name, found[name], wanted[name]) for name in both if wanted[name] != found[name]],
    }
    require_all_tensors(path, report, left_over=True)


def _load_pretrained(path: Path, options: dict[str, Any]) -> nn.Module:
    config_file = path / _CONFIG
    saved = _read_json(config_file)
    description = described_layers(saved.get(_KEY) if isinstance(saved, dict) else None, config_file)
    named = saved.get("architectures")
    base: Any = model_class(named)
    if base is None:
        raise ValueError(f"{config_file} names the architectures {named!r}, of which transformers has no model")

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        super(built, self).__init__(config, *args, **kwargs)
        put_layers(self, description)
        # what from_pretrained ties once it has read the tensors
        self.all_tied_weights_keys |= {
            f"{n}.right": f"{source}.right" for n, source in _shared(description["low_rank_layers"])
        }

    # built like the original, with its layers replaced before from_pretrained reads the tensors: sharded files, dtypes and
    # devices are then transformers' business
    built: Any = type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})
    try:
        model, report = built.from_pretrained(
            path,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # and refused below, by name
            **options,
        )
    except (ValueError, MemoryError):  # of put_layers, in its own words
        raise
    except Exception as error:  # a config may hold anything, and whatever reads it may stumble over it anyhow
        raise ValueError(f"cannot load the model in {path}: {reason_of(error)}") from None
    require_all_tensors(path, report, left_over=True)
    model.__class__ = base
    return model.eval()
