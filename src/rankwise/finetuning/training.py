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
from rankwise.finetuning.early_stopping import EarlyStopping
from rankwise.finetuning.precision import autocast
from rankwise.finetuning.processes import ALONE, Processes
from rankwise.finetuning.settings import MEASURED_ROWS, RIDGE_ROWS, WARM_UP, FinetuneSettings
from rankwise.finetuning.tasks import Batch, Classification, Task
from rankwise.finetuning.trainer import TaskTrainer

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
    if settings.early_stopping is not None:
        if settings.solver == "ridge":
            raise UserError("--early-stopping has no steps to stop at with --solver ridge; leave one of them out")
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


def parts_of_a_step(settings: FinetuneSettings, processes: Processes) -> int:
    """How many forward passes share the rows of a step.

    Raises:
        UserError: they cannot be shared out evenly.
    """
    parts = processes.count * settings.accumulate
    if settings.batch_size % parts:
        raise UserError(
            f"a step of --batch-size {settings.batch_size} rows cannot be shared out evenly: {processes.count} processes × "
            f"--accumulate {settings.accumulate} passes are {parts} parts; choose a multiple of {parts}"
        )
    return parts


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
    processes: Processes = ALONE,
    early_stopping: EarlyStopping | None = None,
) -> TaskTrainer:
    """A trainer over these rows of the task's table; ``save_every=None`` writes no checkpoints."""
    parts = parts_of_a_step(settings, processes)
    saving: dict[str, Any] = (
        {"save_strategy": "no"} if save_every is None else {"save_steps": save_every, "save_total_limit": 2}
    )
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size // parts,
        gradient_accumulation_steps=settings.accumulate,
        ddp_find_unused_parameters=_may_leave_layers_out(model),
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
    # without it Trainer would spread a batch over all GPUs of one process by threads, which no task's loss is made for
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = TaskTrainer(
        task=task,
        settings=settings,
        positions=positions,
        processes=processes,
        early_stopping=early_stopping,
        model=model,
        args=arguments,
        optimizers=(optimizer, None),
        callbacks=[*methods.callbacks(settings), *([early_stopping] if early_stopping else []), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _may_leave_layers_out(model: nn.Module) -> bool:
    """Whether a step can pass layers by, as a mixture of experts does: looking for them costs every other model time."""
    return any("expert" in part for name, _ in model.named_modules() for part in name.split("."))


@contextmanager
def quiet_trainer():  # type: ignore[no-untyped-def]
    """Without the warnings that transformers gives about its own arguments."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


def require_finite(model: nn.Module, optimizer: torch.optim.Optimizer, settings: FinetuneSettings) -> None:
    """Refuse a diverged model.

    Raises:
        UserError: a trained parameter is NaN or infinite, or the optimizer kept it from being so by leaving updates out.
    """
    skipped = getattr(optimizer, "skipped_updates", lambda: 0)()
    if skipped:
        raise UserError(
            f"training diverged: {skipped} updates were left out, whose gradients held NaN or infinite numbers; lower --lr "
            f"(it was {settings.learning_rate:g})"
        )
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad):
        raise UserError(
            "training diverged: the trained weights hold NaN or infinite numbers; lower --lr "
            f"(it was {settings.learning_rate:g})"
        )


def predict_rows(task: Task, model: nn.Module, positions: Sequence[int], processes: Processes = ALONE) -> Any:
    """Predictions on these rows in their order, in fp32 and eval mode: an array, or a list of texts.

    The rows are shared by the processes, and all get the predictions of all.
    """
    where = next(model.parameters()).device
    was_training = model.training
    model.eval()
    order = sorted(positions, key=lambda p: len(task.table.rows[p]["text"]))  # equal lengths together: little padding
    order = processes.mine(order)
    found: list[tuple[int, Any]] = []
    with torch.no_grad():
        for start in range(0, len(order), _EVALUATION_BATCH):
            chunk = order[start : start + _EVALUATION_BATCH]
            batch = {key: value.to(where) for key, value in task.collate(chunk).items()}
            values = task.predict(model, batch)
            found.extend(zip(chunk, values.cpu().tolist() if isinstance(values, torch.Tensor) else values, strict=True))
    model.train(was_training)
    predictions = dict(processes.together(found))
    ordered = [predictions[p] for p in positions]
    return ordered if ordered and isinstance(ordered[0], str) else np.array(ordered)
