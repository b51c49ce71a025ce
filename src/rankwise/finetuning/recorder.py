"""What a run says while it trains: a line of metrics a step, a progress bar, a gentle end when it is asked to stop."""

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.finetuning.processes import Processes
from rankwise.finetuning.run_folder import RunFolder


class RunRecorder(TrainerCallback):
    """Appends every step's loss to metrics.jsonl, shows progress on a terminal, stops at a checkpoint when asked to.

    On several processes the first records, and all stop after the same step.
    """

    def __init__(self, folder: RunFolder, console: Console, steps: int, processes: Processes):
        self.folder, self.processes = folder, processes
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

    def record_validation(self, step: int, score: float | None) -> None:
        if self.processes.first:
            self.folder.append_metrics(step=step, validation=score)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.start()
        self.progress.update(self.bar, completed=state.global_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step_started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds = time.perf_counter() - self.step_started
        if self.processes.any(self.interrupted):
            self.interrupted = True
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if "loss" not in logs:
            return
        loss = float(logs["loss"])
        kept = loss if math.isfinite(loss) else None  # JSON has no NaN
        if self.processes.first:
            self.folder.append_metrics(step=state.global_step, loss=kept, seconds=round(self.seconds, 5))
        self.progress.update(self.bar, completed=state.global_step, loss=f"{loss:.4f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.stop()

    @contextmanager
    def catching_interrupts(self) -> Iterator[None]:
        """First Ctrl-C, or a polite request to end (SIGTERM): finish the step, save, stop. Second Ctrl-C: stop at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _frame: object) -> None:
            # torchrun passes a Ctrl-C on as SIGTERM, to processes that have seen the Ctrl-C themselves
            if self.interrupted and number == signal.SIGINT:
                raise KeyboardInterrupt
            if not self.interrupted and self.processes.first:
                again = " (Ctrl-C again to stop at once)" if number == signal.SIGINT else ""
                print(f"\nfinishing this step, then saving{again} ...", file=sys.stderr)
            self.interrupted = True

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.progress.stop()
