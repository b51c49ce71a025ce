"""loraplus_param_groups: who learns at which rate, and that an optimizer made of them does, and resumes."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from rankwise.optimizers.loraplus import loraplus_param_groups
from tests.tiny_models import Mlp, tiny_bert, token_batch


def rates(model: nn.Module, **changes: Any) -> dict[str, float]:
    """The rate of every trained parameter, which must be in one group only."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = loraplus_param_groups(model, **{"lr": 1e-3, **changes})
    found = [(names[id(p)], group["lr"]) for group in groups for p in group["params"]]
    assert len(dict(found)) == len(found)
    assert set(dict(found)) == {name for name, p in model.named_parameters() if p.requires_grad}
    return dict(found)


def test_b_learns_faster_by_the_ratio_and_everything_else_at_its_own_rate() -> None:
    config = LoraConfig(
        r=2, target_modules=["query", "word_embeddings", "dense"], modules_to_save=["classifier"], bias="lora_only"
    )
    model = get_peft_model(tiny_bert(), config)
    expected = {"lora_A": 1e-3, "lora_B": 8e-3, "lora_embedding": 1e-6, "classifier": 0.5, "bias": 0.5}
    found = rates(model, ratio=8.0, embedding_lr=1e-6, head_lr=0.5)
    seen = set()
    for name, lr in found.items():
        kind = next(kind for kind in expected if kind in name)
        assert lr == expected[kind], name
        seen.add(kind)
    assert seen == set(expected)


def test_vectors_do_not_decay_and_matrices_take_the_optimizers_decay() -> None:
    model = get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["head"], use_dora=True))
    optimizer = torch.optim.AdamW(loraplus_param_groups(model, lr=1e-3), weight_decay=0.3)
    decay = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decay == {"A": 0.3, "B": 0.3, "head": 0.3, "vectors": 0.0}
    vectors = next(group for group in optimizer.param_groups if group["name"] == "vectors")
    assert sorted(p.ndim for p in vectors["params"]) == [1, 1], "DoRA's magnitude and the head's bias"


def test_a_frozen_a_is_in_no_group() -> None:
    model = get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["lin0"]))
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    assert [group["name"] for group in loraplus_param_groups(model, lr=1.0)] == ["B"]


def test_linear_layers_are_trained_as_by_peft() -> None:
    """Its create_loraplus_optimizer, where both mean the same: no head, no bias, no embedding."""
    ours, theirs = (get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules="all-linear")) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizers = (
        torch.optim.AdamW(loraplus_param_groups(ours, lr=1e-3, ratio=16.0), lr=1e-3, weight_decay=0.0),
        create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0),
    )
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model(**token_batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_rates_survive_a_resume() -> None:
    """Groups that a resume flattens into one rate are PEFT's best known LoRA+ bug."""
    model = get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["lin0", "lin1"]))
    saved = torch.optim.AdamW(loraplus_param_groups(model, lr=1e-3), lr=1e-3).state_dict()
    resumed = torch.optim.AdamW(loraplus_param_groups(model, lr=5.0), lr=5.0)
    resumed.load_state_dict(saved)
    assert [(g["name"], g["lr"]) for g in resumed.param_groups] == [("A", 1e-3), ("B", 16e-3)]


@pytest.mark.parametrize("name", ["lr", "ratio", "embedding_lr", "head_lr"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_rates_out_of_range_are_refused(name: str, value: float) -> None:
    model = get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["lin0"]))
    with pytest.raises(ValueError, match=f"{name} must be a positive number"):
        loraplus_param_groups(model, **{"lr": 1e-3, name: value})
