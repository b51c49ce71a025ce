"""Parameter groups and optimizers with different learning rates for outer and inner factors."""

import inspect
from typing import Any

import torch
from torch import nn

from rankwise.adapters.layers import DeepLoraLayer
from rankwise.adapters.sharded_weights import gathered


def deeplora_param_groups(
    model: nn.Module,
    *,
    lr: float,
    outer_lr_ratio: float = 10.0,
    head_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups "inner" (lr η), "outer" (γη, the paper's discrepant rate, ICML 2024 §3) and "head".

    "head" holds every other trainable parameter (a classifier in ``modules_to_save``, trained biases). Groups come in a
    fixed order and parameters in the model's, so an optimizer built from them resumes from its ``state_dict``.

    Args:
        model: a model with Deep LoRA layers.
        lr: η, learning rate of the inner factors.
        outer_lr_ratio: γ. At 0 the outer factors are *frozen* (``requires_grad=False``), so no gradient is computed.
        head_lr: learning rate of everything else; ``lr`` unless given.

    Raises:
        ValueError: no trainable Deep LoRA factors, a negative rate, or γ = 0 for an adapter whose U starts at zero.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from rankwise.adapters import DeepLoraConfig, deeplora_param_groups
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), DeepLoraConfig(r=4, target_modules=["0"]))
        >>> [(g["name"], g["lr"]) for g in deeplora_param_groups(model, lr=1e-2, outer_lr_ratio=0.5)]
        [('inner', 0.01), ('outer', 0.005)]
    """
    if lr < 0 or outer_lr_ratio < 0 or (head_lr is not None and head_lr < 0):
        raise ValueError(
            f"learning rates cannot be negative: lr={lr}, outer_lr_ratio={outer_lr_ratio}, head_lr={head_lr}"
        )
    inner, outer = _factors(model)
    if outer_lr_ratio == 0 and any(_is_zero(p) for p in outer):
        raise ValueError(
            "outer_lr_ratio=0 would freeze a U that is zero (variant='zero-left'), and nothing could be learnt; "
            "choose a ratio above 0 or another variant"
        )
    if outer_lr_ratio == 0:
        for parameter in outer:
            parameter.requires_grad_(False)
    inner, outer = ([p for p in group if p.requires_grad] for group in (inner, outer))
    if not inner and not outer:
        raise ValueError(
            "the model has no trainable Deep LoRA factors: wrap it with get_peft_model(model, DeepLoraConfig(...)) and "
            "make sure the adapter is active and not loaded for inference (is_trainable=True)"
        )
    seen = {id(p) for p in (*inner, *outer)}
    head = [p for p in model.parameters() if p.requires_grad and id(p) not in seen]
    groups = [
        {"name": "inner", "params": inner, "lr": lr},
        {"name": "outer", "params": outer, "lr": lr * outer_lr_ratio},
        {"name": "head", "params": head, "lr": lr if head_lr is None else head_lr},
    ]
    return [group for group in groups if group["params"]]


def create_deeplora_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    lr: float = 6e-4,
    outer_lr_ratio: float = 10.0,
    head_lr: float | None = None,
    **optimizer_kwargs: Any,
) -> torch.optim.Optimizer:
    """An ordinary torch optimizer over :func:`deeplora_param_groups`.

    Adam kinds get ``eps=1e-6`` and ``weight_decay=0`` unless told otherwise. eps is not cosmetic: at the start the
    inner gradients are about ε² times the layer's, so Adam's eps decides which layers move at all.

    The defaults go with ``variant="zero-left"`` (docs/few-labels.md) and depart from the paper, where the inner factors
    do the learning: ``lr=1e-2, outer_lr_ratio=0.01`` restores its rates. Let them warm up and fall to zero: 6e-3 on U
    and V is near the largest rate that is stable.

    Args:
        model: a model with Deep LoRA layers.
        optimizer_cls: any ``torch.optim.Optimizer`` subclass.
        lr: η, learning rate of the inner factors.
        outer_lr_ratio: γ, rate of U and V over that of the inner factors; 0 freezes them.
        head_lr: learning rate of other trainable parameters; ``lr`` unless given.
        optimizer_kwargs: passed on.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from rankwise.adapters import DeepLoraConfig, create_deeplora_optimizer
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), DeepLoraConfig(r=4, target_modules=["0"]))
        >>> create_deeplora_optimizer(model, torch.optim.AdamW, lr=1e-2).defaults["eps"]
        1e-06
    """
    accepted = inspect.signature(optimizer_cls).parameters
    if "adam" in optimizer_cls.__name__.lower():
        for name, value in (("eps", 1e-6), ("weight_decay", 0.0)):
            if name in accepted:
                optimizer_kwargs.setdefault(name, value)
    groups = deeplora_param_groups(model, lr=lr, outer_lr_ratio=outer_lr_ratio, head_lr=head_lr)
    return optimizer_cls(groups, **{"lr": lr, **optimizer_kwargs})


def _is_zero(parameter: nn.Parameter) -> bool:
    with gathered([parameter]):
        return not parameter.is_meta and not bool(parameter.any())


def _factors(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(inner, outer) parameters of the active adapters, in the model's order."""
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    for module in model.modules():
        if not isinstance(module, DeepLoraLayer):
            continue
        for adapter_name in module.active_adapters:
            if adapter_name in module.deeplora_left:
                factors = module.factors(adapter_name)
                inner.append(factors.inner)
                outer.extend((factors.left, factors.right))
    return inner, outer
