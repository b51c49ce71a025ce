"""A loop of the reader's own, and transformers' Trainer, against the update rule written out on dense weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Trainer, TrainingArguments

from rankwise.adapters import (
    DeepLoraConfig,
    DeepLoraLayer,
    create_deeplora_optimizer,
    initialize_deeplora_weights,
    save_as_lora,
)
from rankwise.testing.adapter_contract import deeplora_layers
from tests.interoperability.plain_loop import (
    RATES,
    adapted_bert,
    assert_moved,
    assert_same,
    batches,
    frozen,
    train,
    trainable,
)
from tests.tiny_models import Mlp, tiny_bert

LR, RATIO, EPS = 5e-2, 0.5, 1e-6


class WrittenOut:
    """The adapted network as W₀ + U(W̃_L⋯W̃_1 − ε^L·I)Vᵀ in plain tensors, and SGD or Adam from their formulas."""

    def __init__(self, model: PeftModel, base: nn.Module):
        self.base, self.shift = base, {}
        self.factors: dict[str, list[Tensor]] = {}
        for name, layer in deeplora_layers(model).items():
            key = name.removeprefix("base_model.model.")
            parts = (layer.deeplora_left, layer.deeplora_inner, layer.deeplora_right)
            self.factors[key] = [part["default"].weight.detach().clone().requires_grad_() for part in parts]
            zero_left = model.peft_config["default"].zero_left
            self.shift[key] = 0.0 if zero_left else layer.init_scale["default"] ** layer.inner_depth["default"]
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for f in self.factors.values() for p in f]
        self.steps = 0

    def __call__(self, x: Tensor) -> Tensor:
        weights = {}
        for name, (U, inner, Vt) in self.factors.items():
            core = torch.linalg.multi_dot(list(inner.flip(0)))
            update = U @ (core - self.shift[name] * torch.eye(len(core), dtype=core.dtype)) @ Vt
            weights[f"{name}.weight"] = self.base.get_parameter(f"{name}.weight") + update
        return functional_call(self.base, weights, (x,))

    def step(self, loss: Tensor, kind: str) -> None:
        parameters = [p for f in self.factors.values() for p in f]
        rates = [LR * RATIO, LR, LR * RATIO] * len(self.factors)
        self.steps += 1
        for p, g, lr, (m, v) in zip(
            parameters, torch.autograd.grad(loss, parameters), rates, self.moments, strict=True
        ):
            if kind == "Adam":
                m.lerp_(g, 0.1)
                v.lerp_(g.square(), 0.001)
                g = (m / (1 - 0.9**self.steps)) / ((v / (1 - 0.999**self.steps)).sqrt() + EPS)
            p.data -= lr * g


def regression(rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(rows, width, generator=generator, dtype=torch.float64) for width in (20, 4))


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
@pytest.mark.parametrize("variant", ["zero-left", "random"])
def test_a_plain_loop_follows_the_update_rule_on_the_written_out_weights(variant: str, kind: str) -> None:
    torch.manual_seed(0)
    base = Mlp().double().requires_grad_(False)
    config = DeepLoraConfig(
        r=4, variant=variant, init_scale=0.5, direction_dropout=0.0, target_modules=["lin0", "lin1"]
    )
    reference = Mlp().double().requires_grad_(False)
    reference.load_state_dict(base.state_dict())
    model = get_peft_model(base, config)
    oracle = WrittenOut(model, reference)
    untouched = frozen(model)
    start = trainable(model)
    optimizer = create_deeplora_optimizer(model, getattr(torch.optim, kind), lr=LR, outer_lr_ratio=RATIO)
    x, y = regression()
    for _ in range(6):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        expected = (oracle(x) - y).square().mean()
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
        oracle.step(expected, kind)
    found = {
        f"{name}.{part}": factor
        for name, factors in oracle.factors.items()
        for part, factor in zip(("left", "inner", "right"), factors, strict=True)
    }
    ours = {
        name.removeprefix("base_model.model.").replace("deeplora_", "").replace(".default.weight", ""): value
        for name, value in trainable(model).items()
    }
    assert_same(ours, {name: value.detach() for name, value in found.items()}, scale=1e4)  # Adam divides by √v ≈ 0
    assert_moved(trainable(model), start, only="deeplora_")
    assert_same(frozen(model), untouched, scale=0)


def test_two_halves_accumulated_are_one_batch() -> None:
    whole, halves = adapted_bert(), adapted_bert()
    batch = batches(1, 8)[0]
    train(whole, create_deeplora_optimizer(whole, torch.optim.SGD, **RATES), [batch])
    optimizer = create_deeplora_optimizer(halves, torch.optim.SGD, **RATES)
    for part in (slice(0, 4), slice(4, 8)):
        (halves(**{key: value[part] for key, value in batch.items()}).loss / 2).backward()
    optimizer.step()
    assert_same(trainable(halves), trainable(whole))


def test_a_schedule_keeps_the_ratio_of_the_rates() -> None:
    model = adapted_bert()
    optimizer = create_deeplora_optimizer(model, **RATES)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    train(model, optimizer, batches(3), scheduler=schedule)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"inner": 1e-2 / 4, "outer": 5e-3 / 4, "head": 1e-3 / 4})


def test_going_on_from_a_saved_state_equals_never_stopping(tmp_path: Path) -> None:
    whole = adapted_bert()
    train(whole, create_deeplora_optimizer(whole, **RATES), batches())

    first = adapted_bert()
    optimizer = create_deeplora_optimizer(first, **RATES)
    train(first, optimizer, batches()[:2])
    first.save_pretrained(tmp_path / "adapter")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    second = PeftModel.from_pretrained(tiny_bert().double(), tmp_path / "adapter", is_trainable=True)
    optimizer = create_deeplora_optimizer(second, **RATES)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(second, optimizer, batches()[2:])
    assert_same(trainable(second), trainable(whole), scale=0)


def test_the_exported_lora_needs_none_of_our_layers(tmp_path: Path) -> None:
    model = adapted_bert()
    train(model, create_deeplora_optimizer(model, **RATES), batches())
    save_as_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny_bert().double(), tmp_path / "lora").eval()
    assert any(isinstance(module, LoraLayer) for module in plain.modules())
    assert not any(isinstance(module, DeepLoraLayer) for module in plain.modules())
    batch = batches()[0]
    torch.testing.assert_close(plain(**batch).logits, model.eval()(**batch).logits, rtol=1e-10, atol=1e-12)


def transformers_trainer(model: nn.Module, folder: Path, optimizer: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, lr_scheduler_type="constant",
        max_grad_norm=0.0, save_strategy="no", logging_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    rows = [{key: value[i] for key, value in batch.items()} for batch in batches() for i in range(4)]
    return Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None))


@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.SGD, 2.0), (torch.optim.AdamW, 1e-2)], ids=["SGD", "AdamW"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformers_trainer_takes_the_same_steps(
    tmp_path: Path, optimizer: type[torch.optim.Optimizer], lr: float
) -> None:
    ours, theirs = adapted_bert(variant="compressed"), adapted_bert(variant="compressed")
    for model in (ours, theirs):  # the user's to do: the frames before the trainer
        initialize_deeplora_weights(model, batches(1))
    start, rates = trainable(ours), {**RATES, "lr": lr}
    train(ours, create_deeplora_optimizer(ours, optimizer, **rates), batches())
    transformers_trainer(theirs, tmp_path, create_deeplora_optimizer(theirs, optimizer, **rates)).train()
    assert_moved(trainable(theirs), start)
    assert_same(trainable(theirs), trainable(ours))
