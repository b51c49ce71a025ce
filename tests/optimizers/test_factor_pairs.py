"""Pairs are found by the module that holds them, whatever order a model lists its parameters in."""

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

from rankwise.optimizers.factor_pairs import adapters_of, lora_pairs, trained_besides
from tests.tiny_models import Mlp, tiny_bert, tiny_gpt2


class Backwards(nn.Module):
    """A layer of one's own that registers B first, each factor in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 6), requires_grad=False)
        self.lora_B = nn.Parameter(torch.zeros(5, 2))
        self.scale = nn.Parameter(torch.ones(5))
        self.lora_A = nn.Linear(6, 2, bias=False)


def test_a_is_a_and_b_is_b_in_any_order_of_registration() -> None:
    first, second = Backwards(), Backwards()
    first.lora_B.requires_grad_(False)
    pairs = lora_pairs(nn.Sequential(first, second))
    assert [pair.name for pair in pairs] == ["0", "1"]
    for pair, layer in zip(pairs, (first, second), strict=True):
        assert pair.A is layer.lora_A.weight
        assert pair.B is layer.lora_B
        assert pair.layer is layer


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
def test_every_peft_layer_has_its_own_two(make: Any) -> None:
    """The oracle is the naming of PEFT's parameters."""
    model = get_peft_model(make(), LoraConfig(r=4, target_modules="all-linear"))
    parameters = dict(model.named_parameters())
    pairs = lora_pairs(model)
    assert len(pairs) == sum("lora_A" in name for name in parameters)
    for pair in pairs:
        assert pair.A is parameters[f"{pair.name}.lora_A.default.weight"]
        assert pair.B is parameters[f"{pair.name}.lora_B.default.weight"]


def test_convolutions_and_embeddings_are_pairs_too() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(11, 6), "conv": nn.Conv2d(3, 8, 3), "linear": nn.Linear(4, 4)})
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["table", "conv"]))
    table, conv = lora_pairs(adapted)
    assert (table.embedding, conv.embedding) == (True, False)
    assert [tuple(p.shape) for p in (*table.factors, *conv.factors)] == [(2, 11), (6, 2), (2, 3, 3, 3), (8, 2, 1, 1)]


def test_adapters_can_be_told_apart() -> None:
    model = get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["lin0"]))
    model.add_adapter("second", LoraConfig(r=3, target_modules=["lin0"]))
    (trained,) = lora_pairs(model)
    assert trained.adapter == "default", "the inactive one is not trained"
    assert adapters_of(trained.layer) == {"default", "second"}
    model.set_adapter("second")
    (trained,) = lora_pairs(model)
    assert (trained.adapter, len(trained.A)) == ("second", 3)
    with pytest.raises(ValueError, match="no trainable LoRA layers of the adapter 'default'"):
        lora_pairs(model, "default")


def test_what_is_trained_besides_is_in_no_pair() -> None:
    model = get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["head"], bias="lora_only"))
    names = [name for name, _ in trained_besides(model, lora_pairs(model))]
    assert [name.split("base_model.model.")[1] for name in names] == [
        "lin0.base_layer.bias", "head.modules_to_save.default.weight", "head.modules_to_save.default.bias",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Mlp(), "get_peft_model"),
        (
            lambda: get_peft_model(Mlp(), AdaLoraConfig(target_modules=["lin0"], total_step=10)),
            "AdaLoRA's three factors",
        ),
        (lambda: nn.Sequential(unfit()), r"A \(3, 6\) and B \(5, 2\) of 0"),
    ],
)
def test_what_is_no_pair_is_refused(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_pairs(model())


def unfit() -> Backwards:
    layer = Backwards()
    layer.lora_A = nn.Linear(6, 3, bias=False)
    return layer
