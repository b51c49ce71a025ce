"""Parameter groups and the optimizer made of them."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rankwise.adapters import DeepLoraConfig, create_deeplora_optimizer, deeplora_param_groups
from tests.tiny_models import Mlp


def adapted(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Mlp(), DeepLoraConfig(**{"r": 4, "target_modules": ["lin0", "lin1"], **settings}))


def names_of(model: nn.Module, parameters: list[Tensor]) -> list[str]:
    by_id = {id(p): name.removeprefix("base_model.model.") for name, p in model.named_parameters()}
    return [by_id[id(p)] for p in parameters]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(8, 20, generator=generator), torch.randn(8, 4, generator=generator)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def test_groups_and_rates() -> None:
    model = adapted(modules_to_save=["head"], bias="deeplora_only")
    groups = deeplora_param_groups(model, lr=1e-2, outer_lr_ratio=0.1, head_lr=5e-4)
    assert [(g["name"], g["lr"]) for g in groups] == [("inner", 1e-2), ("outer", pytest.approx(1e-3)), ("head", 5e-4)]
    inner, outer, head = (names_of(model, g["params"]) for g in groups)
    assert inner == [f"{x}.deeplora_inner.default.weight" for x in ("lin0", "lin1")]
    assert sorted(outer) == sorted(
        f"{x}.deeplora_{side}.default.weight" for x in ("lin0", "lin1") for side in ("left", "right")
    )
    assert set(head) == {"lin0.base_layer.bias", *(f"head.modules_to_save.default.{x}" for x in ("weight", "bias"))}
    everything = [id(p) for g in groups for p in g["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_head_learns_at_lr_unless_told() -> None:
    assert deeplora_param_groups(adapted(modules_to_save=["head"]), lr=0.02)[-1]["lr"] == 0.02


def test_a_head_rate_of_zero_is_kept() -> None:
    assert deeplora_param_groups(adapted(modules_to_save=["head"]), lr=0.02, head_lr=0.0)[-1]["lr"] == 0.0


def test_empty_groups_are_left_out() -> None:
    assert [g["name"] for g in deeplora_param_groups(adapted(), lr=1e-2)] == ["inner", "outer"]
    model = adapted(variant="random")
    assert [g["name"] for g in deeplora_param_groups(model, lr=1e-2, outer_lr_ratio=0)] == ["inner"]


def test_a_zero_left_factor_cannot_be_frozen() -> None:
    model = adapted(variant="zero-left")
    with pytest.raises(ValueError, match="nothing could be learnt"):
        create_deeplora_optimizer(model, outer_lr_ratio=0)
    assert all(p.requires_grad for name, p in model.named_parameters() if "deeplora_" in name)


def test_ratio_zero_freezes_the_outer_factors_and_trains_the_inner_ones() -> None:
    model = adapted(variant="compressed", init_scale=0.5, modules_to_save=["head"])
    optimizer = create_deeplora_optimizer(model, torch.optim.SGD, lr=0.1, outer_lr_ratio=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 2)
    for name, parameter in model.named_parameters():
        moves = "deeplora_inner" in name or "modules_to_save" in name
        assert parameter.requires_grad == moves, name
        assert (parameter.grad is not None) == moves, name
        assert torch.equal(parameter, before[name]) != moves, name


def test_each_group_moves_at_its_own_rate() -> None:
    """One plain SGD step moves every parameter by minus its group's rate times its gradient."""
    model = adapted(init_scale=0.5, init_weights=False, modules_to_save=["head"])
    optimizer = create_deeplora_optimizer(model, torch.optim.SGD, lr=0.1, outer_lr_ratio=0.5, head_lr=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, optimizer, 1)
    for name, parameter in model.named_parameters():
        if name in before:
            rate = 0.1 if "deeplora_inner" in name else 0.05 if "deeplora_" in name else 0.01
            torch.testing.assert_close(parameter.detach(), before[name] - rate * parameter.grad, msg=name)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_adam_kinds_get_a_small_eps_and_no_weight_decay(kind: type[torch.optim.Optimizer]) -> None:
    defaults = create_deeplora_optimizer(adapted(), kind, lr=1e-2).defaults
    assert (defaults["eps"], defaults["weight_decay"]) == (1e-6, 0.0)
    told = create_deeplora_optimizer(adapted(), kind, lr=1e-2, eps=1e-4, weight_decay=0.1)
    assert {(g["eps"], g["weight_decay"]) for g in told.param_groups} == {(1e-4, 0.1)}


def test_other_kinds_keep_their_defaults() -> None:
    plain = torch.optim.RMSprop(nn.Linear(2, 2).parameters()).defaults["eps"]
    assert create_deeplora_optimizer(adapted(), torch.optim.RMSprop, lr=1e-2).defaults["eps"] == plain
    sgd = create_deeplora_optimizer(adapted(), torch.optim.SGD, lr=1e-2, outer_lr_ratio=1, momentum=0.9)
    assert {g["momentum"] for g in sgd.param_groups} == {0.9}
    assert [g["lr"] for g in sgd.param_groups] == [1e-2, 1e-2]


def test_default_optimizer_is_adamw() -> None:
    assert type(create_deeplora_optimizer(adapted())) is torch.optim.AdamW


def test_resuming_equals_never_stopping() -> None:
    settings = {"lr": 1e-2, "outer_lr_ratio": 0.1, "head_lr": 1e-3}
    model = adapted(direction_dropout=0.0, modules_to_save=["head"])
    optimizer = create_deeplora_optimizer(model, **settings)
    train(model, optimizer, 3)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    saved = torch.optim.Optimizer.state_dict(optimizer)
    saved = {"state": {k: {n: v.clone() for n, v in s.items()} for k, s in saved["state"].items()},
             "param_groups": saved["param_groups"]}  # fmt: skip
    train(model, optimizer, 3)

    again = adapted(direction_dropout=0.0, modules_to_save=["head"])
    again.load_state_dict(weights)
    resumed = create_deeplora_optimizer(again, lr=1.0)  # other rates: those of the state must win
    resumed.load_state_dict(saved)
    assert [(g["name"], g["lr"]) for g in resumed.param_groups] == [
        ("inner", 1e-2), ("outer", pytest.approx(1e-3)), ("head", 1e-3),
    ]  # fmt: skip
    train(again, resumed, 3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_only_the_active_adapter_is_trained() -> None:
    model = adapted()
    model.add_adapter("second", DeepLoraConfig(r=2, target_modules=["lin0"]))
    model.set_adapter("second")
    names = [n for g in deeplora_param_groups(model, lr=1e-2) for n in names_of(model, g["params"])]
    assert len(names) == 3
    assert all(".second." in name for name in names)


@pytest.mark.parametrize("rates", [{"lr": -1.0}, {"lr": 1.0, "outer_lr_ratio": -0.1}, {"lr": 1.0, "head_lr": -1e-3}])
def test_negative_rates_are_refused(rates: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="negative"):
        deeplora_param_groups(adapted(), **rates)


def test_models_without_trainable_factors_are_refused() -> None:
    with pytest.raises(ValueError, match="get_peft_model"):
        create_deeplora_optimizer(Mlp(), lr=1e-2)
    with pytest.raises(ValueError, match="is_trainable"):
        create_deeplora_optimizer(adapted(inference_mode=True), lr=1e-2)
