"""One fine-tuning run from settings to a finished run folder."""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn
from transformers import set_seed

from rankwise.errors import Interrupted, UserError
from rankwise.finetuning.checkpoints import set_aside_damaged
from rankwise.finetuning.early_stopping import EarlyStopping
from rankwise.finetuning.head_start import fit_head
from rankwise.finetuning.launching import usual_processes
from rankwise.finetuning.methods import adapt, create_optimizer, default_learning_rate, prepare
from rankwise.finetuning.models import load_model, load_preprocessor, model_source, text_length
from rankwise.finetuning.precision import choose_precision
from rankwise.finetuning.processes import launched_processes, this_device
from rankwise.finetuning.recorder import RunRecorder
from rankwise.finetuning.row_split import RowSplit, read_rows, split_rows
from rankwise.finetuning.run_folder import RunFolder
from rankwise.finetuning.run_results import Scored, median_step_seconds, run_config, write_results
from rankwise.finetuning.settings import AUTO, FinetuneSettings
from rankwise.finetuning.table import IMAGES
from rankwise.finetuning.task_choice import make_task
from rankwise.finetuning.tasks import Task
from rankwise.finetuning.training import (
    first_batches,
    make_trainer,
    parts_of_a_step,
    place_frames,
    predict_rows,
    quiet_trainer,
    recommended_method,
    require_finite,
    solve,
    solver_of,
)

__all__ = ["finetune", "processes_of", "resume", "tidied", "usual_processes"]

logger = logging.getLogger(__name__)
_QUIET = Console(stderr=True, quiet=True)


def finetune(settings: FinetuneSettings, console: Console | None = None) -> dict[str, Any]:
    """Train an adapter and write the run folder ``settings.out``.

    The folder then holds ``adapter/`` (PEFT's format), for Deep LoRA also ``lora/`` (a plain LoRA, no rankwise needed
    to load it), ``predictions.csv``, ``metrics.jsonl``, ``config.json``, ``result.json``.

    Under ``torchrun`` or ``accelerate launch`` every process calls it; they share the rows of each step, and the first
    writes the folder.

    Returns:
        The content of ``result.json``: scores before and after, ranks and singular values per layer, sizes, times.
        Empty in a process that is not the first.

    Raises:
        UserError: bad data, model, task or folder; nothing that existed is touched.
        Interrupted: Ctrl-C, SIGTERM, or no space left; :func:`resume` goes on from the last finished checkpoint.
    """
    folder = RunFolder(settings.folder)
    folder.require_free()
    return _Run(settings, folder, console, None).done()


def resume(out: str | os.PathLike[str], console: Console | None = None) -> dict[str, Any]:
    """Go on with an interrupted or killed run from its last checkpoint, to the numbers it would have reached.

    Raises:
        UserError: no such run, its data changed since, or it was made by another version.
    """
    folder = RunFolder(Path(out))
    config = folder.read_config()
    if folder.result_file.is_file():
        raise UserError(f"the run in {folder.path} is finished: its scores are in {folder.result_file}")
    settings = replace(FinetuneSettings.from_dict(config["settings"]), out=str(out))
    return _Run(settings, folder, console, config).done()


def tidied(out: str | os.PathLike[str]) -> bool:
    """Whether a run that has its results was killed before it ended; what it left behind is then removed."""
    folder = RunFolder(Path(out))
    return folder.result_file.is_file() and folder.clear_after_results()


def processes_of(out: str | os.PathLike[str]) -> int:
    """How many processes a run was begun with, at most one for each GPU where there are any.

    Raises:
        UserError: no such run.
    """
    begun = int(RunFolder(Path(out)).read_config().get("processes", 1))
    return min(begun, torch.cuda.device_count() or begun)


class _Run:
    """A run on its way: what its steps have in common."""

    def __init__(
        self,
        settings: FinetuneSettings,
        folder: RunFolder,
        console: Console | None,
        resumed: dict[str, Any] | None,
    ):
        self.settings, self.folder, self.resumed = settings, folder, resumed
        self.processes = launched_processes()
        self.console = console if console is not None and self.processes.first else _QUIET
        self.task: Task
        self.split: RowSplit

    def done(self) -> dict[str, Any]:
        parts_of_a_step(self.settings, self.processes)  # a mistake to find before anything takes long
        source = model_source(self.settings.model)
        revision = self._prepare_rows(source)
        task, split = self.task, self.split
        self._choose_what_was_left_open()
        settings = self.settings
        set_seed(settings.seed)
        model = load_model(task, source, revision)
        where = this_device()
        model.to(where)
        task.max_length = text_length(model, settings.max_length)
        self._say_what_is_trained()

        solver = solver_of(task, settings, len(split.train))
        if settings.head_start == "fitted":
            fit_head(model, task, split.train)
        before = self._scored(model, "before")
        model = adapt(model, task, settings)
        batches = first_batches(task, settings, split.train)
        precision, timing = self._precision(model, batches[0], where)
        if self.resumed is None and self._first_after_all_are_here():
            self.folder.create()  # only now: a mistake found earlier leaves nothing behind
            config = run_config(settings, task, split, revision, precision, timing, self.processes.count)
            self.folder.write(self.folder.config_file, config)
        self.processes.wait()

        how: dict[str, Any] = {"solver": solver, "precision": precision, "processes": self.processes.count}
        if solver == "ridge":
            how |= self._solve(model, precision)
        else:
            how |= self._train(model, self._optimizer(model, batches, precision), precision)
        after = self._scored(model, "after")
        result: dict[str, Any] = {}
        if self.processes.first:
            with self.folder.storing("its results"):
                result = write_results(settings, self.folder, model, task, split, before, after, how, self.console)
        self.processes.wait()
        return result

    def _prepare_rows(self, source: str) -> str | None:
        """Read, split and understand the rows; the model's revision on the hub, None for a folder."""
        settings, resumed = self.settings, self.resumed
        rows = read_rows(settings)
        tokenizer, revision = load_preprocessor(source, rows.table)
        if resumed:
            rows.require_unchanged(resumed["data"]["revision"])
        self.split = split_rows(settings, rows)
        name = resumed["task"] if resumed else settings.task
        self.task = make_task(
            name,
            rows.table,
            tokenizer,
            source=source,
            max_length=settings.max_length,
            class_weights=settings.class_weights,
            packing=settings.packing,
            metrics=settings.metrics,
            primary_metric=settings.primary_metric,
        )
        self.task.require_training_labels(self.split.train)
        self.task.learn_scale(self.split.train)
        return revision

    def _choose_what_was_left_open(self) -> None:
        rows = len(self.split.train)
        if self.settings.method == AUTO:
            self.settings = replace(self.settings, method=recommended_method(self.task, rows))
            self._say(f"--method auto: {self.settings.method} for {self.task.name} on {rows} rows")
        if self.settings.lr is None:
            self.settings = replace(self.settings, lr=default_learning_rate(self.settings, self.task))

    def _say_what_is_trained(self) -> None:
        split, table = self.split, self.task.table
        if self.settings.early_stopping is not None and self.task.ridge_fits and self.settings.solver == "auto":
            self._say("--early-stopping: trained step by step, not solved in closed form")
        self._say(
            f"{self.task.name} on {len(split.train)} labelled rows, "
            + (f"{len(split.validation)} more to decide when to stop, " if split.validation else "")
            + f"{len(split.held_out)} held out (columns {', '.join(filter(None, asdict(table.columns).values()))}"
            + (
                f"; {table.dropped} {'other files' if table.kind == IMAGES else 'incomplete rows'} left out)"
                if table.dropped
                else ")"
            )
        )
        for note in self.task.notes([*split.train, *split.held_out]):
            self._say(note)

    def _precision(self, model: nn.Module, batch: dict[str, Any], where: torch.device) -> tuple[str, dict[str, float]]:
        if self.resumed:
            return self.resumed["precision"], {}
        if self.settings.precision != "auto":
            return self.settings.precision, {}
        on_device = {key: value.to(where) for key, value in batch.items()}
        return self.processes.agreed(choose_precision(self.task, model, on_device, where))

    def _first_after_all_are_here(self) -> bool:
        """All have looked whether the folder is free before the first makes it."""
        self.processes.wait()
        return self.processes.first

    def _scored(self, model: nn.Module, when: str) -> Scored:
        """Predictions and metrics on the held-out rows."""
        rows = self.split.held_out
        with self.console.status(f"scoring {len(rows)} held-out rows ({when})"):
            predictions = predict_rows(self.task, model, rows, self.processes)
            scores = self.task.score(predictions, self.task.targets[rows])
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if value is not None)
        self._say(f"{when} training: {shown}")
        return Scored(scores, predictions)

    def _solve(self, model: nn.Module, precision: str) -> dict[str, Any]:
        if self.processes.first:
            self.folder.start_metrics()
        with self.console.status(f"solving for the adapter on {len(self.split.train)} labelled rows"):
            summary = solve(model, self.task, self.settings, self.split.train, precision)
        self.processes.share_parameters(model)  # what each solved for may differ by rounding
        self._say(str(summary))
        fit = summary.fit
        return {
            "steps": 0,
            "seconds_per_step": None,
            "ridge": {
                "penalty": None if fit.abstains else fit.penalty,
                "abstains": fit.abstains,
                "leave_one_out_error": fit.error,
                "leave_one_out_error_without_change": fit.reference,
                "scale": fit.scale,
                "offset": fit.offset,
                "captured": None if fit.abstains else summary.captured,
                "seconds": summary.seconds,
            },
        }

    def _optimizer(self, model: nn.Module, batches: Sequence[dict[str, Any]], precision: str) -> torch.optim.Optimizer:
        if self.folder.last_checkpoint() is not None:  # it brings its own factors
            return create_optimizer(model, self.task, self.settings)
        prepare(model, self.task, self.settings, batches)
        if self.settings.method == "deep-lora":
            summary = place_frames(model, self.task, self.settings, batches, precision)
            logger.info("%s", summary)
            share = "" if np.isnan(summary.captured) else f": {summary.captured:.0%} of the gradient's energy captured"
            self._say(f"placed U and V in {len(summary.layers)} layers{share} ({summary.seconds:.1f} s)")
        return create_optimizer(model, self.task, self.settings)

    def _train(self, model: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> dict[str, Any]:
        """Train to the end, or to where it is stopped."""
        settings, folder, processes = self.settings, self.folder, self.processes
        checkpoint = folder.last_checkpoint()
        processes.wait()  # until all have looked
        if processes.first:
            for damaged in set_aside_damaged(folder.checkpoints):
                self._say(f"passing over {damaged}: its files are not what they were when it was written")
            folder.forget_steps_after(checkpoint[0] if checkpoint else -1)
        recorder = RunRecorder(folder, self.console, settings.steps, processes)
        stopping = self._early_stopping(recorder)
        trainer = make_trainer(
            model,
            self.task,
            settings,
            self.split.train,
            optimizer,
            precision,
            output=folder.checkpoints,
            save_every=settings.checkpoint_every,
            callbacks=[recorder],
            processes=processes,
            early_stopping=stopping,
        )
        if checkpoint:
            self._say(f"resuming at step {checkpoint[0]} of {settings.steps}")
            if stopping:
                stopping.load(checkpoint[1])
        over = checkpoint is not None and (
            checkpoint[0] >= settings.steps or (stopping is not None and stopping.stopped)
        )
        with recorder.catching_interrupts(), quiet_trainer(), folder.storing("a checkpoint"):
            try:
                if over and checkpoint:  # killed while finishing: Trainer would add a step
                    trainer._load_from_checkpoint(str(checkpoint[1]))
                else:
                    if processes.rank:  # else all would drop out the same units; the first draws as a run alone does
                        torch.manual_seed(settings.seed + processes.rank)
                    trainer.train(resume_from_checkpoint=str(checkpoint[1]) if checkpoint else None)
            except KeyboardInterrupt:
                recorder.interrupted = True
            except RuntimeError as error:
                if not processes.lost_one(error):
                    raise
                raise Interrupted(f"another process of the run has ended; {folder.how_to_go_on}") from error
        steps = checkpoint[0] if over and checkpoint else trainer.state.global_step
        if recorder.interrupted and steps < settings.steps and not (stopping and stopping.stopped):
            raise Interrupted(f"stopped at step {steps} of {settings.steps}; {folder.how_to_go_on}")
        found: dict[str, Any] = {"steps": steps, "seconds_per_step": median_step_seconds(folder)}
        if stopping:
            stopping.restore_best(model)
            found["early_stopping"] = {
                "metric": self.task.primary_metric,
                "best_step": stopping.best_step,
                "best_score": stopping.best_score,
                "stopped_early": stopping.stopped,
            }
            self._say(f"kept the adapter of step {stopping.best_step}, the best on {len(self.split.validation)} rows")
        require_finite(model, optimizer, settings)
        return found

    def _early_stopping(self, recorder: RunRecorder) -> EarlyStopping | None:
        if self.settings.early_stopping is None:
            return None
        rows = self.split.validation

        def score(model: nn.Module) -> float | None:
            predictions = predict_rows(self.task, model, rows, self.processes)
            return self.task.score(predictions, self.task.targets[rows])[self.task.primary_metric]

        return EarlyStopping(
            score,
            every=self.settings.score_every,
            patience=self.settings.early_stopping,
            greater_is_better=self.task.greater_is_better,
            record=recorder.record_validation,
        )

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)
