"""In what form moments rest between two steps: the algebra's own dtype, the parameter's, or eight bits."""

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

FORMS = ("wide", "parameter", "8-bit")
BLOCK = 256  # entries that share a scale: bitsandbytes' own choice for optimizers
SMALLEST = 4096  # smaller tensors stay wide, as in bitsandbytes: they weigh nothing, and norms' scales are sensitive


def check_form(form: str) -> None:
    """Refuse an unknown form, and 8-bit where bitsandbytes is missing: when the optimizer is made, not at its first step."""
    if form not in FORMS:
        raise ValueError(f"moments_in must be one of {', '.join(FORMS)}, got {form!r}")
    if form == "8-bit":
        _bitsandbytes()


def _bitsandbytes() -> ModuleType:
    # imported where it is asked for: an optional package, slow to load
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as missing:
        raise ValueError(
            'moments_in="8-bit" quantizes with bitsandbytes, which is not installed: pip install "rankwise[bitsandbytes]", or '
            'choose "parameter"'
        ) from missing


@cache
def _codebook(signed: bool, device: torch.device) -> Tensor:
    return _bitsandbytes().create_dynamic_map(signed=signed).to(device)


def stored(name: str, values: Tensor, form: str, parameter_dtype: torch.dtype) -> dict[str, Tensor]:
    """What goes into the state for one moment; under 8-bit also ``{name}_scales``, one a block of 256 entries."""
    if form == "parameter":
        return {name: values.to(parameter_dtype)}
    if form == "wide" or values.numel() < SMALLEST:
        return {name: values}
    code = _codebook(name == "momentum", values.device)
    quantized, parts = _bitsandbytes().quantize_blockwise(values.float().contiguous(), code=code, blocksize=BLOCK)
    return {name: quantized, f"{name}_scales": parts.absmax}


def opened(name: str, state: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The moment as the algebra wants it: the stored tensor itself where that has the dtype."""
    kept: Tensor = state[name]
    if kept.dtype != torch.uint8:
        return kept.to(dtype)
    code = _codebook(name == "momentum", kept.device)
    wide: Tensor = _bitsandbytes().dequantize_blockwise(
        kept, absmax=state[f"{name}_scales"], code=code, blocksize=BLOCK
    )
    return wide.to(dtype)
