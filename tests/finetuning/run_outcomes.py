"""Small runs and what they found, for tests that compare runs."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rankwise.finetuning import FinetuneSettings

STEPS = 8


def settings(tiny: SimpleNamespace, out: Path, **changes: Any) -> FinetuneSettings:
    """Eight steps over seventeen rows in batches of four: epochs end in the middle of a run, the last batch is short."""
    values: dict[str, Any] = {
        "model": tiny.model, "data": tiny.pairs, "out": str(out), "shots": 17, "steps": STEPS, "batch_size": 4,
        "r": 4, "precision": "fp32", "lr": 2e-2, "init_scale": 0.1, "save_every": 2, "solver": "train",
    }  # fmt: skip
    return FinetuneSettings(**{**values, **changes})


def predictions(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    header, *entries = map(json.loads, lines)
    assert header == {"format_version": 1}
    return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]


def validations(folder: Path) -> list[tuple[int, float]]:
    """(step, score) of the rows set apart for early stopping."""
    entries = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(entry["step"], entry["validation"]) for entry in entries if "validation" in entry]


def outcome(folder: Path) -> tuple[str, list[tuple[int, float]], dict[str, Any]]:
    """All that a run found, without how long it took."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    result.pop("seconds_per_step")
    for size in ("adapter_bytes", "exported_bytes"):
        result.pop(size)  # safetensors' header may differ by padding
    return (folder / "predictions.csv").read_text(encoding="utf-8"), losses(folder) + validations(folder), result
