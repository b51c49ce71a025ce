"""Deep LoRA → a plain LoRA adapter folder, exact in O(d·r²) a layer.

ΔW = B·A with B = U(core − ε^L·I) and A = Vᵀ is a LoRA pair already. A QR of each side and an r×r SVD then give the
singular values of ΔW without forming it, and the truncated pair B = U_k·√S, A = √S·V_kᵀ.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rankwise.adapters.config import DeepLoraConfig
from rankwise.adapters.layers import DeepLoraLayer, scaled_left, stored_scale
from rankwise.files import replacing_folder, save_tensors, write_json
from rankwise.spectral import numerical_rank, rank_for_energy
from rankwise.spectral.precision import compute_dtype, require_finite

logger = logging.getLogger(__name__)

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LayerExport:
    """One layer: the width it trained with, the rank it kept, the singular values of its ΔW (largest first)."""

    name: str
    width: int
    rank: int
    singular_values: list[float]


@dataclass(frozen=True)
class ExportSummary:
    """What went into the LoRA folder. Sizes are bytes of the tensors: before as Deep LoRA, after as LoRA."""

    path: Path
    layers: list[LayerExport]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        ranks = [layer.rank for layer in self.layers]
        kept = sum(rank > 0 for rank in ranks)
        total = sum(layer.width for layer in self.layers)
        return (
            f"{self.path}: {kept} of {len(ranks)} layers, rank {min(ranks)} to {max(ranks)} "
            f"(sum {sum(ranks)} of {total}), {self.bytes_before:,} -> {self.bytes_after:,} bytes"
        )


def save_as_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    tol: float | None = None,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
) -> ExportSummary:
    """Save an adapter as a plain PEFT LoRA folder that needs no rankwise to load.

    By default every layer keeps its numerical rank (singular values above eps·max(d_out, d_in)·σ₁), which changes ΔW
    by rounding only. Layers of rank 0 are left out. Each layer's rank and α stand in ``rank_pattern`` and
    ``alpha_pattern`` with α = rank, so the scaling is 1. ``task_type``, ``modules_to_save`` and trained biases go
    along.

    Args:
        model: a model with Deep LoRA layers.
        path: folder to create; an existing one must be empty.
        rank: keep at most this many directions a layer.
        energy: keep the smallest rank with this share of Σσ² in every layer.
        tol: keep singular values above tol·σ₁ of their layer.
        adapter_name: which adapter.
        dtype: of the saved factors; by default as trained.

    Returns:
        :class:`ExportSummary`; print it for ranks and bytes before and after.

    Raises:
        ValueError: more than one of rank, energy and tol; no such adapter; non-finite factors; folder not empty.

    Example:
        >>> import tempfile
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from rankwise.adapters import DeepLoraConfig, save_as_lora
        >>> model = get_peft_model(
        ...     nn.Sequential(nn.Linear(16, 12)), DeepLoraConfig(r=4, target_modules=["0"], init_weights=False)
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     summary = save_as_lora(model, folder + "/lora")
        >>> [layer.rank for layer in summary.layers]
        [4]
    """
    from peft.utils.save_and_load import get_peft_model_state_dict

    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, DeepLoraConfig):
        known = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise ValueError(f"no Deep LoRA adapter named {adapter_name!r} in this model (adapters: {known})")
    if any(isinstance(module, DeepLoraLayer) and module.merged for module in model.modules()):
        raise ValueError("the adapter is merged into the base weights; call unmerge_adapter() before exporting it")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    if config.task_type is None and config.auto_mapping is None and isinstance(model, PeftModel):
        base = type(model.get_base_model())  # as PeftModel.save_pretrained notes it, for AutoPeftModel
        config = replace(config, auto_mapping={"base_model_class": base.__name__, "parent_library": base.__module__})
    return _export(state, config, Path(path), rank, energy, tol, dtype)


def export_adapter_folder(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    tol: float | None = None,
    dtype: torch.dtype | None = None,
) -> ExportSummary:
    """:func:`save_as_lora` for a saved Deep LoRA folder; the base model is not needed.

    Raises:
        ValueError: the folder is missing, incomplete, cut short, or holds another kind of adapter.
    """
    folder = Path(source)
    config_file, weights_file = folder / CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME
    for file in (config_file, weights_file):
        if not file.is_file():
            raise ValueError(f"{folder} is no saved adapter: it has no {file.name}")
    try:
        saved = json.loads(config_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{config_file} is not valid JSON ({error})") from error
    kind = saved.get("peft_type") if isinstance(saved, dict) else None
    if kind != "DEEPLORA":
        raise ValueError(
            f"{folder} holds a {kind or 'nameless'} adapter; only Deep LoRA adapters can be exported to LoRA"
        )
    try:
        config = DeepLoraConfig(
            **{key: value for key, value in saved.items() if key in DeepLoraConfig.__dataclass_fields__}
        )
        with safe_open(weights_file, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"cannot read the adapter in {folder}: {error}; it may be cut short, save it again") from error
    return _export(tensors, config, Path(path), rank, energy, tol, dtype)


def truncated_pair(
    B: Float[Tensor, "m r"], A: Float[Tensor, "r n"]
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "r n"]]:
    """The SVD of B·A as (U, S, Vh) in O((m + n)·r² + r³)."""
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.mT)
    return Qb @ U, S, Vh @ Qa.mT


def _export(
    state: Mapping[str, Tensor],
    config: DeepLoraConfig,
    path: Path,
    rank: int | None,
    energy: float | None,
    tol: float | None,
    dtype: torch.dtype | None,
) -> ExportSummary:
    _check_cutoff(rank, energy, tol)
    factors, others = _split(state)
    if not factors:
        raise ValueError("the adapter holds no Deep LoRA factors: was it saved from the right model?")
    tensors: dict[str, Tensor] = {}
    layers: list[LayerExport] = []
    for name, (left, inner, right) in factors.items():
        stored = compute_dtype(inner.dtype)
        scale = stored_scale(config.init_scale, config.zero_left)
        B, A = scaled_left(left.detach(), inner.detach(), scale), right.detach().to(stored)
        require_finite(B, f"the adapter of {name}")
        require_finite(A, f"the adapter of {name}")
        U, S, Vh = truncated_pair(B, A)
        kept = _rank_to_keep(S, (left.shape[0], right.shape[1]), rank, energy, tol)
        layers.append(LayerExport(name, inner.shape[-1], kept, S.tolist()))
        if kept:
            root = S[:kept].sqrt()
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = (root[:, None] * Vh[:kept]).to(dtype or right.dtype)
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = (U[:, :kept] * root).to(dtype or left.dtype)
    if not tensors:
        tensors = _empty_pair(next(iter(factors.items())), dtype)
    tensors |= others
    kept_ranks = {layer.name: layer.rank for layer in layers if layer.rank} or {layers[0].name: 1}
    lora = _lora_config(config, kept_ranks, [layer.name for layer in layers if layer.name not in kept_ranks])
    with replacing_folder(path) as folder:
        save_tensors(tensors, folder / SAFETENSORS_WEIGHTS_NAME, kind="lora")
        write_json(folder / CONFIG_NAME, lora)
    summary = ExportSummary(path, layers, _bytes(state), _bytes(tensors))
    logger.info("%s", summary)
    return summary


def _split(state: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor, Tensor]], dict[str, Tensor]]:
    """(left, inner, right) by layer name, and everything else (heads, biases) under its own key."""
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, value in state.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.*)\.deeplora_(left|inner|right)\.weight", key)
        if match:
            parts.setdefault(match[1], {})[match[2]] = value
        else:
            others[key if key.startswith(_PREFIX) else _PREFIX + key] = value
    for name, part in parts.items():
        if len(part) < 3:
            raise ValueError(f"the adapter of {name} lacks some of its factors; save it again")
        width = part["inner"].shape[-1]
        shapes = [tuple(part[side].shape) for side in ("left", "inner", "right")]
        if [len(shape) for shape in shapes] != [2, 3, 2] or {shapes[0][1], shapes[1][1], shapes[2][0]} != {width}:
            raise ValueError(f"the factors of {name} do not fit each other (shapes {shapes}); save the adapter again")
    return {name: (part["left"], part["inner"], part["right"]) for name, part in parts.items()}, others


def _check_cutoff(rank: int | None, energy: float | None, tol: float | None) -> None:
    if sum(option is not None for option in (rank, energy, tol)) > 1:
        raise ValueError("give at most one of rank, energy and tol")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy is a share of Σσ² and must lie in (0, 1], got {energy}")
    if tol is not None and not 0 <= tol < 1:
        raise ValueError(f"tol is relative to σ₁ and must lie in [0, 1), got {tol}")


def _rank_to_keep(S: Tensor, shape: tuple[int, int], rank: int | None, energy: float | None, tol: float | None) -> int:
    numerical = numerical_rank(S, shape=shape)
    if rank is not None:
        return min(rank, numerical)
    if energy is not None:
        return min(rank_for_energy(S, energy), numerical)
    if tol is not None:
        return numerical_rank(S, shape=shape, tol=tol * float(S[0]))
    return numerical


def _empty_pair(first: tuple[str, tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A zero pair for one layer: a LoRA folder without any layer cannot be loaded."""
    name, (left, _, right) = first
    return {
        f"{_PREFIX}{name}.lora_A.weight": torch.zeros(1, right.shape[1], dtype=dtype or right.dtype),
        f"{_PREFIX}{name}.lora_B.weight": torch.zeros(left.shape[0], 1, dtype=dtype or left.dtype),
    }


def _lora_config(config: DeepLoraConfig, ranks: dict[str, int], left_out: list[str]) -> dict[str, Any]:
    """adapter_config.json of the exported adapter, as LoraConfig itself writes it."""
    largest = max(ranks.values())
    # ^ and escaped dots: PEFT reads these keys as regular expressions that may match the end of a longer name.
    pattern = {"^" + re.escape(name): rank for name, rank in ranks.items() if rank != largest}
    # PEFT matches target names at the end of longer ones; a left-out layer named so would be adapted all the same.
    confused = [name for name in left_out if any(name.endswith("." + kept) for kept in ranks)]
    lora = LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=sorted(ranks),
        exclude_modules="|".join(map(re.escape, confused)) or None,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        modules_to_save=config.modules_to_save,
        bias="lora_only" if config.bias == "deeplora_only" else config.bias,  # type: ignore[arg-type]  # checked there
        fan_in_fan_out=config.fan_in_fan_out,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        auto_mapping=config.auto_mapping,
        inference_mode=True,
    )
    content = lora.to_dict()
    content["target_modules"] = sorted(ranks)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())
