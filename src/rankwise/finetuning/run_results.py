"""What a finished run leaves in its folder."""

import csv
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from rich.console import Console
from torch import nn

from rankwise.adapters import save_as_lora
from rankwise.diagnostics import LayerSpectrum, adapter_spectra
from rankwise.environment import environment
from rankwise.files import replacing_folder, write_text
from rankwise.finetuning.row_split import RowSplit
from rankwise.finetuning.run_folder import PACKAGES, RunFolder
from rankwise.finetuning.settings import FinetuneSettings
from rankwise.finetuning.tasks import Task


@dataclass(frozen=True)
class Scored:
    """Predictions for the held-out rows, and their metrics."""

    scores: dict[str, float | None]
    predictions: Any


def run_config(
    settings: FinetuneSettings,
    task: Task,
    split: RowSplit,
    revision: str | None,
    precision: str,
    timing: dict[str, float],
    processes: int,
) -> dict[str, Any]:
    """What config.json says of a run that begins: all that decides it, and what it was made with."""
    table = task.table
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
            "validation_rows": [table.rows[p]["row"] for p in split.validation],
        },
        "precision": precision,
        "precision_seconds": timing,
        "processes": processes,
        "environment": environment(PACKAGES),
    }


def write_results(
    settings: FinetuneSettings,
    folder: RunFolder,
    model: nn.Module,
    task: Task,
    split: RowSplit,
    before: Scored,
    after: Scored,
    how: dict[str, Any],
    console: Console,
) -> dict[str, Any]:
    """The adapter, for Deep LoRA its export, predictions.csv and result.json; result.json comes last: with it the run is
    finished.

    Returns:
        The content of result.json.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"expected a PeftModel to save, got {type(model).__name__}")
    folder.clear_unfinished_results()
    with replacing_folder(folder.adapter) as temporary:
        model.save_pretrained(str(temporary), safe_serialization=True)
    layers = _spectra(model)
    exported = folder.adapter
    if settings.method == "deep-lora":
        summary = save_as_lora(model, folder.lora)
        console.print(f"exported {summary}", highlight=False, soft_wrap=True)
        exported = folder.lora
    _write_predictions(folder, task, split, before, after)
    result = {
        "method": settings.method,
        "task": task.name,
        "primary_metric": task.primary_metric,
        "greater_is_better": task.greater_is_better,
        "train_rows": len(split.train),
        "validation_rows": len(split.validation),
        "held_out_rows": len(split.held_out),
        **how,
        "scores": {"before": before.scores, "after": after.scores},
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapter_bytes": _folder_bytes(folder.adapter),
        "exported_bytes": _folder_bytes(exported),
        "layers": [asdict(layer) for layer in layers],
    }
    folder.write(folder.result_file, result)
    folder.clear_after_results()
    console.print(_summary_line(result), highlight=False, soft_wrap=True)
    return result


def median_step_seconds(folder: RunFolder) -> float:
    return float(np.median([entry["seconds"] for entry in folder.read_metrics() if "loss" in entry]))


def _summary_line(result: dict[str, Any]) -> str:
    metric = result["primary_metric"]
    was, now = (result["scores"][when][metric] for when in ("before", "after"))
    shown = " -> ".join("undefined" if value is None else f"{value:.4f}" for value in (was, now))
    ranks = [layer["rank"] for layer in result["layers"]]
    shown_ranks = f"ranks {min(ranks)} to {max(ranks)} (sum {sum(ranks)}), " if ranks else ""
    solved = result["solver"] == "ridge"
    cost = f"solved in {result['ridge']['seconds']:.1f} s" if solved else f"{result['seconds_per_step']:.2f} s a step"
    kept = result.get("early_stopping")
    return f"{result['method']}: {metric} {shown}, {shown_ranks}{result['exported_bytes']:,} bytes, {cost}" + (
        f", kept step {kept['best_step']}" if kept else ""
    )


def _write_predictions(folder: RunFolder, task: Task, split: RowSplit, before: Scored, after: Scored) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["row", "target", "before", "after"])
    columns = [
        task.in_words(values) for values in (task.targets[split.held_out], before.predictions, after.predictions)
    ]
    for position, *values in zip(split.held_out, *columns, strict=True):
        writer.writerow([task.table.rows[position]["row"], *values])
    write_text(folder.predictions_file, text.getvalue(), newline="")


def _spectra(model: nn.Module) -> list[LayerSpectrum]:
    """Singular values layer by layer; empty for a method whose update is no product of two factors."""
    try:
        return adapter_spectra(model)
    except ValueError:
        return []


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
