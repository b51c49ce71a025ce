"""transformers' Trainer, with a task's loss, our progress bar and a gentle Ctrl-C."""

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.finetuning import methods
from rankwise.finetuning.run_folder import RunFolder
from rankwise.finetuning.settings import FinetuneSettings
from rankwise.finetuning.tasks import Task


class Positions(Dataset[int]):
    """Row numbers; the task's collate turns them into tensors."""

    def __init__(self, positions: Sequence[int]):
        self.positions = list(positions)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> int:
        return self.positions[index]


class TaskTrainer(Trainer):
    """Trainer whose loss is the task's, and the method's penalty if it has one."""

    def __init__(self, *, task: Task, settings: FinetuneSettings, **kwargs: Any):
        super().__init__(**kwargs)
        self.task, self.settings = task, settings
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        loss = self.task.loss(model, inputs)
        extra = methods.penalty(model, self.settings)
        if extra is not None:
            loss = loss + extra
        return (loss, {}) if return_outputs else loss


class RunRecorder(TrainerCallback):
    """Appends every step's loss to metrics.jsonl, shows progress on a terminal, stops at a checkpoint on Ctrl-C."""

    def __init__(self, folder: RunFolder, console: Console, steps: int):
        self.folder, self.steps = folder, steps
        self.interrupted = False
        self.step_started = 0.0
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.bar = self.progress.add_task("training", total=steps, loss="...")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.start()
        self.progress.update(self.bar, completed=state.global_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step_started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds = time.perf_counter() - self.step_started
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if "loss" not in logs:
            return
        loss = float(logs["loss"])
        kept = loss if math.isfinite(loss) else None  # JSON has no NaN
        self.folder.append_metrics(step=state.global_step, loss=kept, seconds=round(self.seconds, 5))
        self.progress.update(self.bar, completed=state.global_step, loss=f"{loss:.4f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.stop()

    @contextmanager
    def catching_interrupts(self) -> Iterator[None]:
        """First Ctrl-C: finish the step, save, stop. Second: stop at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(_signal: int, _frame: object) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            print("\nfinishing this step, then saving (Ctrl-C again to stop at once) ...", file=sys.stderr)

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self.progress.stop()
