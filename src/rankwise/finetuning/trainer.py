"""transformers' Trainer, with a task's loss, steps that are the same on any number of processes, and sealed checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from rankwise.finetuning import methods
from rankwise.finetuning.checkpoints import seal
from rankwise.finetuning.early_stopping import EarlyStopping
from rankwise.finetuning.processes import Processes
from rankwise.finetuning.settings import FinetuneSettings
from rankwise.finetuning.step_batches import STEP_WEIGHT, StepBatches, StepLoader
from rankwise.finetuning.tasks import Task


class TaskTrainer(Trainer):
    """Trainer whose loss is the task's, and the method's penalty if it has one."""

    def __init__(
        self,
        *,
        task: Task,
        settings: FinetuneSettings,
        positions: Sequence[int],
        processes: Processes,
        early_stopping: EarlyStopping | None,
        **kwargs: Any,
    ):
        self.task, self.settings, self.processes, self.early_stopping = task, settings, processes, early_stopping
        batches = StepBatches(
            positions,
            settings.batch_size,
            task.items,
            seed=settings.seed,
            passes=settings.accumulate,
            processes=processes.count,
            rank=processes.rank,
        )
        self._loader = StepLoader(batches, task)
        super().__init__(train_dataset=self._loader.dataset, **kwargs)
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> StepLoader:
        return self._loader

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        batch = dict(inputs)
        weight = batch.pop(STEP_WEIGHT, 1.0)
        loss = self.task.loss(model, batch)
        if weight != 1.0:
            loss = loss * weight
        extra = methods.penalty(model, self.settings)
        if extra is not None:
            loss = loss + extra
        return (loss, {}) if return_outputs else loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.processes.wait()  # every process has a random state of its own to write
        if self.processes.first:
            checkpoint = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
            if self.early_stopping is not None:
                self.early_stopping.save(checkpoint)
            seal(checkpoint)
        self.processes.wait()
