"""Inside transformers: Trainer with resume, and ``model.add_adapter``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from rankwise.adapters import DeepLoraConfig, create_deeplora_optimizer, initialize_deeplora_weights
from rankwise.testing.adapter_contract import deeplora_layers
from tests.tiny_models import tiny_bert, token_batch

RATES = {"lr": 1e-2, "outer_lr_ratio": 0.1, "head_lr": 1e-3}


def rows() -> list[dict[str, Tensor]]:
    batch = token_batch(24)
    return [{key: value[i] for key, value in batch.items()} for i in range(24)]


def adapted() -> PeftModel:
    model = get_peft_model(tiny_bert(), DeepLoraConfig(r=4, init_scale=0.1, dropout=0.1, task_type="SEQ_CLS"))
    initialize_deeplora_weights(model, [token_batch()])
    return model


class StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= self.step:
            control.should_save = True
            control.should_training_stop = True


def trainer(folder: Path, *, stop_after: int | None = None, rates: dict[str, float] | None = None) -> Trainer:
    model = adapted()
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, save_strategy="no", logging_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
    )  # fmt: skip
    return Trainer(
        model=model, args=arguments, train_dataset=rows(),
        optimizers=(create_deeplora_optimizer(model, **(rates or RATES)), None),
        callbacks=[StopAfter(stop_after)] if stop_after else [],
    )  # fmt: skip


def rates_of(trainer: Trainer) -> dict[str, float]:
    return {g["name"]: g["initial_lr"] for g in trainer.optimizer.param_groups}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_resuming_equals_never_stopping(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()

    first = trainer(tmp_path / "parts", stop_after=3)
    first.train()
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    middle = {name: p.detach().clone() for name, p in first.model.named_parameters() if p.requires_grad}

    second = trainer(tmp_path / "parts")
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.state.global_step == 6
    wanted = dict(whole.model.named_parameters())
    found = {name: p for name, p in second.model.named_parameters() if p.requires_grad}
    assert any("deeplora_inner" in name for name in found)
    assert any("classifier" in name for name in found)
    for name, parameter in found.items():
        assert torch.equal(parameter, wanted[name]), name
        if "deeplora_inner" in name:
            assert not torch.equal(parameter, middle[name]), f"{name} did not move after the resume"
    assert rates_of(second) == rates_of(whole) == {"inner": 1e-2, "outer": pytest.approx(1e-3), "head": 1e-3}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_rates_of_the_checkpoint_survive(tmp_path: Path) -> None:
    """Groups that a resume flattens into one rate are PEFT's best known LoRA+ bug."""
    trainer(tmp_path, stop_after=3).train()
    second = trainer(tmp_path, rates={"lr": 1.0})
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert rates_of(second) == {"inner": 1e-2, "outer": pytest.approx(1e-3), "head": 1e-3}


def test_add_adapter_of_transformers(tmp_path: Path) -> None:
    model = tiny_bert()
    with torch.no_grad():
        base = model.eval()(**token_batch()).logits
    config = DeepLoraConfig(r=4, variant="compressed", init_scale=0.5, target_modules=["query", "value"])
    model.add_adapter(config, "mine")
    assert len(deeplora_layers(model)) == 4
    with torch.no_grad():
        assert torch.equal(model(**token_batch()).logits, base)
    summary = initialize_deeplora_weights(model, [token_batch()], adapter_name="mine")
    assert all(row.captured > 0 for row in summary.layers)
    optimizer = create_deeplora_optimizer(model, lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        model(**token_batch()).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".deeplora_" in name}
    model.save_pretrained(tmp_path)
    loaded = tiny_bert().eval()
    loaded.load_adapter(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(**token_batch()).logits, model.eval()(**token_batch()).logits)
