"""LoRA+: B learns faster than A."""

from typing import Any

from torch import nn

from rankwise.optimizers.factor_pairs import lora_pairs, trained_besides
from rankwise.optimizers.setting_checks import is_finite_number


def loraplus_param_groups(
    model: nn.Module,
    *,
    lr: float,
    ratio: float = 16.0,
    embedding_lr: float | None = None,
    head_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer in which B learns ``ratio`` times as fast as A.

    A sums over d_in inputs and B over r: for both to change the output by as much when the model is wide, Adam's rate has to
    be Θ(1/d_in) for A and Θ(1) for B (Hayou et al. 2024; overview §3.2.1, where the ratio is γ). One rate for both leaves A
    nearly where it was drawn.

    Groups "A", "B", "embedding", "head" and "vectors", in this order and without the empty ones:

    - "embedding": both factors of an adapted table at ``embedding_lr``. Its inputs pick rows and are not summed over, so the
      argument for the ratio does not hold.
    - "head": everything else that is trained, at ``head_lr``. In PEFT's ``create_loraplus_optimizer`` a head's weight is in
      A's group and its bias in B's, at 16 times the rate.
    - "vectors": what has fewer than two dimensions (biases, norms, DoRA's magnitudes), at ``head_lr`` without weight decay.

    Args:
        model: a model with LoRA layers.
        lr: η of A. About a third of LoRA's rate is a good start.
        ratio: γ. Above 1 for adapters that start with B = 0; 1 is plain LoRA.
        embedding_lr, head_lr: ``lr`` unless given.

    Raises:
        ValueError: no LoRA layers, or a rate or ratio that is not a positive number.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> from rankwise.optimizers.loraplus import loraplus_param_groups
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 12)), LoraConfig(r=4, target_modules=["0"]))
        >>> [(group["name"], group["lr"]) for group in loraplus_param_groups(model, lr=1e-4)]
        [('A', 0.0001), ('B', 0.0016)]
    """
    embedding_lr = lr if embedding_lr is None else embedding_lr
    head_lr = lr if head_lr is None else head_lr
    for name, value in (("lr", lr), ("ratio", ratio), ("embedding_lr", embedding_lr), ("head_lr", head_lr)):
        if not is_finite_number(value) or value <= 0:
            raise ValueError(f"{name} must be a positive number, got {value!r}")
    pairs = lora_pairs(model)
    linear = [pair for pair in pairs if not pair.embedding]
    tables = [pair for pair in pairs if pair.embedding]
    others = [p for _, p in trained_besides(model, pairs)]

    def group(name: str, parameters: list[nn.Parameter], rate: float, **options: Any) -> dict[str, Any]:
        return {"name": name, "params": [p for p in parameters if p.requires_grad], "lr": rate, **options}

    groups = [
        group("A", [pair.A for pair in linear], lr),
        group("B", [pair.B for pair in linear], lr * ratio),
        group("embedding", [factor for pair in tables for factor in pair.factors], embedding_lr),
        group("head", [p for p in others if p.ndim >= 2], head_lr),
        group("vectors", [p for p in others if p.ndim < 2], head_lr, weight_decay=0.0),
    ]
    return [each for each in groups if each["params"]]
