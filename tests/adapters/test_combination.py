"""Σ wᵢΔWᵢ of several adapters against the dense sum."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rankwise.adapters import DeepLoraConfig, save_as_lora
from rankwise.testing.adapter_contract import deeplora_layers, disturbed
from tests.adapters.test_export import deltas, load, mixed, mlp, relative_difference, trained

EVERY = ["words", "lines", "square", "transposed", "head"]


def two(**second: Any) -> Any:
    model = trained(mixed(), target_modules=EVERY)
    model.add_adapter("second", DeepLoraConfig(**{"r": 2, "inner_depth": 2, "target_modules": EVERY[1:4], **second}))
    return disturbed(model, "second", seed=7).to(torch.float64).eval()


def updates(model: Any, name: str) -> dict[str, Tensor]:
    layers = deeplora_layers(model).items()
    return {key: layer.get_delta_weight(name).detach() for key, layer in layers if name in layer.r}


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, -2.0), (0.0, 1.5)])
def test_the_sum_is_exact(weights: tuple[float, float]) -> None:
    model = two()
    model.add_weighted_adapter(["default", "second"], list(weights), "sum")
    first, second, total = (updates(model, name) for name in ("default", "second", "sum"))
    assert total.keys() == first.keys()
    for name, found in total.items():
        wanted = weights[0] * first[name] + weights[1] * second.get(name, torch.zeros_like(first[name]))
        assert (found - wanted).norm() < 1e-6 * (first[name].norm() + 1), name


def test_the_best_of_a_lower_rank() -> None:
    model = two()
    model.add_weighted_adapter(["default", "second"], [1.0, -1.0], "sum", combination_type="svd", svd_rank=3)
    first, second, total = (updates(model, name) for name in ("default", "second", "sum"))
    U, S, Vh = torch.linalg.svd(first["base_model.model.transposed"] - second["base_model.model.transposed"])
    expected = (U[:, :3] * S[:3]) @ Vh[:3]
    assert relative_difference(total["base_model.model.transposed"], expected) < 1e-6
    assert all(layer.r["sum"] <= 3 for layer in deeplora_layers(model).values())


def test_the_combined_adapter_is_one_like_any_other(tmp_path: Any) -> None:
    model = two()
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    ids = torch.randint(0, 40, (5, 9), generator=torch.Generator().manual_seed(0))
    combined = model(ids)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".second." in name)
    model.save_pretrained(tmp_path / "all", selected_adapters=["sum"])
    again = load(tmp_path / "all" / "sum", mixed()).eval()
    torch.testing.assert_close(again(ids), combined, rtol=0, atol=1e-6)
    model.delete_adapter("sum")
    assert all("sum" not in layer.r for layer in deeplora_layers(model).values())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((["default"], [1.0, 2.0], "sum"), "one weight for each adapter"),
        ((["default", "third"], [1.0, 2.0], "sum"), "no adapter named 'third'; this model has default, second"),
        ((["default", "second"], [1.0, 2.0], "second"), "'second' is there already"),
        ((["default", "second"], [1.0, 2.0], "sum", "ties"), "not unique"),
        ((["default", "second"], [1.0, 2.0], "sum", "svd"), "needs svd_rank"),
        ((["default", "second"], [1.0, 2.0], "sum", "cat", 4), "'cat' takes none"),
    ],
    ids=["weights", "unknown", "taken", "kind", "no-rank", "rank"],
)
def test_mistakes_are_named_and_nothing_is_added(arguments: tuple[Any, ...], says: str) -> None:
    model = two()
    with pytest.raises(ValueError, match=says):
        model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"default", "second"}


def test_modules_to_save_and_merged_adapters_are_refused() -> None:
    model = trained(mlp(), modules_to_save=["head"])
    model.add_adapter("second", DeepLoraConfig(r=2, target_modules=["lin0"], modules_to_save=["head"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model = two()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")


@pytest.mark.parametrize("owner", ["default", "second"])
def test_a_trained_head_of_one_adapter_goes_along(owner: str) -> None:
    heads = {"default": None, "second": None, owner: ["head"]}
    model = trained(mlp(), modules_to_save=heads["default"])
    model.add_adapter("second", DeepLoraConfig(r=2, target_modules=["lin0"], modules_to_save=heads["second"]))
    disturbed(model, "second", seed=3)
    head = model.base_model.model.head.modules_to_save
    with torch.no_grad():
        head[owner].weight.add_(torch.randn(head[owner].weight.shape))
    model.add_weighted_adapter(["default", "second"], [1.0, -0.5], "sum")
    assert torch.equal(head["sum"].weight, head[owner].weight)
    assert torch.equal(head["sum"].bias, head[owner].bias)
    with torch.no_grad():  # a copy of its own
        head[owner].weight.zero_()
    assert head["sum"].weight.any()
    assert model.peft_config["sum"].modules_to_save == ["head"]


def test_trained_tokens_are_refused() -> None:
    model = trained(mixed(), target_modules=["square"], trainable_token_indices={"words": [1, 5]})
    model.add_adapter("second", DeepLoraConfig(r=2, target_modules=["square"]))
    with pytest.raises(ValueError, match="trainable_token_indices"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")


def test_the_combined_adapter_exports(tmp_path: Any) -> None:
    model = two(target_modules=["head"])
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    save_as_lora(model, tmp_path / "lora", adapter_name="sum")
    found = deltas(load(tmp_path / "lora", mixed()))
    for name, delta in updates(model, "sum").items():
        short = name.removeprefix("base_model.model.")
        assert relative_difference(found[short].reshape(delta.shape), delta) < 1e-5, name
