"""The optimizers of the methods that are not content with AdamW at one rate."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.adapters import create_deeplora_optimizer
from rankwise.optimizers.adarankgrad import AdaRankGrad
from rankwise.optimizers.galore import GaLoreAdamW
from rankwise.optimizers.lora_rite import LoraRite, lorarite_param_groups
from rankwise.optimizers.loraplus import loraplus_param_groups
from rankwise.optimizers.param_groups import model_param_groups

if TYPE_CHECKING:
    from rankwise.finetuning.settings import FinetuneSettings

LORA_PLUS_RATIO = 16.0  # the LoRA+ paper's recommendation: B learns sixteen times as fast as A
LOGITS_RATIO = 10.0  # VB-LoRA's logits over its vectors: usually 1e-2 and 1e-3
SUBSPACES = 4  # of a run, one after the other: GaLore's usual 200 steps are the whole of one
_FA_DAMPING = 1e-8  # PEFT's, of AAᵀ


def adamw(model: nn.Module, settings: "FinetuneSettings", adam: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW over everything trainable."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **adam)


def deep_lora(model: nn.Module, settings: "FinetuneSettings", adam: dict[str, Any]) -> torch.optim.Optimizer:
    """Inner factors at η, U and V at γη."""
    return create_deeplora_optimizer(model, torch.optim.AdamW, outer_lr_ratio=settings.outer_ratio, **adam)


def lora_plus(model: nn.Module, settings: "FinetuneSettings", adam: dict[str, Any]) -> torch.optim.Optimizer:
    """LoRA+ (Hayou et al. 2024). Not PEFT's ``create_loraplus_optimizer``, which gives biases B's rate."""
    return torch.optim.AdamW(loraplus_param_groups(model, lr=adam["lr"], ratio=LORA_PLUS_RATIO), **adam)


def lora_rite(model: nn.Module, settings: "FinetuneSettings", adam: dict[str, Any]) -> torch.optim.Optimizer:
    """LoRA-RITE (Yen et al. 2024), and its AdamW for the head."""
    groups = lorarite_param_groups(model, lr=adam["lr"], head_lr=settings.head_lr)
    return LoraRite(groups, lr=adam["lr"], eps=adam["eps"], weight_decay=adam["weight_decay"])


def galore(model: nn.Module, settings: "FinetuneSettings", adam: dict[str, Any]) -> torch.optim.Optimizer:
    """GaLore (Zhao et al. 2024) at the settings' rank; embeddings, norms and the head at full size."""
    return _projected_optimizer(GaLoreAdamW, model, settings, adam)


def adarankgrad(model: nn.Module, settings: "FinetuneSettings", adam: dict[str, Any]) -> torch.optim.Optimizer:
    """AdaRankGrad (Refael et al. 2024); the settings' rank is the most that it may take."""
    return _projected_optimizer(AdaRankGrad, model, settings, adam)


def riemannian(model: Any, settings: "FinetuneSettings", adam: dict[str, Any]) -> torch.optim.Optimizer:
    """Zhang & Pilanci 2024."""
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(model, torch.optim.AdamW, **adam)


def lora_fa(model: nn.Module, settings: "FinetuneSettings", adam: dict[str, Any]) -> torch.optim.Optimizer:
    """LoRA-FA (Zhang et al. 2023): A stays as it was drawn, and B's gradient becomes g·(AAᵀ)⁻¹/s².

    PEFT's ``create_lorafa_optimizer`` takes the same step inside an Adam of its own, which keeps its state by names and takes
    no other group: the head could not learn at its own rate. Here the gradient is changed on its way to AdamW.
    """
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, side in layer.lora_B.items():
                A: nn.Parameter = layer.lora_A[name].weight  # type: ignore[assignment]
                A.requires_grad_(False)
                side.weight.register_hook(partial(_projected, A=A, scaling=layer.scaling[name]))  # type: ignore[operator]
    return adamw(model, settings, adam)


def vb_lora(model: nn.Module, settings: "FinetuneSettings", adam: dict[str, Any]) -> torch.optim.Optimizer:
    """The bank's vectors at η, the logits that choose among them at 10·η."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    logits = [p for name, p in trained if "vblora_logits" in name]
    others = [p for name, p in trained if "vblora_logits" not in name]
    return torch.optim.AdamW([{"params": others}, {"params": logits, "lr": LOGITS_RATIO * adam["lr"]}], **adam)


def _projected_optimizer(
    kind: type[GaLoreAdamW | AdaRankGrad], model: nn.Module, settings: "FinetuneSettings", adam: dict[str, Any]
) -> torch.optim.Optimizer:
    groups = model_param_groups(model, rank=settings.r)
    for group in groups:
        del group["param_names"]  # the head's group has none, and torch wants them for all groups or for no group
    chosen = {name: adam[name] for name in ("lr", "eps", "weight_decay")}
    return kind(groups, **chosen, rank=None, refresh_every=max(1, settings.steps // SUBSPACES))


@torch.no_grad()
def _projected(gradient: Tensor, A: Tensor, scaling: float) -> Tensor:
    """g·(AAᵀ + δI)⁻¹/s², for g (m, r) and A (r, n)."""
    wide = A.float()
    gram = wide @ wide.mT + _FA_DAMPING * torch.eye(len(A), device=A.device)
    return (torch.linalg.solve(gram, gradient.float().mT).mT / scaling**2).to(gradient)
