"""Tiny runs of a method, as the runner makes them, for the tests of the methods."""

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.finetuning import FinetuneSettings, make_task, read_table
from rankwise.finetuning.methods import METHODS, adapt, create_optimizer, prepare
from rankwise.finetuning.models import load_model, load_tokenizer
from rankwise.finetuning.tasks import Task
from rankwise.finetuning.training import first_batches, make_trainer, place_frames, quiet_trainer

# Trainer collects garbage whenever it starts to train. Of the half second that a tiny run takes, three fifths went into looking
# through the imported libraries for it.
gc.freeze()

KINDS = {"pair-similarity": "pairs", "classification": "classes"}
MEMORIZED = [0, 1]
STEPS = 20
HEAD_LR = 2e-2
ADAPTERS = [name for name, method in METHODS.items() if method.offered]
# High enough to move a tiny random model in so few steps. Its weights are a tenth of a pretrained model's: what turns or scales
# them has to do so ten times as far.
RATES = {
    "full": 3e-3, "galore": 3e-3, "adarankgrad": 1e-2, "full-width": 6e-3, "deep-lora": 1e-2, "lora-plus": 3e-3, "lora-fa": 6e-2, "lora-rite": 1e-1, "relora": 3e-2, "olora": 2.5e-2, "mica": 3e-2,
    "velora": 2.5e-2, "adalora": 1e-1, "delora": 3e-1, "hira": 3e-1, "deft": 2.5e-2, "adamss": 3e-2, "loha": 3e-2,
    "lokr": 3e-2, "peanut": 6e-2, "vera": 1e-1, "pvera": 1e-1, "randlora": 3e-3, "vblora": 3e-2, "tinylora": 1e-1,
    "osf": 1e-1, "psoft": 3e-1, "oft": 3e-2, "boft": 3e-1, "hra": 3e-2, "road": 5e-1, "ia3": 5e-1, "frod": 3e-1,
    "waveft": 1e-3, "c3a": 2e-1, "shira": 2.5e-2, "supertuning": 2.5e-2,
}  # fmt: skip


def settings(method: str, **changes: Any) -> FinetuneSettings:
    values: dict[str, Any] = {
        "model": "", "data": "", "out": "", "method": method, "lr": RATES.get(method, 1e-2), "head_lr": HEAD_LR,
        "r": 4, "init_scale": 0.1, "steps": STEPS, "batch_size": 2, "precision": "fp32",
        "schedule": "constant", "outer_lr_ratio": 1.0, "direction_dropout": 0.0,
    }  # fmt: skip
    return FinetuneSettings(**{**values, **changes})


def tiny_tasks(tiny: SimpleNamespace) -> dict[str, Task]:
    """A task of each kind on the tiny model's files."""
    tokenizer, _ = load_tokenizer(tiny.model)
    return {
        kind: make_task(kind, read_table(getattr(tiny, file)), tokenizer, source=tiny.model, max_length=32)
        for kind, file in KINDS.items()
    }


def pretrained(tiny: SimpleNamespace, task: Task) -> nn.Module:
    torch.manual_seed(5)  # the head's start
    return load_model(task, tiny.model, None).eval()


def adapted(tiny: SimpleNamespace, task: Task, chosen: FinetuneSettings) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer as a run makes them."""
    model = adapt(pretrained(tiny, task), task, chosen)
    batches = first_batches(task, chosen, MEMORIZED)
    if chosen.method == "deep-lora":
        place_frames(model, task, chosen, batches, "fp32")
    prepare(model, task, chosen, batches)
    return model, create_optimizer(model, task, chosen)


def train(
    model: nn.Module,
    task: Task,
    chosen: FinetuneSettings,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    *,
    save_every: int | None = None,
    checkpoint: Path | None = None,
) -> Any:
    """Train on the memorized rows, from a checkpoint if one is given; the trainer."""
    with quiet_trainer():
        trainer = make_trainer(model, task, chosen, MEMORIZED, optimizer, "fp32", output=folder, save_every=save_every)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.eval()
    return trainer


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def outputs(model: nn.Module, task: Task) -> Tensor:
    """What the model says of twelve rows, in eval mode: logits, or similarities."""
    model.eval()
    batch = task.collate(range(12))
    if not task.has_head:
        return task.predict(model, batch)  # type: ignore[return-value]
    del batch["targets"]
    return model(**batch).logits


@torch.no_grad()
def loss(model: nn.Module, task: Task) -> float:
    return float(task.loss(model, task.collate(MEMORIZED)))


def original_name(name: str) -> str:
    """What a module or parameter of the pretrained model is called before PEFT wraps it."""
    for added in ("base_model.model.", "base_layer.", "original_module."):
        name = name.replace(added, "")
    return name
