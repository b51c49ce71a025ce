"""Several adapters of one model as one: ΔW = Σ wᵢΔWᵢ, exactly or at the best lower rank."""

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from rankwise.adapters.config import ZERO_LEFT, DeepLoraConfig
from rankwise.adapters.export import truncated_pair
from rankwise.adapters.layers import DeepLoraLayer
from rankwise.adapters.sharded_weights import gathered
from rankwise.spectral import numerical_rank

KINDS = ("cat", "svd")


def combined_update(
    layer: DeepLoraLayer, adapters: Sequence[str], weights: Sequence[float], rank: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), singular values (k,) and V (n, k) of Σ wᵢΔWᵢ over those adapters that the layer has.

    The factors side by side, [w₁B₁ w₂B₂ …]·[A₁; A₂; …], are the sum; a QR of each side and one small SVD recompress it.
    """
    here = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.r]
    with gathered([factor for name, _ in here for factor in layer.factors(name)]):
        B = torch.cat([weight * layer.scaled_left(name) for name, weight in here], dim=1)
        A = torch.cat([layer.factors(name).right.to(B.dtype) for name, _ in here])
    U, S, Vh = truncated_pair(B.detach(), layer.without_ignored(A.detach()))
    kept = numerical_rank(S, shape=(layer.out_features, layer.in_features))
    kept = max(1, kept if rank is None else min(kept, rank))
    return U[:, :kept], S[:kept], Vh[:kept].mT


def combined_config(
    configs: Sequence[DeepLoraConfig], widths: dict[str, int], layouts: dict[str, dict[str, object]]
) -> DeepLoraConfig:
    """Settings of the combined adapter: its layers by whole names, each as wide as it needs."""
    largest = max(widths.values())
    return replace(
        configs[0],
        r=largest,
        variant=ZERO_LEFT,
        target_modules="|".join(map(re.escape, widths)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=sorted({name for config in configs for name in config.modules_to_save or ()}) or None,
        rank_pattern={"^" + re.escape(name): width for name, width in widths.items() if width != largest},
        layouts=dict(layouts),
    )


@torch.no_grad()
def carry_saved_modules(model: nn.Module, adapters: Sequence[str], new_name: str) -> None:
    """Give the new adapter the trained module (a head) of the one adapter that has it."""
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        for owner in (name for name in adapters if name in wrapper.modules_to_save):
            trained = dict(wrapper.modules_to_save[owner].named_parameters())
            for name, parameter in wrapper.modules_to_save[new_name].named_parameters():
                with gathered([trained[name]]), gathered([parameter], writing=True):
                    parameter.copy_(trained[name])


def check_combination(
    model: nn.Module,
    configs: dict[str, DeepLoraConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    new_name: str,
    kind: str,
    rank: int | None,
) -> None:
    """Refuse what cannot be combined.

    Raises:
        ValueError: the message says what was expected, what came and what to do.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"give one weight for each adapter; got {len(adapters)} adapters and {len(weights)} weights")
    unknown = [name for name in adapters if name not in configs]
    if unknown:
        raise ValueError(f"no adapter named {', '.join(map(repr, unknown))}; this model has {', '.join(configs)}")
    if new_name in configs:
        raise ValueError(f"an adapter named {new_name!r} is there already; choose another name, or delete it first")
    if kind not in KINDS:
        raise ValueError(
            f"combination_type must be 'cat' (exact) or 'svd' (the best of rank svd_rank), got {kind!r}; the others work "
            "on the entries of LoRA's A and B, which in a factorization of any depth are not unique"
        )
    if (kind == "svd") != (rank is not None) or (rank is not None and rank < 1):
        raise ValueError("combination_type='svd' needs svd_rank, a whole number of at least 1, and 'cat' takes none")
    if any(configs[name].bias != "none" for name in adapters):
        raise ValueError("adapters with trained biases cannot be combined: biases have no rank")
    if any(configs[name].trainable_token_indices for name in adapters):
        raise ValueError(
            "adapters with trained tokens (trainable_token_indices) cannot be combined: tokens have no rank"
        )
    if any(configs[name].target_parameters for name in adapters):
        raise ValueError(
            "adapters of bare parameters (target_parameters) cannot be combined; merge one after the other"
        )
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    if any(sum(name in wrapper._adapters for name in adapters) > 1 for wrapper in wrappers):
        raise ValueError("several of the adapters have the same modules_to_save, which cannot be combined")
    if any(isinstance(module, DeepLoraLayer) and module.merged for module in model.modules()):
        raise ValueError("an adapter is merged into the base weights; call unmerge_adapter() first")
