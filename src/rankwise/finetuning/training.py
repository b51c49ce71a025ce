"""The training loop that `finetune` and `compare` share: transformers' Trainer with a task's loss."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from rankwise.adapters import (
    InitializationSummary,
    RidgeSummary,
    initialize_deeplora_weights,
    solve_deeplora_weights,
)
from rankwise.errors import UserError
from rankwise.finetuning import methods
from rankwise.finetuning.precision import autocast
from rankwise.finetuning.settings import MEASURED_ROWS, RIDGE_ROWS, WARM_UP, FinetuneSettings
from rankwise.finetuning.tasks import Batch, Classification, Task
from rankwise.finetuning.trainer import Positions, TaskTrainer

_EVALUATION_BATCH = 64


def first_batches(task: Task, settings: FinetuneSettings, positions: Sequence[int]) -> list[Batch]:
    """The batches whose gradient places U and V: drawn by the seed, so that a file sorted by class makes no difference."""
    size = settings.batch_size
    count = min(settings.init_batches, -(-len(positions) // size))
    order = np.random.default_rng(settings.seed).permutation(len(positions))
    return [task.collate([positions[i] for i in order[k * size : (k + 1) * size]]) for k in range(count)]


def place_frames(
    model: nn.Module, task: Task, settings: FinetuneSettings, batches: Sequence[Batch], precision: str
) -> InitializationSummary:
    """Deep LoRA's U and V from the gradient of these batches.

    Raises:
        UserError: a loss or gradient that is zero or not finite.
    """
    where = next(model.parameters()).device
    try:
        with autocast(where, precision):
            return initialize_deeplora_weights(
                model, batches, loss_fn=task.loss, num_batches=len(batches), seed=settings.seed
            )
    except ValueError as error:
        raise UserError(str(error)) from None


def recommended_method(task: Task, rows: int) -> str:
    """What `--method auto` takes (docs/few-labels.md): Deep LoRA where it was measured to be ahead, LoRA elsewhere.

    That is pair similarity on rows few enough to solve for, and classification with as few.
    """
    measured = isinstance(task, Classification) and rows <= MEASURED_ROWS
    return "deep-lora" if _can_be_solved(task, rows) or measured else "lora"


def _can_be_solved(task: Task, rows: int) -> bool:
    return task.ridge_fits and 3 <= rows <= RIDGE_ROWS


def solver_of(task: Task, settings: FinetuneSettings, rows: int) -> str:
    """``ridge`` or ``train``.

    Raises:
        UserError: ridge asked for where it does not fit.
    """
    if settings.method != "deep-lora":
        return "train"
    if settings.solver == "auto":
        return "ridge" if _can_be_solved(task, rows) else "train"
    if settings.solver == "ridge" and not task.ridge_fits:
        raise UserError(
            f"--solver ridge needs an output that the pretrained model already gives; {task.name} has a head that starts "
            "at random. Use --solver train"
        )
    return settings.solver


def solve(
    model: nn.Module, task: Task, settings: FinetuneSettings, positions: Sequence[int], precision: str
) -> RidgeSummary:
    """Deep LoRA's factors in closed form from these rows.

    Raises:
        UserError: too few rows, or outputs that are not finite.
    """
    where = next(model.parameters()).device
    targets = torch.as_tensor(task.targets[list(positions)], dtype=torch.float64)
    try:
        with autocast(where, precision):
            return solve_deeplora_weights(
                model,
                (task.collate([p]) for p in positions),
                targets,
                outputs_fn=cast(Callable[[nn.Module, Batch], torch.Tensor], task.predict),
                seed=settings.seed,
            )
    except ValueError as error:
        raise UserError(str(error)) from None


def make_trainer(
    model: nn.Module,
    task: Task,
    settings: FinetuneSettings,
    positions: Sequence[int],
    optimizer: torch.optim.Optimizer,
    precision: str,
    *,
    output: Path,
    save_every: int | None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TaskTrainer:
    """A trainer over these rows of the task's table; ``save_every=None`` writes no checkpoints."""
    saving: dict[str, Any] = (
        {"save_strategy": "no"} if save_every is None else {"save_steps": save_every, "save_total_limit": 2}
    )
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(WARM_UP * settings.steps) if settings.schedule == "linear" else 0,
        max_grad_norm=0.0,
        logging_steps=1,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=precision == "bf16",
        use_cpu=next(model.parameters()).device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        **saving,
    )
    trainer = TaskTrainer(
        task=task,
        settings=settings,
        model=model,
        args=arguments,
        train_dataset=Positions(positions),
        data_collator=task.collate,
        optimizers=(optimizer, None),
        callbacks=[*methods.callbacks(settings), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def quiet_trainer():  # type: ignore[no-untyped-def]
    """Without the warnings that transformers gives about its own arguments."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


def require_finite(model: nn.Module, settings: FinetuneSettings) -> None:
    """Refuse a diverged model.

    Raises:
        UserError: a trained parameter is NaN or infinite.
    """
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad):
        raise UserError(
            f"training diverged: the adapter holds NaN or infinite numbers; lower --lr (it was {settings.learning_rate:g})"
        )


def predict_rows(task: Task, model: nn.Module, positions: Sequence[int]) -> Any:
    """Predictions on these rows in their order, in fp32 and eval mode: an array, or a list of texts."""
    where = next(model.parameters()).device
    was_training = model.training
    model.eval()
    order = sorted(positions, key=lambda p: len(task.table.rows[p]["text"]))  # equal lengths together: little padding
    predictions: dict[int, Any] = {}
    with torch.no_grad():
        for start in range(0, len(order), _EVALUATION_BATCH):
            chunk = order[start : start + _EVALUATION_BATCH]
            batch = {key: value.to(where) for key, value in task.collate(chunk).items()}
            found = task.predict(model, batch)
            values = found.cpu().tolist() if isinstance(found, torch.Tensor) else found
            predictions.update(zip(chunk, values, strict=True))
    model.train(was_training)
    ordered = [predictions[p] for p in positions]
    return ordered if ordered and isinstance(ordered[0], str) else np.array(ordered)
