"""One run of a study: draw rows, adapt, train, score; everything it found as one row."""

import hashlib
import json
import os
import tempfile
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import set_seed

from rankwise.adapters import save_as_lora
from rankwise.diagnostics import adapter_spectra
from rankwise.errors import UserError
from rankwise.finetuning.comparison.protocol import RunSpec, StudySettings
from rankwise.finetuning.data import Table, draw
from rankwise.finetuning.head_start import fit_head
from rankwise.finetuning.methods import adapt, create_optimizer, default_learning_rate, prepare
from rankwise.finetuning.models import load_model, load_preprocessor, model_source, text_length
from rankwise.finetuning.named_tasks import NamedTask, load_named_task
from rankwise.finetuning.processes import this_device
from rankwise.finetuning.settings import FinetuneSettings
from rankwise.finetuning.task_choice import make_task
from rankwise.finetuning.tasks import Task
from rankwise.finetuning.training import (
    first_batches,
    make_trainer,
    place_frames,
    predict_rows,
    quiet_trainer,
    require_finite,
    solve,
    solver_of,
)
from rankwise.optimizers.factor_pairs import lora_pairs, trained_besides
from rankwise.optimizers.relora import base_layer
from rankwise.spectral import rank_for_energy

ROW_FORMAT = 1
_SPLIT_SEED = 20_240_612  # which rows are set apart is part of the protocol, not of a trial
_LORA_LIKE = (
    "deep-lora",
    "lora",
    "lora-plus",
    "lora-rite",
    "rslora",
    "lora-riemannian",
    "adalora",
    "lora-gaussian",
    "lora-fa",
    "lora-orthogonal",
    "pissa",
    "olora",
    "mica",
    "eva",
    "corda",
    "lora-ga",
    "velora",
    "monteclora",
    "full-width",
)  # ΔW is the product B·A


@dataclass(frozen=True)
class Rows:
    """Positions in the task's table: to draw trials from, to choose learning rates on, to evaluate on."""

    pool: list[int]
    tuning: list[int]
    evaluation: list[int]


def run_trial(study: StudySettings, run: RunSpec) -> dict[str, Any]:
    """Train and score one run.

    Returns:
        A row of ``rows.jsonl``. What goes wrong in a run is in the row (``status`` failed, ``error`` says why): a
        method that diverges at one learning rate must not stop a study.
    """
    spec = study.spec(run.method)
    row: dict[str, Any] = {
        "format_version": ROW_FORMAT,
        "key": run.key,
        "phase": run.phase,
        "task": run.task,
        "method": run.method,
        "shots": run.shots,
        "seed": run.seed,
        "lr": run.lr,
        "steps": study.steps,
        "batch_size": study.batch_size,
        "r": spec.overrides.get("r", study.r),
        "head": spec.overrides.get("head", study.head),
        "status": "failed",
        "error": None,
        "score": None,
        "before": None,
    }
    start = time.perf_counter()
    _forget_peak_memory()
    try:
        row |= {**_writable(_run(study, run)), "status": "ok"}
    except Exception as error:  # recorded, not swallowed: the row says what happened and the study goes on
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        row["error"] = _without_data_root(said, study)
    row["seconds"] = round(time.perf_counter() - start, 3)
    row["peak_memory_bytes"] = _peak_memory()
    return row


def split_rows(named: NamedTask, study: StudySettings, task: Task) -> Rows:
    """What is drawn from, tuned on and evaluated on; the same for every run of a study.

    Raises:
        UserError: too few rows to set any apart, or none short enough to evaluate on.
    """
    count = len(named.train.rows)
    if count < 10:
        raise UserError(f"{named.train.source} has {count} labelled rows; a comparison needs at least 10")
    tuning, pool = draw(count, min(study.tune_limit, count // 5), _SPLIT_SEED)
    if named.evaluation is not None:
        evaluation = list(range(count, count + len(named.evaluation.rows)))
    else:
        picked, rest = draw(len(pool), max(1, len(pool) // 4), _SPLIT_SEED)
        evaluation, pool = [pool[i] for i in picked], [pool[i] for i in rest]
    if study.max_eval_tokens is not None:
        evaluation = [p for p in evaluation if task.token_count(p) <= study.max_eval_tokens]
    if not evaluation:
        raise UserError(f"no held-out row of {named.name} has at most --max-eval-tokens {study.max_eval_tokens} tokens")
    if len(evaluation) > study.eval_limit:
        chosen, _ = draw(len(evaluation), study.eval_limit, _SPLIT_SEED)
        evaluation = [evaluation[i] for i in chosen]
    return Rows(pool, tuning, evaluation)


def training_rows(pool: list[int], shots: int, seed: int, how: str, *, option: str = "--shots") -> list[int]:
    """The labelled rows of one trial, the same for every method.

    Raises:
        UserError: fewer rows than asked for.
    """
    if how == "with-replacement":
        return [pool[i] for i in np.random.default_rng(seed).integers(len(pool), size=shots).tolist()]
    if shots > len(pool):
        raise UserError(f"{shots} labelled rows asked for, {len(pool)} to draw from; lower {option}")
    return [pool[i] for i in draw(len(pool), shots, seed)[0]]


def load_task(study: StudySettings, name: str) -> tuple[NamedTask, Task, str | None]:
    """The named task, its rows as a trainable task, and the model's revision; read once a process."""
    return _load_task(study.model, name, study.data_root, study.max_length)


def forget_tables() -> None:
    """Read the tables anew: a file may have changed since this process last looked."""
    _load_task.cache_clear()


@lru_cache(maxsize=16)
def _load_task(model: str, name: str, root: str | None, max_length: int) -> tuple[NamedTask, Task, str | None]:
    named = load_named_task(name, Path(root) if root else None)
    source = model_source(model)
    table: Table = named.train
    tokenizer, revision = load_preprocessor(source, table)
    if named.evaluation is not None:
        table = replace(table, rows=table.rows + named.evaluation.rows)
    return named, make_task(named.kind, table, tokenizer, source=source, max_length=max_length), revision


def _run(study: StudySettings, run: RunSpec) -> dict[str, Any]:
    named, task, revision = load_task(study, run.task)
    rows = split_rows(named, study, task)
    train = training_rows(rows.pool, run.shots, run.seed, study.draw)
    task.learn_scale(train)
    held_out = rows.tuning if run.phase == "tune" or study.split == "tuning" else rows.evaluation
    settings = study.run_settings(run)
    if study.keeps_default(run.method):
        settings = replace(settings, lr=default_learning_rate(settings, task))
    set_seed(run.seed)
    model = load_model(task, model_source(study.model), revision)
    model.to(this_device())
    task.max_length = text_length(model, settings.max_length)
    if settings.head_start == "fitted":
        fit_head(model, task, train)
    model = adapt(model, task, settings)
    step_seconds, details = _train(model, task, settings, train)
    predictions = predict_rows(task, model, held_out)
    if isinstance(predictions, np.ndarray) and not np.isfinite(predictions).all():  # finite weights may overflow
        raise UserError(f"training diverged: NaN or infinite predictions; lower --lr (it was {run.lr:g})")
    scores = task.score(predictions, task.targets[held_out])
    metric = named.metric or task.primary_metric
    return {
        "lr": settings.learning_rate,
        "metric": metric,
        "score": scores[metric],
        "scores": scores,
        "held_out_rows": len(held_out),
        "train_rows": hashlib.sha256(repr(train).encode()).hexdigest()[:16],
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapter_bytes": _shipped_bytes(model, settings),
        "seconds_per_step": step_seconds,
        **_ranks(model, settings),
        **details,
    }


def _writable(found: dict[str, Any]) -> dict[str, Any]:
    """What a run found, as it is; a number that JSON cannot hold would stop the study where the row is written.

    Raises:
        UserError: NaN or an infinite number.
    """
    try:
        json.dumps(found, allow_nan=False)
    except ValueError:
        raise UserError("training diverged: the run's losses, scores or ranks are NaN or infinite") from None
    return found


def _train(model: nn.Module, task: Task, settings: FinetuneSettings, train: list[int]) -> tuple[float, dict[str, Any]]:
    """Train in place; the seconds of a step on average, and what the method has to say about itself."""
    trainable = any(p.requires_grad for p in model.parameters())
    if settings.method == "none" and not trainable:
        return 0.0, {}  # no head: the pretrained model as it is
    if solver_of(task, settings, len(train)) == "ridge":
        found = solve(model, task, settings, train, settings.precision).fit
        decision = {"solver": "ridge", "penalty": None if found.abstains else found.penalty, "abstains": found.abstains}
        return 0.0, {"decision": {**decision, "leave_one_out": found.error, "without_change": found.reference}}
    batches = first_batches(task, settings, train)
    prepare(model, task, settings, batches)
    if settings.method == "deep-lora":
        place_frames(model, task, settings, batches, settings.precision)
    optimizer = create_optimizer(model, task, settings)
    with tempfile.TemporaryDirectory() as scratch, quiet_trainer():
        trainer = make_trainer(
            model, task, settings, train, optimizer, settings.precision, output=Path(scratch), save_every=None
        )
        start = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - start) / settings.steps
    require_finite(model, optimizer, settings)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return round(seconds, 5), {"final_loss": float(np.mean(losses[-10:])) if losses else None}


def _ranks(model: nn.Module, settings: FinetuneSettings) -> dict[str, Any]:
    """Numerical rank per layer by one rule for all methods; None where ΔW is no product of two factors."""
    if settings.method not in _LORA_LIKE:
        return {"ranks": None, "directions_99": None, "update_norm": None}
    layers = adapter_spectra(model)
    everything = torch.tensor([value for layer in layers for value in layer.singular_values], dtype=torch.float64)
    return {
        "ranks": [layer.rank for layer in layers],
        "directions_99": rank_for_energy(everything.sort(descending=True).values, 0.99),
        "update_norm": float(everything.square().sum().sqrt()),
    }


def _shipped_bytes(model: nn.Module, settings: FinetuneSettings) -> int:
    """Bytes of the files one would ship: for Deep LoRA the exported LoRA, where the weights themselves are trained, those."""
    from peft import PeftModel

    if settings.method == "relora":
        pairs = lora_pairs(model)
        changed = [base_layer(pair).weight for pair in pairs] + [p for _, p in trained_besides(model, pairs)]
        return sum(p.numel() * p.element_size() for p in changed)
    if not isinstance(model, PeftModel):
        return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as scratch:
        if settings.method == "deep-lora":
            save_as_lora(model, Path(scratch) / "lora")
        else:
            model.save_pretrained(scratch, safe_serialization=True)
        return sum(file.stat().st_size for file in Path(scratch).rglob("*.safetensors"))


def _without_data_root(text: str, study: StudySettings) -> str:
    """Rows are shared; where a machine keeps its data is nobody else's business."""
    for root in (study.data_root, os.environ.get("RANKWISE_DATA")):
        text = text.replace(root, "DATA_ROOT") if root else text
    return text


def _forget_peak_memory() -> None:
    """Start the count of the peak anew, where the system lets a process do so."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:  # noqa: PTH123
            file.write("5")
    except OSError:
        pass


def _peak_memory() -> int | None:
    """Peak resident bytes since :func:`_forget_peak_memory` (of the GPU, where there is one); None where unknown."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
        lines = dict(line.split(":", 1) for line in file if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else None
