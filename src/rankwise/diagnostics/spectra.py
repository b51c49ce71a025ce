"""Singular values of every ΔW in a model, from its factors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rankwise.adapters import DeepLoraLayer
from rankwise.adapters.export import truncated_pair
from rankwise.adapters.full_width import FullWidthLinear
from rankwise.adapters.sharded_weights import gathered
from rankwise.spectral import numerical_rank, rank_for_energy, stable_rank


@dataclass(frozen=True)
class LayerSpectrum:
    """One adapted layer.

    Attributes:
        name: of the layer in the base model.
        shape: (d_out, d_in).
        width: columns of the factors, the upper bound on the rank.
        rank: numerical rank of ΔW, above eps·max(d_out, d_in)·σ₁ in float32.
        rank_99: directions that hold 99 % of ‖ΔW‖_F².
        stable_rank: ‖ΔW‖_F²/σ₁².
        singular_values: of ΔW, largest first.
    """

    name: str
    shape: tuple[int, int]
    width: int
    rank: int
    rank_99: int
    stable_rank: float
    singular_values: list[float]


@torch.no_grad()
def adapter_spectra(model: nn.Module, adapter_name: str = "default") -> list[LayerSpectrum]:
    """The spectrum of ΔW in every LoRA, AdaLoRA or Deep LoRA layer, in the model's order, in O(d·r²) a layer.

    Raises:
        ValueError: no layer has such an adapter.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> from rankwise.diagnostics import adapter_spectra
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 12)), LoraConfig(r=4, target_modules=["0"]))
        >>> [(layer.name, layer.width, layer.rank) for layer in adapter_spectra(model)]
        [('0', 4, 0)]
    """
    spectra = []
    for name, module in model.named_modules():
        for matrix_name, B, A in _pairs(name.removeprefix("base_model.model."), module, adapter_name):
            _, S, _ = truncated_pair(B, A)
            shape = (B.shape[0], A.shape[1])
            spectra.append(
                LayerSpectrum(
                    name=matrix_name,
                    shape=shape,
                    width=A.shape[0],
                    rank=numerical_rank(S, shape=shape),
                    rank_99=rank_for_energy(S, 0.99),
                    stable_rank=stable_rank(S),
                    singular_values=S.tolist(),
                )
            )
    if not spectra:
        raise ValueError(f"no linear layer of this model has a LoRA or Deep LoRA adapter named {adapter_name!r}")
    return spectra


def _pairs(name: str, module: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, B, A) with ΔW = B·A of a layer, one each of a stack of experts; none where there is no such adapter."""
    if isinstance(module, DeepLoraLayer) and adapter_name in module.deeplora_left:
        factors = module.factors(adapter_name)
        with gathered(factors):
            B = module.scaled_left(adapter_name)
            A = factors.right.detach().to(B.dtype).clone()
        names = module.matrix_names(module.name_in_model(name))
        stacks = (B.reshape(len(names), *B.shape[-2:]), A.reshape(len(names), *A.shape[-2:]))
        yield from zip(names, *stacks, strict=True)
    elif isinstance(module, FullWidthLinear):
        yield name, *module.factor_pair()
    elif isinstance(module, AdaLoraLayer) and adapter_name in module.lora_A:
        containers: Any = (module.lora_B, module.lora_E, module.lora_A, module.scaling, module.ranknum)
        B, E, A, scaling, ranks_left = (container[adapter_name] for container in containers)
        yield name, B.float() * (scaling / (float(ranks_left) + 1e-5)), (A * E).float()
    elif isinstance(module, LoraLayer) and adapter_name in module.lora_A:
        B, A = (
            cast(nn.Linear, side[adapter_name]).weight.float().flatten(1) for side in (module.lora_B, module.lora_A)
        )
        diagonal = dict(getattr(module, "lora_diag", {})).get(adapter_name, 1.0)  # KaSA's singular values
        yield name, B * diagonal * module.scaling[adapter_name], A
