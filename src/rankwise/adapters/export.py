"""Deep LoRA, or LoRA, → a plain LoRA adapter folder, exact in O(d·r²) a layer.

ΔW = B·A with B = U(core − ε^L·I) and A = Vᵀ is a LoRA pair already. A QR of each side and an r×r SVD then give the
singular values of ΔW without forming it, and the truncated pair B = U_k·√S, A = √S·V_kᵀ.
"""

import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from rankwise.adapters.config import DeepLoraConfig
from rankwise.adapters.layers import DeepLoraLayer
from rankwise.adapters.parameter_names import KIND as PARAMETER
from rankwise.adapters.parameter_names import names_in_files
from rankwise.adapters.saved_updates import (
    PREFIX,
    SavedAdapter,
    Update,
    read_adapter_folder,
    settings_as_json,
    updates_of,
)
from rankwise.adapters.sharded_weights import is_first_process
from rankwise.files import replacing_folder, save_tensors, write_json
from rankwise.spectral import numerical_rank, rank_for_energy
from rankwise.spectral.precision import require_finite

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
    state_dict: Mapping[str, Tensor] | None = None,
    is_main_process: bool | None = None,
) -> ExportSummary:
    """Save an adapter as a plain PEFT LoRA folder that needs no rankwise to load.

    By default every layer keeps its numerical rank (singular values above eps·max(d_out, d_in)·σ₁), which changes ΔW
    by rounding only. Layers of rank 0 are left out. Each layer's rank and α stand in ``rank_pattern`` and
    ``alpha_pattern`` with α = rank, so the scaling is 1. ``task_type``, ``modules_to_save`` and trained biases go
    along.

    Of a model that FSDP2 or DeepSpeed's ZeRO-3 has sharded, every process calls it, and one writes. No process waits for the
    one that writes: put a barrier behind it before others read.

    Args:
        model: a model with Deep LoRA layers.
        path: folder to create; an existing one must be empty.
        rank: keep at most this many directions a layer.
        energy: keep the smallest rank with this share of Σσ² in every layer.
        tol: keep singular values above tol·σ₁ of their layer.
        adapter_name: which adapter.
        dtype: of the saved factors; by default as trained.
        state_dict: the model's, where somebody else has gathered it (``accelerator.get_state_dict(model)``, for FSDP1).
        is_main_process: whether this process writes; by default the first of ``torch.distributed`` does.

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
    writes = is_first_process() if is_main_process is None else is_main_process
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
    given = None if state_dict is None else dict(state_dict)
    state = get_peft_model_state_dict(model, state_dict=given, adapter_name=adapter_name)
    if config.task_type is None and config.auto_mapping is None and isinstance(model, PeftModel):
        base = type(model.get_base_model())  # as PeftModel.save_pretrained notes it, for AutoPeftModel
        config = replace(config, auto_mapping={"base_model_class": base.__name__, "parent_library": base.__module__})
    return _export(updates_of(state, config), Path(path), rank, energy, tol, dtype, writes=writes)


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
    try:
        U, S, Vh = truncated_pair(update.B, update.A)
    except torch.linalg.LinAlgError:
        S = update.B.new_full((1,), math.nan)
    require_finite(S, "the update that the factors make (their product overflows)")
    kept = _rank_to_keep(S, (update.B.shape[0], update.A.shape[1]), rank, energy, tol)
    return U[:, :kept], S, Vh[:kept]


def _export(
    adapter: SavedAdapter,
    path: Path,
    rank: int | None,
    energy: float | None,
    tol: float | None,
    dtype: torch.dtype | None,
    *,
    writes: bool = True,
) -> ExportSummary:
    check_cutoff(rank, energy, tol)
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    layers: list[LayerExport] = []
    for name, update in adapter.updates.items():
        _require_exportable(name, update)
        pairs[name] = []
        for matrix_name, matrix in update.matrices(name):
            U, S, Vh = truncated(matrix, rank, energy, tol)
            root = S[: U.shape[1]].sqrt()
            pairs[name].append((U * root, root[:, None] * Vh))
            layers.append(LayerExport(matrix_name, update.width, U.shape[1], S.tolist()))
    ranks = {name: max(B.shape[1] for B, _ in pairs[name]) for name in pairs}
    # a LoRA folder without any layer cannot be loaded
    kept_ranks = {name: rank for name, rank in ranks.items() if rank} or {next(iter(ranks)): 1}
    layouts = {name: update.layout for name, update in adapter.updates.items()}
    stored = names_in_files(layouts, kept_ranks)
    tensors = dict(adapter.others)
    for name, kept in kept_ranks.items():
        update = adapter.updates[name]
        B, A = (torch.stack([_padded(pair[side], kept, side) for pair in pairs[name]]) for side in (0, 1))
        tensors |= _lora_pair(stored.get(name, name), update, B, A, dtype)
    lora = _lora_config(adapter.config, kept_ranks, [name for name in ranks if name not in kept_ranks], layouts)
    if writes:
        with replacing_folder(path) as folder:
            save_tensors(tensors, folder / SAFETENSORS_WEIGHTS_NAME, kind="lora")
            write_json(folder / CONFIG_NAME, lora)
    summary = ExportSummary(path, layers, adapter.bytes, sum(value.nbytes for value in tensors.values()))
    logger.info("%s", summary)
    return summary


def _padded(factor: Tensor, rank: int, side: int) -> Tensor:
    """B (side 0) or A with directions that do nothing: every expert of a stack has as many as the one with most."""
    more = rank - factor.shape[1 - side]
    return torch.nn.functional.pad(factor, (0, more) if side == 0 else (0, 0, 0, more))


def _lora_pair(
    name: str, update: Update, B: Float[Tensor, "e m k"], A: Float[Tensor, "e k n"], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """One layer's tensors under PEFT's names, in the shapes that its kind of layer has there."""
    of_left, of_right = update.dtypes
    B, A = B.to(dtype or of_left), A.to(dtype or of_right)
    # PEFT keeps experts side by side: in A one after the other, in B the k-th directions of all of them together
    B, A = B.permute(1, 2, 0).flatten(1), A.flatten(0, 1)
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


def _lora_config(
    config: DeepLoraConfig | LoraConfig, ranks: dict[str, int], left_out: list[str], layouts: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """adapter_config.json of the exported adapter, as LoraConfig itself writes it."""
    largest = max(ranks.values())
    parameters = {name: name for name in ranks if layouts[name].get("kind") == PARAMETER}
    parameters |= {name: f"{name}.weight" for name in ranks if layouts[name].get("lora_target") == "parameter"}
    # ^ and escaped dots: PEFT reads these keys as regular expressions that may match the end of a longer name.
    pattern = {"^" + re.escape(parameters.get(name, name)): rank for name, rank in ranks.items() if rank != largest}
    # PEFT matches target names at the end of longer ones; a left-out layer named so would be adapted all the same.
    confused = [name for name in left_out if any(name.endswith("." + kept) for kept in ranks)]
    lora = LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=sorted(ranks.keys() - parameters.keys()),
        target_parameters=sorted(parameters.values()) or None,
        exclude_modules="|".join(map(re.escape, confused)) or None,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        modules_to_save=config.modules_to_save,
        ensure_weight_tying=config.ensure_weight_tying,
        bias="lora_only" if config.bias == "deeplora_only" else config.bias,  # type: ignore[arg-type]  # checked there
        fan_in_fan_out=config.fan_in_fan_out,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        auto_mapping=config.auto_mapping,
        inference_mode=True,
    )
    return settings_as_json(lora)
