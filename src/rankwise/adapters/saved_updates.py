"""Saved adapters as what they add to a weight: ΔW = B·A a layer, whether Deep LoRA or LoRA saved it."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
from rankwise.adapters.parameter_names import KIND as PARAMETER
from rankwise.adapters.parameter_names import names_in_files
from rankwise.spectral.precision import compute_dtype, require_finite

PREFIX = "base_model.model."
_DEEP = re.compile(r"(?:base_model\.model\.)?(.*)\.deeplora_(left|inner|right)\.weight")
_NULL = type(None)
_NAME_OF = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "an object",
}
_NUMBER, _TEXT, _NAMES, _PATTERN = (int, float), (str, _NULL), (list, str, _NULL), (dict, _NULL)
_TYPES: dict[str, tuple[type, ...]] = {  # of the settings that are used here or carried over
    "r": (int,), "inner_depth": (int,), "format_version": (int,),
    "init_scale": _NUMBER, "lora_alpha": _NUMBER, "dropout": _NUMBER, "direction_dropout": _NUMBER,
    "variant": (str,), "bias": (str,), "task_type": _TEXT, "base_model_name_or_path": _TEXT, "revision": _TEXT,
    "rank_pattern": _PATTERN, "alpha_pattern": _PATTERN, "layouts": (dict,), "auto_mapping": _PATTERN,
    "target_modules": _NAMES, "exclude_modules": _NAMES, "layers_pattern": _NAMES, "layers_to_transform": (list, int, _NULL),
    "modules_to_save": (list, _NULL), "target_parameters": (list, _NULL), "trainable_token_indices": (list, dict, _NULL),
    "fan_in_fan_out": (bool,), "use_rslora": (bool,), "use_dora": (bool,), "lora_bias": (bool,),
}  # fmt: skip
_LORA = re.compile(r"(?:base_model\.model\.)?(.*)\.lora_(?:(embedding_[AB])|([AB])\.weight)")


@dataclass(frozen=True)
class Update:
    """ΔW = B·A of one layer, both in float32 or better.

    Attributes:
        B: (m, r), singular values included; (e, m, r) for a stack of e experts.
        A: (r, n), or (e, r, n).
        width: r as trained.
        layout: {} of a linear layer, else what :func:`rankwise.adapters.layers.layout` says of it.
        dtypes: of the two sides as saved.
    """

    B: Float[Tensor, "*e m r"]
    A: Float[Tensor, "*e r n"]
    width: int
    layout: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)

    @property
    def stacked(self) -> bool:
        """Whether it is of several matrices."""
        return self.B.ndim == 3

    def matrices(self, name: str) -> "list[tuple[str, Update]]":
        """The update of every single matrix, under its name."""
        if not self.stacked:
            return [(name, self)]
        pairs = enumerate(zip(self.B, self.A, strict=True))
        return [(f"{name}[{expert}]", replace(self, B=B, A=A, layout={})) for expert, (B, A) in pairs]


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
    config_class = DeepLoraConfig if saved["peft_type"] == "DEEPLORA" else LoraConfig
    known = config_class.__dataclass_fields__  # settings that a later PEFT has added change nothing about ΔW = B·A
    try:
        config = config_class(**{key: value for key, value in saved.items() if key in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_NAME} does not describe an adapter: {error}") from error
    state = read_tensors(weights_file)
    try:
        return updates_of(state, config)
    except ValueError as error:
        raise ValueError(f"{weights_file} does not fit its {CONFIG_NAME}: {error}") from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ValueError: it is missing, cut short or damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is not a readable safetensors file ({error}); it may be cut short: copy or save it again"
        ) from error


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
    except (ValueError, RecursionError) as error:  # damaged text, numbers of thousands of digits, thousands of brackets
        raise ValueError(f"{config_file} is not valid JSON ({error})") from error
    kind = saved.get("peft_type") if isinstance(saved, dict) else None
    if kind not in ("DEEPLORA", "LORA"):
        raise ValueError(f"{folder} holds a {kind or 'nameless'} adapter; only Deep LoRA and LoRA adapters are read")
    for name, kinds in _TYPES.items():
        value = saved.get(name, kinds)
        if value is not kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            expected = " or ".join(
                _NAME_OF[kind] for kind in kinds if kind is not _NULL and not (kind is int and float in kinds)
            )
            raise ValueError(
                f"{config_file} does not describe an adapter: {name} must be {expected}, got {value!r:.80}"
            )
    return saved


def updates_of(state: Mapping[str, Tensor], config: DeepLoraConfig | LoraConfig) -> SavedAdapter:
    """The updates in a state dict as PEFT saves it.

    Raises:
        ValueError: factors are missing, do not fit each other or are not finite, or the adapter is more than ΔW = B·A.
    """
    for name, value in state.items():
        if not value.is_floating_point():
            raise ValueError(f"{name} holds {value.dtype} numbers; an adapter's are floating-point")
    deep = isinstance(config, DeepLoraConfig)
    parts, others = _parts(state, _DEEP if deep else _LORA)
    if not parts:
        raise ValueError(
            f"the adapter holds no {'Deep LoRA' if deep else 'LoRA'} factors: was it saved from the right model?"
        )
    if isinstance(config, DeepLoraConfig):
        _require_known_layouts(config.layouts)
        of_parameters = {stored: name for name, stored in names_in_files(config.layouts).items()}
        parts = {of_parameters.get(stored, stored): part for stored, part in parts.items()}
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
    layout = config.layouts.get(name, {})
    stack = (layout["experts"],) if layout.get("experts") else ()
    shapes = [tuple(factor.shape) for factor in (left, inner, right)]
    fits = [len(shape) for shape in shapes] == [2 + len(stack), 3 + len(stack), 2 + len(stack)]
    if fits:
        r = inner.shape[-1]
        fits = shapes == [(*stack, left.shape[-2], r), (inner.shape[0], *stack, r, r), (*stack, r, right.shape[-1])]
    if not fits or 0 in {size for shape in shapes for size in shape}:
        raise ValueError(f"the factors of {name} do not fit each other (shapes {shapes}); save the adapter again")
    B = scaled_left(left, inner, stored_scale(config.init_scale, config.zero_left))
    A = right.to(compute_dtype(inner.dtype))
    _require_fitting_layout(name, layout, A.shape[-1])
    padding = layout.get("padding_idx")
    if padding is not None:
        A = A.clone()
        A[:, padding] = 0
    return Update(B, A, inner.shape[-1], layout, (left.dtype, right.dtype))


def _require_known_layouts(layouts: dict[str, Any]) -> None:
    for name, layout in layouts.items():
        known = isinstance(layout, dict) and layout.get("kind") in (None, "embedding", "convolution", PARAMETER)
        numbers = [layout.get(key) for key in ("place", "experts", "padding_idx")] if known else []
        known = known and all(number is None or isinstance(number, int) for number in numbers)
        if not known or (layout.get("kind") == PARAMETER and layout.get("place") is None):
            raise ValueError(f"layouts says {layout!r:.120} of {name}, which this rankwise does not know")


def _require_fitting_layout(name: str, layout: dict[str, Any], columns: int) -> None:
    fits = True
    if layout.get("padding_idx") is not None:
        fits = -columns <= layout["padding_idx"] < columns
    if layout.get("kind") == "convolution":
        kernel = layout.get("kernel")
        sizes = (
            kernel if isinstance(kernel, list) and all(isinstance(size, int) and size > 0 for size in kernel) else []
        )
        fits = len(sizes) > 1 and math.prod(sizes) == columns
    if not fits:
        raise ValueError(f"layouts says {layout!r:.120} of {name}, which does not fit its factors of {columns} columns")


def _lora_update(name: str, part: dict[str, Tensor], config: LoraConfig) -> Update:
    embedding = "embedding_A" in part or "embedding_B" in part
    B, A = (part.get(f"embedding_{side}" if embedding else side) for side in ("B", "A"))
    if A is None or B is None:
        raise ValueError(f"the adapter of {name} lacks one of its factors; save it again")
    layout: dict[str, Any] = {"kind": "embedding"} if embedding else {}
    if A.ndim > 2:
        layout = {"kind": "convolution", "kernel": list(A.shape[1:])}
        A, B = A.flatten(1), B.flatten(1)
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or 0 in (*A.shape, *B.shape):
        raise ValueError(
            f"the factors of {name} do not fit each other (shapes {tuple(B.shape)}, {tuple(A.shape)}); save it again"
        )
    rank, alpha = (
        _of_pattern(pattern, name, default)
        for pattern, default in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha))
    )
    if not isinstance(alpha, int | float):
        raise ValueError(f"the settings give {name} the α {alpha!r}, which is no number; save the adapter again")
    if rank != A.shape[0]:
        raise ValueError(
            f"the settings say rank {rank} for {name}, its factors have {A.shape[0]}; save the adapter again"
        )
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    dtype = compute_dtype(B.dtype)
    return Update(scaling * B.to(dtype), A.to(dtype), rank, layout, (B.dtype, A.dtype))


def _of_pattern(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    try:
        return (pattern or {}).get(get_pattern_key(list(pattern or {}), name), default)
    except re.error as error:
        raise ValueError(
            f"rank_pattern and alpha_pattern hold regular expressions, but one is none: {error}"
        ) from error


def _require_plain(config: LoraConfig, state: Mapping[str, Tensor]) -> None:
    """Refuse what is more than B·A: dropping it in silence would give another model."""
    more = [
        what
        for what, used in (
            ("DoRA's magnitudes", config.use_dora),
            ("biases of its own (lora_bias)", config.lora_bias),
            ("adapted parameters (target_parameters)", bool(config.target_parameters)),
            ("trained tokens (trainable_token_indices)", bool(config.trainable_token_indices)),
            ("KaSA's singular values, and a base weight that it cut", config.kasa_config is not None),
        )
        if used
    ]
    if more:
        raise ValueError(f"this LoRA adapter has {' and '.join(more)}, which no other adapter can hold")
    if any("lora_magnitude" in key for key in state):
        raise ValueError("this LoRA adapter has DoRA's magnitudes, which no other adapter can hold")
