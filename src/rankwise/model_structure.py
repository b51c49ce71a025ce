"""What every room that walks through a model asks of it: who is called what, and which layer is its output."""

import re
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

Names = str | Sequence[str]
"""As PEFT's ``target_modules``: a regex that a whole name must match, or a list of names or their ends."""


def is_called(name: str, pattern: Names) -> bool:
    """Whether PEFT's rule picks what has this dotted name, or a module around it.

    Raises:
        re.error: a text that is no regular expression.

    Example:
        >>> from rankwise.model_structure import is_called
        >>> [is_called("layers.0.mlp.up", pattern) for pattern in (["up"], ["layers.0"], r"layers\\.\\d", ["p"])]
        [True, True, True, False]
    """
    parts = name.split(".")
    paths = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    if isinstance(pattern, str):
        return any(re.fullmatch(pattern, path) for path in paths)
    return any(path == wanted or path.endswith(f".{wanted}") for path in paths for wanted in pattern)


def conv1d_types() -> tuple[type[nn.Module], ...]:
    """transformers' ``Conv1D``. Where there is one its module has been imported, so that transformers need not be here."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return () if loaded is None else (loaded.Conv1D,)


def output_layer(module: nn.Module) -> nn.Module | None:
    """The layer over tokens that a transformers model says it has."""
    find: Any = getattr(module, "get_output_embeddings", None)
    try:
        layer: nn.Module | None = None if find is None else find()
    except NotImplementedError:
        layer = None
    return layer
