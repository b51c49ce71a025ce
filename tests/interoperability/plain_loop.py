"""What every other loop is compared with: a dozen lines of PyTorch, in float64."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rankwise.adapters import DeepLoraConfig
from tests.tiny_models import tiny_bert, token_batch

RATES = {"lr": 1e-2, "outer_lr_ratio": 0.5, "head_lr": 1e-3}
TARGETS = ["query", "value", "dense"]


def batches(count: int = 4, rows: int = 4) -> list[dict[str, Tensor]]:
    whole = token_batch(count * rows)
    return [{key: value[i * rows : (i + 1) * rows] for key, value in whole.items()} for i in range(count)]


def adapted_bert(**settings: Any) -> PeftModel:
    """A classifier whose factors all learn from the first step, without random masks."""
    config = {"r": 4, "variant": "random", "init_scale": 0.5, "direction_dropout": 0.0, "target_modules": TARGETS}
    torch.manual_seed(0)
    return get_peft_model(tiny_bert().double(), DeepLoraConfig(**{**config, "task_type": "SEQ_CLS", **settings}))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    loss_of: Callable[[Any], Tensor] | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> list[float]:
    """One step a batch; the losses before each."""
    losses = []
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss if loss_of is None else loss_of(batch)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, scale: float = 100) -> None:
    """Equal up to ``scale`` roundings of each tensor's largest entry, under the same names."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        bound = scale * torch.finfo(value.dtype).eps * max(float(value.abs().max()), 1e-3)
        assert float((found[name] - value).abs().max()) <= bound, name


def assert_moved(found: Mapping[str, Tensor], start: Mapping[str, Tensor], *, only: str = "") -> None:
    """Every trainable tensor is another than at the start, by more than rounding."""
    assert found and found.keys() == start.keys()
    for name, value in found.items():
        assert only in name
        assert (value - start[name]).norm() > 100 * torch.finfo(value.dtype).eps * start[name].norm(), (
            f"{name} did not learn"
        )


def assert_same_way(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], start: Mapping[str, Tensor], *, within: float
) -> None:
    """Equal up to this share of how far each tensor came from its start."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        share = float((found[name] - value).norm() / (value - start[name]).norm())
        assert share <= within, f"{name} went another way ({share:.1e} of it)"
