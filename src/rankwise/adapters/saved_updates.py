"""Saved adapters as what they add to a weight: ΔW = B·A a layer, whether Deep LoRA or LoRA saved it."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankwise.adapters.config import DeepLoraConfig
from rankwise.adapters.layers import scaled_left, stored_scale
from rankwise.spectral.precision import compute_dtype, require_finite

PREFIX = "base_model.model."
_DEEP = re.compile(r"(?:base_model\.model\.)?(.*)\.deeplora_(left|inner|right)\.weight")
_LORA = re.compile(r"(?:base_model\.model\.)?(.*)\.lora_(?:(embedding_[AB])|([AB])\.weight)")


@dataclass(frozen=True)
class Update:
    """ΔW = B·A of one layer, both in float32 or better.

    Attributes:
        B: (m, r), singular values included.
        A: (r, n).
        width: r as trained.
        layout: {} of a linear layer, else what :func:`rankwise.adapters.layers.layout` says of it.
        dtypes: of the two sides as saved.
    """

    B: Float[Tensor, "m r"]
    A: Float[Tensor, "r n"]
    width: int
    layout: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's updates by layer, its other tensors (heads, biases) by key, and its settings."""

    config: DeepLoraConfig | LoraConfig
    updates: dict[str, Update]
    others: dict[str, Tensor]
    bytes: int


def read_adapter_folder(source: str | Path) -> SavedAdapter:
    """The adapter that PEFT saved in a folder; the base model is not needed.

    Raises:
        ValueError: the folder is missing, incomplete, cut short, or holds another kind of adapter.
    """
    folder = Path(source)
    saved, weights_file = _settings(folder), folder / SAFETENSORS_WEIGHTS_NAME
    kind = saved["peft_type"]
    config_class = DeepLoraConfig if kind == "DEEPLORA" else LoraConfig
    known = config_class.__dataclass_fields__
    try:
        config = config_class(**{key: value for key, value in saved.items() if key in known})
        with safe_open(weights_file, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"cannot read the adapter in {folder}: {error}; it may be cut short, save it again") from error
    return updates_of(state, config)


def kind_of(source: str | Path) -> str:
    """PEFT's name of the kind of adapter in a folder: "DEEPLORA" or "LORA".

    Raises:
        ValueError: as :func:`read_adapter_folder`.
    """
    return str(_settings(Path(source))["peft_type"])


def _settings(folder: Path) -> dict[str, Any]:
    config_file, weights_file = folder / CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME
    for file in (config_file, weights_file):
        if not file.is_file():
            raise ValueError(f"{folder} is no saved adapter: it has no {file.name}")
    try:
        saved = json.loads(config_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{config_file} is not valid JSON ({error})") from error
    kind = saved.get("peft_type") if isinstance(saved, dict) else None
    if kind not in ("DEEPLORA", "LORA"):
        raise ValueError(f"{folder} holds a {kind or 'nameless'} adapter; only Deep LoRA and LoRA adapters are read")
    return saved


def updates_of(state: Mapping[str, Tensor], config: DeepLoraConfig | LoraConfig) -> SavedAdapter:
    """The updates in a state dict as PEFT saves it.

    Raises:
        ValueError: factors are missing, do not fit each other or are not finite, or the adapter is more than ΔW = B·A.
    """
    deep = isinstance(config, DeepLoraConfig)
    parts, others = _parts(state, _DEEP if deep else _LORA)
    if not parts:
        raise ValueError(
            f"the adapter holds no {'Deep LoRA' if deep else 'LoRA'} factors: was it saved from the right model?"
        )
    if isinstance(config, DeepLoraConfig):
        updates = {name: _deep_update(name, part, config) for name, part in parts.items()}
    else:
        _require_plain(config, state)
        updates = {name: _lora_update(name, part, config) for name, part in parts.items()}
    for name, update in updates.items():
        require_finite(update.B, f"the adapter of {name}")
        require_finite(update.A, f"the adapter of {name}")
    return SavedAdapter(config, updates, others, sum(value.nbytes for value in state.values()))


def settings_as_json(config: DeepLoraConfig | LoraConfig) -> dict[str, Any]:
    """What ``adapter_config.json`` holds, with its sets as sorted lists."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def _parts(
    state: Mapping[str, Tensor], pattern: re.Pattern[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Factors by layer and role, and everything else under its own key."""
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, value in state.items():
        match = pattern.fullmatch(key)
        if match:
            role = next(group for group in match.groups()[1:] if group)
            parts.setdefault(match[1], {})[role] = value.detach()
        else:
            others[key if key.startswith(PREFIX) else PREFIX + key] = value
    return parts, others


def _deep_update(name: str, part: dict[str, Tensor], config: DeepLoraConfig) -> Update:
    if len(part) < 3:
        raise ValueError(f"the adapter of {name} lacks some of its factors; save it again")
    left, inner, right = part["left"], part["inner"], part["right"]
    shapes = [tuple(factor.shape) for factor in (left, inner, right)]
    if [len(shape) for shape in shapes] != [2, 3, 2] or {shapes[0][1], shapes[1][1], shapes[2][0]} != {shapes[1][2]}:
        raise ValueError(f"the factors of {name} do not fit each other (shapes {shapes}); save the adapter again")
    B = scaled_left(left, inner, stored_scale(config.init_scale, config.zero_left))
    A = right.to(compute_dtype(inner.dtype))
    layout = config.layouts.get(name, {})
    padding = layout.get("padding_idx")
    if padding is not None:
        A = A.clone()
        A[:, padding] = 0
    return Update(B, A, inner.shape[-1], layout, (left.dtype, right.dtype))


def _lora_update(name: str, part: dict[str, Tensor], config: LoraConfig) -> Update:
    embedding = "embedding_A" in part or "embedding_B" in part
    B, A = (part.get(f"embedding_{side}" if embedding else side) for side in ("B", "A"))
    if A is None or B is None:
        raise ValueError(f"the adapter of {name} lacks one of its factors; save it again")
    layout: dict[str, Any] = {"kind": "embedding"} if embedding else {}
    if A.ndim > 2:
        layout = {"kind": "convolution", "kernel": list(A.shape[1:])}
        A, B = A.flatten(1), B.flatten(1)
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"the factors of {name} do not fit each other (shapes {tuple(B.shape)}, {tuple(A.shape)}); save it again"
        )
    rank = int(_of_pattern(config.rank_pattern, name, config.r))
    if rank != A.shape[0]:
        raise ValueError(
            f"the settings say rank {rank} for {name}, its factors have {A.shape[0]}; save the adapter again"
        )
    alpha = float(_of_pattern(config.alpha_pattern, name, config.lora_alpha))
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    dtype = compute_dtype(B.dtype)
    return Update(scaling * B.to(dtype), A.to(dtype), rank, layout, (B.dtype, A.dtype))


def _of_pattern(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    return (pattern or {}).get(get_pattern_key(list(pattern or {}), name), default)


def _require_plain(config: LoraConfig, state: Mapping[str, Tensor]) -> None:
    """Refuse what is more than B·A: dropping it in silence would give another model."""
    more = [
        what
        for what, used in (
            ("DoRA's magnitudes", config.use_dora),
            ("biases of its own (lora_bias)", config.lora_bias),
            ("adapted parameters (target_parameters)", bool(config.target_parameters)),
            ("trained tokens (trainable_token_indices)", bool(config.trainable_token_indices)),
        )
        if used
    ]
    if more:
        raise ValueError(f"this LoRA adapter has {' and '.join(more)}, which no other adapter can hold")
    if any("lora_magnitude" in key for key in state):
        raise ValueError("this LoRA adapter has DoRA's magnitudes, which no other adapter can hold")
