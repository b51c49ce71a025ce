"""Deep LoRA, or LoRA, → a plain LoRA adapter folder, exact in O(d·r²) a layer.

ΔW = B·A with B = U(core − ε^L·I) and A = Vᵀ is a LoRA pair already. A QR of each side and an r×r SVD then give the
singular values of ΔW without forming it, and the truncated pair B = U_k·√S, A = √S·V_kᵀ.
"""

import logging
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from rankwise.adapters.config import DeepLoraConfig
from rankwise.adapters.layers import DeepLoraLayer
from rankwise.adapters.saved_updates import (
    PREFIX,
    SavedAdapter,
    Update,
    read_adapter_folder,
    settings_as_json,
    updates_of,
)
from rankwise.files import replacing_folder, save_tensors, write_json
from rankwise.spectral import numerical_rank, rank_for_energy

logger = logging.getLogger(__name__)


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
    if config.trainable_token_indices:
        raise ValueError(
            "this adapter trains tokens too (trainable_token_indices), which the exported LoRA would leave out; merge it with "
            "merge_and_unload(), or train without"
        )
    if any(isinstance(module, DeepLoraLayer) and module.merged for module in model.modules()):
        raise ValueError("the adapter is merged into the base weights; call unmerge_adapter() before exporting it")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    if config.task_type is None and config.auto_mapping is None and isinstance(model, PeftModel):
        base = type(model.get_base_model())  # as PeftModel.save_pretrained notes it, for AutoPeftModel
        config = replace(config, auto_mapping={"base_model_class": base.__name__, "parent_library": base.__module__})
    return _export(updates_of(state, config), Path(path), rank, energy, tol, dtype)


def export_adapter_folder(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    tol: float | None = None,
    dtype: torch.dtype | None = None,
) -> ExportSummary:
    """:func:`save_as_lora` for a saved folder, Deep LoRA or LoRA; the base model is not needed.

    Of a LoRA adapter it is the same update at the rank asked for: r, α and its patterns are written anew.

    Raises:
        ValueError: the folder is missing, incomplete, cut short, or holds another kind of adapter.
    """
    return _export(read_adapter_folder(Path(source)), Path(path), rank, energy, tol, dtype)


def truncated_pair(
    B: Float[Tensor, "m r"], A: Float[Tensor, "r n"]
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "r n"]]:
    """The SVD of B·A as (U, S, Vh) in O((m + n)·r² + r³)."""
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.mT)
    return Qb @ U, S, Vh @ Qa.mT


def truncated(
    update: Update, rank: int | None, energy: float | None, tol: float | None
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " r"], Float[Tensor, "k n"]]:
    """The SVD of an update: the directions to keep, and all singular values."""
    U, S, Vh = truncated_pair(update.B, update.A)
    kept = _rank_to_keep(S, (update.B.shape[0], update.A.shape[1]), rank, energy, tol)
    return U[:, :kept], S, Vh[:kept]


def _export(
    adapter: SavedAdapter,
    path: Path,
    rank: int | None,
    energy: float | None,
    tol: float | None,
    dtype: torch.dtype | None,
) -> ExportSummary:
    check_cutoff(rank, energy, tol)
    tensors: dict[str, Tensor] = {}
    layers: list[LayerExport] = []
    for name, update in adapter.updates.items():
        _require_exportable(name, update)
        U, S, Vh = truncated(update, rank, energy, tol)
        kept = U.shape[1]
        layers.append(LayerExport(name, update.width, kept, S.tolist()))
        if kept:
            root = S[:kept].sqrt()
            tensors |= _lora_pair(name, update, U * root, root[:, None] * Vh, dtype)
    if not tensors:  # a LoRA folder without any layer cannot be loaded
        name, update = next(iter(adapter.updates.items()))
        tensors = _lora_pair(name, update, update.B[:, :1] * 0, update.A[:1] * 0, dtype)
    tensors |= adapter.others
    kept_ranks = {layer.name: layer.rank for layer in layers if layer.rank} or {layers[0].name: 1}
    left_out = [layer.name for layer in layers if layer.name not in kept_ranks]
    lora = _lora_config(adapter.config, kept_ranks, left_out)
    with replacing_folder(path) as folder:
        save_tensors(tensors, folder / SAFETENSORS_WEIGHTS_NAME, kind="lora")
        write_json(folder / CONFIG_NAME, lora)
    summary = ExportSummary(path, layers, adapter.bytes, sum(value.nbytes for value in tensors.values()))
    logger.info("%s", summary)
    return summary


def _lora_pair(name: str, update: Update, B: Tensor, A: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """One layer's tensors under PEFT's names, in the shapes that its kind of layer has there."""
    of_left, of_right = update.dtypes
    B, A = B.to(dtype or of_left), A.to(dtype or of_right)
    kind = update.layout.get("kind")
    if kind == "embedding":
        return {f"{PREFIX}{name}.lora_embedding_A": A, f"{PREFIX}{name}.lora_embedding_B": B}
    if kind == "convolution":
        kernel = update.layout["kernel"]
        A, B = A.reshape(len(A), *kernel), B.reshape(*B.shape, *[1] * (len(kernel) - 1))
    return {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}


def _require_exportable(name: str, update: Update) -> None:
    reason = update.layout.get("not_in_lora")
    if reason:
        raise ValueError(
            f"{name} is a convolution with {reason}, which PEFT's LoRA for convolutions leaves out; merge the adapter "
            "(merge_and_unload) instead, or leave this layer out with exclude_modules"
        )


def check_cutoff(rank: int | None, energy: float | None, tol: float | None) -> None:
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


def _lora_config(config: DeepLoraConfig | LoraConfig, ranks: dict[str, int], left_out: list[str]) -> dict[str, Any]:
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
    return settings_as_json(lora)
