"""Studies on the tiny checkpoint: rules, and what is left of a row once times and memory are gone."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rankwise.finetuning.comparison import StudySettings

_MEASURED = ("seconds", "seconds_per_step", "peak_memory_bytes")


def study(tiny: SimpleNamespace, out: Path, **changes: Any) -> StudySettings:
    """Three steps, four rows a step, two learning rates, one tuning seed, two trials of eight pairs."""
    values: dict[str, Any] = {
        "model": tiny.model, "out": str(out), "tasks": (tiny.pairs,), "methods": ("none", "lora"), "shots": (8,),
        "seeds": 2, "budget": 2, "tune_shots": 8, "tune_seeds": 1, "steps": 3, "batch_size": 4, "r": 4,
        "precision": "fp32",
    }  # fmt: skip
    return StudySettings(**{**values, **changes})


def without_measurements(row: dict[str, Any]) -> dict[str, Any]:
    """The row without what differs between two runs of the same thing."""
    return {key: value for key, value in row.items() if key not in _MEASURED}


def found(out: Path) -> dict[str, dict[str, Any]]:
    """The last row of every run of a study, by key, without measurements."""
    return {row["key"]: without_measurements(row) for row in lines(out)}


def lines(out: Path) -> list[dict[str, Any]]:
    """Every line of rows.jsonl, each of which must be whole JSON."""
    return [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
