"""A LoRA adapter, or another Deep LoRA one, as the start of a Deep LoRA adapter: the same update, ready to train on."""

import os
from pathlib import Path

import torch
from jaxtyping import Float
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from rankwise.adapters.config import ZERO_LEFT, DeepLoraConfig
from rankwise.adapters.export import ExportSummary, LayerExport, check_cutoff, truncated
from rankwise.adapters.saved_updates import PREFIX, Update, read_adapter_folder, settings_as_json
from rankwise.files import replacing_folder, save_tensors, write_json
from rankwise.spectral import haar_frame

_CARRIED_OVER = (
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "ensure_weight_tying", "fan_in_fan_out",
    "task_type", "base_model_name_or_path", "revision", "auto_mapping",
)  # fmt: skip


def deeplora_from_adapter(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    r: int | None = None,
    inner_depth: int = 3,
    rank: int | None = None,
    energy: float | None = None,
    tol: float | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> ExportSummary:
    """Write a Deep LoRA adapter that makes the same update as a saved LoRA (or Deep LoRA) adapter; no base model needed.

    ΔW = U·S·Vᵀ goes into the factors as U, L inner factors S^{1/L} and Vᵀ: balanced, as gradient flow from a small start
    would leave them, and exact up to rounding. Directions beyond its rank start as a new adapter's do: nothing in U, the
    identity inside, random in V. Load it with ``PeftModel.from_pretrained(base, path, is_trainable=True)``.

    Args:
        source: folder of the saved adapter.
        path: folder to create; an existing one must be empty.
        r: width of U and V; by default the largest rank kept.
        inner_depth: L.
        rank: keep at most this many directions a layer, at most r.
        energy: keep the smallest rank with this share of Σσ² in every layer.
        tol: keep singular values above tol·σ₁ of their layer.
        dtype: of the factors; by default as saved.
        seed: of the random directions.

    Raises:
        ValueError: as :func:`~rankwise.adapters.export_adapter_folder`; or r is less than a rank to be kept.

    Example:
        >>> import tempfile
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> from rankwise.adapters import deeplora_from_adapter
        >>> lora = get_peft_model(
        ...     nn.Sequential(nn.Linear(16, 12)), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lora.save_pretrained(folder + "/lora")
        ...     summary = deeplora_from_adapter(folder + "/lora", folder + "/deep", r=6)
        >>> [(layer.width, layer.rank) for layer in summary.layers]
        [(6, 4)]
    """
    if rank is None and energy is None and tol is None and r is not None:
        rank = r
    check_cutoff(rank, energy, tol)
    adapter = read_adapter_folder(Path(source))
    stacked = [name for name, update in adapter.updates.items() if update.stacked]
    if stacked:
        raise ValueError(
            f"{stacked[0]} is a stack of experts, which can be exported as a LoRA but not made another Deep LoRA of"
        )
    found = {name: truncated(update, rank, energy, tol) for name, update in adapter.updates.items()}
    largest = max(1, *(U.shape[1] for U, _, _ in found.values()))
    r = largest if r is None else r
    if r < largest:
        raise ValueError(f"r={r} is less than the rank {largest} to be kept; raise it, or keep less with rank={r}")
    carried = {name: getattr(adapter.config, name, None) for name in _CARRIED_OVER}
    bias = adapter.config.bias
    layouts = {name: update.layout for name, update in adapter.updates.items() if update.layout}
    config = DeepLoraConfig(
        r=r,
        inner_depth=inner_depth,
        variant=ZERO_LEFT,
        bias="deeplora_only" if bias == "lora_only" else bias,
        inference_mode=True,
        layouts=layouts,
        **{name: value for name, value in carried.items() if value is not None},
    )
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    layers = []
    for name, (U, S, Vh) in found.items():
        update = adapter.updates[name]
        width = min(r, U.shape[0], Vh.shape[1])  # as the tuner clamps it
        factors = _factors(U, S[: U.shape[1]], Vh, width, inner_depth, update, generator)
        for side, factor in factors.items():
            saved = dtype or update.dtypes[0 if side != "right" else 1]
            tensors[f"{PREFIX}{name}.deeplora_{side}.weight"] = factor.to(saved)
        layers.append(LayerExport(name, width, U.shape[1], S.tolist()))
    tensors |= adapter.others
    with replacing_folder(Path(path)) as folder:
        save_tensors(tensors, folder / SAFETENSORS_WEIGHTS_NAME, kind="deeplora")
        write_json(folder / CONFIG_NAME, settings_as_json(config))
    return ExportSummary(Path(path), layers, adapter.bytes, sum(value.nbytes for value in tensors.values()))


def _factors(
    U: Float[Tensor, "m k"],
    S: Float[Tensor, " k"],
    Vh: Float[Tensor, "k n"],
    width: int,
    depth: int,
    update: Update,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    k = len(S)
    left = U.new_zeros(U.shape[0], width)
    left[:, :k] = U
    core = S.new_ones(width)
    core[:k] = S ** (1 / depth)
    right = Vh.new_zeros(width, Vh.shape[1])
    right[:k] = Vh
    if width > k:
        free = haar_frame(Vh.shape[1], width - k, generator=generator).to(Vh)
        padding = update.layout.get("padding_idx")
        if padding is not None:
            free[padding] = 0
        free -= Vh.mT @ (Vh @ free)
        right[k:] = torch.linalg.qr(free)[0].mT
    return {"left": left, "inner": torch.diag(core).expand(depth, width, width).clone(), "right": right}
