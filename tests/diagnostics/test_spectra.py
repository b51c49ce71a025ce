"""Spectra come from the factors; the dense ΔW in float64 is the judge."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rankwise.adapters import DeepLoraConfig
from rankwise.diagnostics import adapter_spectra
from tests.tiny_models import Mlp, tiny_bert

LINEAR = ["lin0", "lin1"]


def randomized(model: nn.Module) -> nn.Module:
    """Every adapter parameter of size about one, so that no ΔW is zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


def dense(model: nn.Module, name: str) -> torch.Tensor:
    """ΔW in float64 from the factors, not through the code under test."""
    layer: Any = model.get_submodule("base_model.model." + name)
    if hasattr(layer, "deeplora_left"):
        inner = layer.deeplora_inner["default"].weight.double()
        core = torch.linalg.multi_dot(list(inner.flip(0))) if len(inner) > 1 else inner[0]
        core = core - float(layer.init_scale["default"]) ** len(inner) * torch.eye(inner.shape[-1], dtype=torch.float64)
        return layer.deeplora_left["default"].weight.double() @ core @ layer.deeplora_right["default"].weight.double()
    scale = layer.scaling["default"]
    return scale * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()


CONFIGS = {
    "lora": LoraConfig(r=5, lora_alpha=15, target_modules=LINEAR),
    "rslora": LoraConfig(r=5, lora_alpha=15, use_rslora=True, target_modules=LINEAR),
    "deep-1": DeepLoraConfig(r=5, inner_depth=1, init_scale=0.5, target_modules=LINEAR),
    "deep-3": DeepLoraConfig(r=5, inner_depth=3, init_scale=0.5, target_modules=LINEAR),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_singular_values_are_those_of_the_dense_update(kind: str) -> None:
    model = randomized(get_peft_model(Mlp(), CONFIGS[kind]))
    spectra = adapter_spectra(model)
    assert [layer.name for layer in spectra] == LINEAR
    assert [layer.shape for layer in spectra] == [(24, 20), (24, 24)]
    for layer in spectra:
        expected = torch.linalg.svdvals(dense(model, layer.name).detach())
        found = torch.tensor(layer.singular_values, dtype=torch.float64)
        # float32 factors: rounding is a few eps of the largest value
        torch.testing.assert_close(found, expected[:5], atol=2e-6 * float(expected[0]), rtol=0)
        energy = expected.square().cumsum(0) / expected.square().sum()
        assert layer.width == layer.rank == 5
        assert layer.rank_99 == int((energy < 0.99).sum()) + 1
        assert layer.stable_rank == pytest.approx(float(expected.square().sum() / expected[0] ** 2), rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "deep-3"])
def test_a_planted_rank_is_found(kind: str) -> None:
    model = randomized(get_peft_model(Mlp(), CONFIGS[kind]))
    for module in model.modules():
        if hasattr(module, "lora_B"):
            module.lora_B["default"].weight.data[:, 2:] = 0
        elif hasattr(module, "deeplora_left"):
            module.deeplora_left["default"].weight.data[:, 2:] = 0
    assert {layer.rank for layer in adapter_spectra(model)} == {2}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_untrained_adapter_has_rank_zero_and_finite_numbers(kind: str) -> None:
    for layer in adapter_spectra(get_peft_model(Mlp(), CONFIGS[kind])):
        assert (layer.rank, layer.rank_99, layer.stable_rank) == (0, 0, 0.0)
        assert layer.singular_values == [0.0] * 5


def test_width_above_the_layer() -> None:
    model = randomized(get_peft_model(Mlp(), LoraConfig(r=40, target_modules=["lin0"])))
    (layer,) = adapter_spectra(model)
    assert layer.width == 40
    assert layer.rank == 20
    expected = torch.linalg.svdvals(dense(model, "lin0").detach())
    found = torch.tensor(layer.singular_values[:20], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=2e-6 * float(expected[0]), rtol=0)


def test_names_are_those_of_the_base_model() -> None:
    base = tiny_bert()
    names = {name for name, _ in base.named_modules()}
    model = get_peft_model(base, DeepLoraConfig(r=2, target_modules=["query", "value"]))
    spectra = adapter_spectra(model)
    assert len(spectra) == 4
    assert all(layer.name in names for layer in spectra)


def test_the_named_adapter_is_read() -> None:
    model = get_peft_model(Mlp(), LoraConfig(r=3, target_modules=["lin0"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lin1"]))
    assert [(layer.name, layer.width) for layer in adapter_spectra(model, "other")] == [("lin1", 2)]


@pytest.mark.parametrize("name", ["default", "absent"])
def test_no_such_adapter(name: str) -> None:
    model = Mlp() if name == "default" else get_peft_model(Mlp(), CONFIGS["lora"])
    with pytest.raises(ValueError, match=f"adapter named '{name}'"):
        adapter_spectra(model, name)


def test_nothing_is_changed() -> None:
    model = randomized(get_peft_model(Mlp(), CONFIGS["deep-3"]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapter_spectra(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_adalora_spectra_are_those_of_pefts_own_update() -> None:
    from peft import AdaLoraConfig

    config = AdaLoraConfig(target_r=2, init_r=4, lora_alpha=6, total_step=10, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(16, 12)), config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_E["default"].copy_(torch.randn(4, 1))
    (spectrum,) = adapter_spectra(model)
    expected = torch.linalg.svdvals(layer.get_delta_weight("default"))
    assert torch.allclose(torch.tensor(spectrum.singular_values), expected[:4], rtol=1e-4, atol=1e-6)
