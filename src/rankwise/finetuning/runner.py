"""One fine-tuning run from settings to a finished run folder."""

import csv
import io
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import set_seed

from rankwise.adapters import save_as_lora
from rankwise.diagnostics import adapter_spectra
from rankwise.environment import environment
from rankwise.errors import Interrupted, UserError
from rankwise.files import replacing_folder
from rankwise.finetuning.data import Table, draw, read_table
from rankwise.finetuning.head_start import fit_head
from rankwise.finetuning.methods import adapt, create_optimizer, default_learning_rate
from rankwise.finetuning.models import device, load_model, load_tokenizer, model_source, text_length
from rankwise.finetuning.precision import choose_precision
from rankwise.finetuning.run_folder import PACKAGES, RunFolder
from rankwise.finetuning.settings import AUTO, FinetuneSettings
from rankwise.finetuning.task_choice import make_task
from rankwise.finetuning.tasks import Task
from rankwise.finetuning.trainer import RunRecorder
from rankwise.finetuning.training import (
    first_batches,
    make_trainer,
    place_frames,
    predict_rows,
    quiet_trainer,
    recommended_method,
    require_finite,
    solve,
    solver_of,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Split:
    train: list[int]
    held_out: list[int]


def finetune(settings: FinetuneSettings, console: Console | None = None) -> dict[str, Any]:
    """Train an adapter and write the run folder ``settings.out``.

    The folder then holds ``adapter/`` (PEFT's format), for Deep LoRA also ``lora/`` (a plain LoRA, no rankwise needed
    to load it), ``predictions.csv``, ``metrics.jsonl``, ``config.json``, ``result.json``.

    Returns:
        The content of ``result.json``: scores before and after, ranks and singular values per layer, sizes, times.

    Raises:
        UserError: bad data, model, task or folder; nothing that existed is touched.
        Interrupted: Ctrl-C; :func:`resume` goes on from the last finished step.
    """
    console = console or Console(stderr=True, quiet=True)
    folder = RunFolder(settings.folder)
    folder.require_free()
    return _run(settings, folder, console, None)


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
    return _run(settings, folder, console or Console(stderr=True, quiet=True), config)


def _run(
    settings: FinetuneSettings, folder: RunFolder, console: Console, resumed: dict[str, Any] | None
) -> dict[str, Any]:
    source = model_source(settings.model)
    tokenizer, revision = load_tokenizer(source)
    table, count = _read_tables(settings)
    if resumed and resumed["data"]["revision"] != table.revision:
        pairs = zip(resumed["data"]["revision"].split("+"), table.revision.split("+"), strict=False)
        changed = next((n for n, (was, now) in enumerate(pairs) if was != now), 0)
        file = (settings.data, settings.eval_data)[changed]
        raise UserError(f"{file} has changed since the run began; start a new run or restore the file")
    split = _split(settings, table, count)
    task_name = resumed["task"] if resumed else settings.task
    task = make_task(task_name, table, tokenizer, source=source, max_length=settings.max_length)
    _check_training_labels(task, split)
    task.learn_scale(split.train)
    if settings.method == AUTO:
        settings = replace(settings, method=recommended_method(task, len(split.train)))
        console.print(f"--method auto: {settings.method} for {task.name} on {len(split.train)} rows", highlight=False)
    if settings.lr is None:
        settings = replace(settings, lr=default_learning_rate(settings, task))
    set_seed(settings.seed)
    model = load_model(task, source, revision)
    where = device()
    model.to(where)
    task.max_length = text_length(model, settings.max_length)
    console.print(
        f"{task.name} on {len(split.train)} labelled rows, {len(split.held_out)} held out "
        f"(columns {', '.join(filter(None, asdict(table.columns).values()))}"
        + (f"; {table.dropped} incomplete rows dropped)" if table.dropped else ")"),
        highlight=False,
        soft_wrap=True,
    )

    solver = solver_of(task, settings, len(split.train))
    if settings.head_start == "fitted":
        fit_head(model, task, split.train)
    before = _evaluate(task, model, split.held_out, console, "before")
    model = adapt(model, task, settings)
    batches = first_batches(task, settings, split.train)
    on_device = {key: value.to(where) for key, value in batches[0].items()}
    timing: dict[str, float] = {}
    if resumed:
        precision = resumed["precision"]
    elif settings.precision == "auto":
        precision, timing = choose_precision(task, model, on_device, where)
    else:
        precision = settings.precision
    if resumed is None:
        folder.create()  # only now: a mistake found earlier leaves nothing behind
        folder.write(folder.config_file, _config(settings, task, table, split, revision, precision, timing))

    how: dict[str, Any] = {"solver": solver}
    if solver == "ridge":
        folder.start_metrics()
        how |= _solve(model, task, settings, split, precision, console)
    else:
        optimizer = _optimizer(model, task, settings, batches, precision, folder, console)
        how |= {
            "steps": settings.steps,
            "seconds_per_step": _train(model, task, settings, split, optimizer, precision, folder, console),
        }
    after = _evaluate(task, model, split.held_out, console, "after")
    return _finish(settings, folder, model, task, split, before, after, precision, how, console)


def _solve(
    model: nn.Module, task: Task, settings: FinetuneSettings, split: _Split, precision: str, console: Console
) -> dict[str, Any]:
    with console.status(f"solving for the adapter on {len(split.train)} labelled rows"):
        summary = solve(model, task, settings, split.train, precision)
    console.print(str(summary), highlight=False, soft_wrap=True)
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


def _read_tables(settings: FinetuneSettings) -> tuple[Table, int]:
    """The training table with the rows of --eval-data appended, and how many rows come before those."""
    table = read_table(settings.data, text=settings.text, text_pair=settings.text_pair, label=settings.label)
    count = len(table.rows)
    if settings.eval_data is not None:
        columns = table.columns
        held = read_table(settings.eval_data, text=columns.text, text_pair=columns.text_pair, label=columns.label)
        revision = f"{table.revision}+{held.revision}"
        table = replace(table, rows=table.rows + held.rows, revision=revision, dropped=table.dropped + held.dropped)
    return table, count


def _split(settings: FinetuneSettings, table: Table, count: int) -> _Split:
    """Which rows train and which are held out, drawn by the seed."""
    if settings.shots is not None and settings.shots > count:
        raise UserError(f"--shots {settings.shots} asks for more rows than {settings.data} has ({count})")
    if settings.eval_data is not None:
        train, _ = draw(count, settings.shots or count, settings.seed)
        rest = list(range(count, len(table.rows)))
    else:
        shots = settings.shots if settings.shots is not None else max(1, count - max(1, count // 5))
        train, rest = draw(count, shots, settings.seed)
        if not rest:
            raise UserError(
                f"all {count} rows of {settings.data} would be trained on and none held out; "
                "lower --shots or name a file with --eval-data"
            )
    if len(rest) > settings.eval_limit:
        chosen, _ = draw(len(rest), settings.eval_limit, settings.seed)
        rest = [rest[i] for i in chosen]
    return _Split(train, rest)


def _check_training_labels(task: Task, split: _Split) -> None:
    if len(np.unique(task.targets[split.train])) < 2:
        raise UserError(
            f"all {len(split.train)} training rows have the same label; take more --shots or another --seed"
        )


def _evaluate(task: Task, model: nn.Module, positions: Sequence[int], console: Console, when: str) -> dict[str, Any]:
    """Predictions and metrics on the held-out rows."""
    with console.status(f"scoring {len(positions)} held-out rows ({when})"):
        predictions = predict_rows(task, model, positions)
        scores = task.score(predictions, task.targets[list(positions)])
    shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if value is not None)
    console.print(f"{when} training: {shown}", highlight=False, soft_wrap=True)
    return {"scores": scores, "predictions": predictions}


def _optimizer(
    model: nn.Module,
    task: Task,
    settings: FinetuneSettings,
    batches: list[dict[str, Any]],
    precision: str,
    folder: RunFolder,
    console: Console,
) -> torch.optim.Optimizer:
    # a checkpoint brings its own factors
    if settings.method == "deep-lora" and folder.last_checkpoint() is None:
        summary = place_frames(model, task, settings, batches, precision)
        logger.info("%s", summary)
        share = "" if np.isnan(summary.captured) else f": {summary.captured:.0%} of the gradient's energy captured"
        console.print(
            f"placed U and V in {len(summary.layers)} layers{share} ({summary.seconds:.1f} s)",
            highlight=False,
            soft_wrap=True,
        )
    return create_optimizer(model, task, settings)


def _train(
    model: nn.Module,
    task: Task,
    settings: FinetuneSettings,
    split: _Split,
    optimizer: torch.optim.Optimizer,
    precision: str,
    folder: RunFolder,
    console: Console,
) -> float:
    """Train to the end (or to Ctrl-C); returns the median seconds of a step."""
    checkpoint = folder.last_checkpoint()
    folder.forget_steps_after(checkpoint[0] if checkpoint else 0)
    if checkpoint:
        console.print(f"resuming at step {checkpoint[0]} of {settings.steps}", highlight=False, soft_wrap=True)
    recorder = RunRecorder(folder, console, settings.steps)
    trainer = make_trainer(
        model,
        task,
        settings,
        split.train,
        optimizer,
        precision,
        output=folder.checkpoints,
        save_every=settings.checkpoint_every,
        callbacks=[recorder],
    )
    with recorder.catching_interrupts(), quiet_trainer():
        try:
            if checkpoint and checkpoint[0] >= settings.steps:  # killed while finishing: Trainer would add a step
                trainer._load_from_checkpoint(str(checkpoint[1]))
                return _median_step(folder)
            trainer.train(resume_from_checkpoint=str(checkpoint[1]) if checkpoint else None)
        except KeyboardInterrupt:
            recorder.interrupted = True
    if recorder.interrupted and trainer.state.global_step < settings.steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {settings.steps}; go on with\n"
            f"  rankwise finetune --resume --out {folder.path}"
        )
    require_finite(model, settings)
    return _median_step(folder)


def _median_step(folder: RunFolder) -> float:
    return float(np.median([entry["seconds"] for entry in folder.read_metrics() if "loss" in entry]))


def _finish(
    settings: FinetuneSettings,
    folder: RunFolder,
    model: nn.Module,
    task: Task,
    split: _Split,
    before: dict[str, Any],
    after: dict[str, Any],
    precision: str,
    how: dict[str, Any],
    console: Console,
) -> dict[str, Any]:
    if not isinstance(model, PeftModel):
        raise TypeError(f"expected a PeftModel to save, got {type(model).__name__}")
    for leftover in (folder.adapter, folder.lora):  # of a run killed while it was finishing
        shutil.rmtree(leftover, ignore_errors=True)
    with replacing_folder(folder.adapter) as temporary:
        model.save_pretrained(str(temporary), safe_serialization=True)
    layers = adapter_spectra(model)
    exported = folder.adapter
    if settings.method == "deep-lora":
        summary = save_as_lora(model, folder.lora)
        console.print(f"exported {summary}", highlight=False, soft_wrap=True)
        exported = folder.lora
    _write_predictions(folder, task, split, before["predictions"], after["predictions"])
    result = {
        "method": settings.method,
        "task": task.name,
        "primary_metric": task.primary_metric,
        "train_rows": len(split.train),
        "held_out_rows": len(split.held_out),
        **how,
        "precision": precision,
        "scores": {"before": before["scores"], "after": after["scores"]},
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapter_bytes": _folder_bytes(folder.adapter),
        "exported_bytes": _folder_bytes(exported),
        "layers": [asdict(layer) for layer in layers],
    }
    folder.write(folder.result_file, result)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    console.print(_summary_line(result), highlight=False, soft_wrap=True)
    return result


def _summary_line(result: dict[str, Any]) -> str:
    metric = result["primary_metric"]
    was, now = (result["scores"][when][metric] for when in ("before", "after"))
    shown = " -> ".join("undefined" if value is None else f"{value:.4f}" for value in (was, now))
    ranks = [layer["rank"] for layer in result["layers"]]
    solved = result["solver"] == "ridge"
    cost = f"solved in {result['ridge']['seconds']:.1f} s" if solved else f"{result['seconds_per_step']:.2f} s a step"
    return (
        f"{result['method']}: {metric} {shown}, ranks {min(ranks)} to {max(ranks)} (sum {sum(ranks)}), "
        f"{result['exported_bytes']:,} bytes, {cost}"
    )


def _write_predictions(folder: RunFolder, task: Task, split: _Split, before: Any, after: Any) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["row", "target", "before", "after"])
    for position, was, now in zip(split.held_out, before, after, strict=True):
        writer.writerow([task.table.rows[position]["row"], task.targets[position], was, now])
    temporary = folder.predictions_file.with_suffix(".tmp")
    temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
    os.replace(temporary, folder.predictions_file)


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _config(
    settings: FinetuneSettings,
    task: Task,
    table: Table,
    split: _Split,
    revision: str | None,
    precision: str,
    timing: dict[str, float],
) -> dict[str, Any]:
    return {
        "settings": settings.to_dict(),
        "task": task.name,
        "task_details": task.describe(),
        "learning_rate": settings.learning_rate,
        "adam_eps": settings.epsilon,
        "model_revision": revision,
        "data": {
            "source": table.source,
            "revision": table.revision,
            "columns": asdict(table.columns),
            "dropped_rows": table.dropped,
            "train_rows": [table.rows[p]["row"] for p in split.train],
        },
        "precision": precision,
        "precision_seconds": timing,
        "environment": environment(PACKAGES),
    }
