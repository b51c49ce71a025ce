"""A factorized model on disk: what stands where is written down beside the tensors, and built again before they are read.

Of a transformers model ``config.json`` carries the list of low-rank layers under "rankwise", so that ``model.save_pretrained``
alone is enough; of any other model ``factorization.json`` does. transformers itself does not know the layers: its own
``from_pretrained`` would put dense layers with random weights in their places (and warn of missing and unexpected keys).
:func:`load_factorized` is the way back.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rankwise.compression.layer_list import (
    CONFIG_KEY,
    describe_layers,
    described_layers,
    put_layers,
    record_layers,
    shared_factors,
)
from rankwise.compression.model_layers import replace_layer
from rankwise.compression.pretrained import model_class, reason_of, require_all_tensors
from rankwise.files import replacing_folder, save_tensors, write_json

_OWN_CONFIG, _CONFIG, _WEIGHTS = "factorization.json", "config.json", "model.safetensors"


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
    description = described_layers(saved.get(CONFIG_KEY) if isinstance(saved, dict) else None, config_file)
    named = saved.get("architectures")
    base: Any = model_class(named)
    if base is None:
        raise ValueError(f"{config_file} names the architectures {named!r}, of which transformers has no model")

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        super(built, self).__init__(config, *args, **kwargs)
        put_layers(self, description)
        # what from_pretrained ties once it has read the tensors
        self.all_tied_weights_keys |= {
            f"{n}.right": f"{source}.right" for n, source in shared_factors(description["low_rank_layers"])
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
