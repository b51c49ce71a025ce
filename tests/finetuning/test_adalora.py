"""AdaLoRA: its budget and its penalty are ours to call, and a checkpoint holds where both stand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rankwise.finetuning import methods
from rankwise.finetuning.methods import AdaLoraBudget, adalora_orthogonality, adapt
from rankwise.finetuning.tasks import Task
from tests.finetuning.method_runs import STEPS, adapted, outputs, pretrained, settings, tiny_tasks, train

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

START, TARGET = 6, 4  # directions a layer: 1.5·r, and r of the settings


@pytest.fixture(scope="module")
def tasks(tiny: SimpleNamespace) -> dict[str, Task]:
    return tiny_tasks(tiny)


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def directions_left(model: nn.Module) -> list[int]:
    return [int((layer.lora_E["default"] != 0).sum()) for layer in layers(model)]


def test_the_budget_falls_to_the_target(tiny: SimpleNamespace, tasks: dict[str, Task], tmp_path: Path) -> None:
    task, chosen = tasks["classification"], settings("adalora")
    model, optimizer = adapted(tiny, task, chosen)
    trainer = train(model, task, chosen, optimizer, tmp_path)
    assert all(layer.lora_E["default"].shape == (START, 1) for layer in layers(model))
    left = directions_left(model)
    assert sum(left) == TARGET * len(left)
    assert len(set(left)) > 1  # not the same for every layer: that is the point
    (budget,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, AdaLoraBudget)]
    assert budget.updates == STEPS


@pytest.mark.parametrize("step", [10, 17], ids=["while the budget falls", "at the target"])
def test_a_checkpoint_holds_importance_and_budget(
    tiny: SimpleNamespace, tasks: dict[str, Task], tmp_path: Path, step: int
) -> None:
    """Without the first, other directions would be dropped; without the second, those that were would come back."""
    task, chosen = tasks["pair-similarity"], settings("adalora")
    model, optimizer = adapted(tiny, task, chosen)
    train(model, task, chosen, optimizer, tmp_path, save_every=step)
    again, its_optimizer = adapted(tiny, task, chosen)
    train(again, task, chosen, its_optimizer, tmp_path, checkpoint=tmp_path / f"checkpoint-{step}")
    assert directions_left(again) == directions_left(model)
    assert sum(directions_left(again)) == TARGET * len(layers(again))
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_dropped_directions_of_another_time_do_not_cut_the_saved_adapter(
    tiny: SimpleNamespace, tasks: dict[str, Task], tmp_path: Path
) -> None:
    """Early stopping puts the factors back to where they were best, when other directions were left."""
    task, chosen = tasks["pair-similarity"], settings("adalora")
    model, optimizer = adapted(tiny, task, chosen)
    train(model, task, chosen, optimizer, tmp_path / "training")
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_E["default"].fill_(0.3)
    model.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    loaded = PeftModel.from_pretrained(pretrained(tiny, task), tmp_path / "adapter")
    assert torch.equal(outputs(loaded, task), outputs(model, task))


def test_without_its_callback_adalora_would_be_plain(
    tiny: SimpleNamespace, tasks: dict[str, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above would see: nobody but the callback moves the budget."""
    monkeypatch.setattr(methods, "callbacks", lambda settings: [])
    task, chosen = tasks["pair-similarity"], settings("adalora")
    model, optimizer = adapted(tiny, task, chosen)
    train(model, task, chosen, optimizer, tmp_path)
    assert directions_left(model) == [START] * len(layers(model))


def test_the_budget_is_moved_between_step_and_zero_grad(
    tiny: SimpleNamespace, tasks: dict[str, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are counted from 1 to the last, and the gradients that importance is made of are there."""
    task, chosen = tasks["pair-similarity"], settings("adalora", steps=5)
    model, optimizer = adapted(tiny, task, chosen)
    tuner, seen = model.base_model, []
    update = tuner.update_and_allocate

    def watched(step: int) -> None:
        seen.append((step, all(p.grad is not None for p in model.parameters() if p.requires_grad)))
        update(step)

    monkeypatch.setattr(tuner, "update_and_allocate", watched)
    train(model, task, chosen, optimizer, tmp_path)
    assert seen == [(step, True) for step in range(1, 6)]


def test_a_budget_that_never_moved_is_a_bug() -> None:
    budget = AdaLoraBudget()
    with pytest.raises(RuntimeError, match="never updated"):
        budget.on_train_end(None, SimpleNamespace(global_step=3), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [2, 3, 7, 10])
def test_the_target_is_reached_in_few_steps_too(
    tiny: SimpleNamespace, tasks: dict[str, Task], tmp_path: Path, steps: int
) -> None:
    task, chosen = tasks["pair-similarity"], settings("adalora", steps=steps)
    model, optimizer = adapted(tiny, task, chosen)
    train(model, task, chosen, optimizer, tmp_path)
    assert sum(directions_left(model)) == TARGET * len(layers(model))


def test_the_penalty_is_peft_s_own(tiny: SimpleNamespace, tasks: dict[str, Task]) -> None:
    task = tasks["classification"]
    model: Any = adapt(pretrained(tiny, task), task, settings("adalora")).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_()
    batch = task.collate([0, 1, 2])
    labels = batch.pop("targets")
    losses = {}
    for weight in (0.0, 0.5):
        model.peft_config["default"].orth_reg_weight = weight
        with torch.no_grad():
            losses[weight] = model(**batch, labels=labels).loss
    penalty = adalora_orthogonality(model)
    torch.testing.assert_close(penalty.detach(), losses[0.5] - losses[0.0], rtol=1e-5, atol=1e-5)
    penalty.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name)
