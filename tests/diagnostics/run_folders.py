"""Finished run folders written by hand: any names and numbers, no training."""

import json
from pathlib import Path
from typing import Any

HOSTILE = (
    "<script>alert(1)</script>\"'>$x^2$ &amp; <img src=https://evil.example/x onerror=alert(1)> ]]> --> žluť 日本 🐈"
)


def layer(name: str, **changes: Any) -> dict[str, Any]:
    values = {
        "name": name, "shape": [32, 48], "width": 4, "rank": 3, "rank_99": 2, "stable_rank": 1.25,
        "singular_values": [0.5, 0.25, 1e-4, 0.0],
    }  # fmt: skip
    return {**values, **changes}


def finished_run(
    folder: Path,
    *,
    method: str = "deep-lora",
    before: float | None = 0.25,
    after: float | None = 0.75,
    settings: dict[str, Any] | None = None,
    metrics: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> Path:
    folder.mkdir(parents=True)
    result = {
        "format_version": 1, "method": method, "task": "pair-similarity", "primary_metric": "spearman",
        "train_rows": 64, "held_out_rows": 1500, "steps": 3, "precision": "fp32", "seconds_per_step": 0.012,
        "scores": {"before": {"spearman": before, "pearson": 0.1}, "after": {"spearman": after, "pearson": 0.2}},
        "trainable_parameters": 12345, "adapter_bytes": 50_000, "exported_bytes": 20_000,
        "layers": [layer("encoder.0.query"), layer("encoder.0.value")],
    }  # fmt: skip
    config = {
        "format_version": 1, "learning_rate": 3e-3, "settings": {"model": "m", "seed": 0, **(settings or {})},
        "environment": {"rankwise": "0", "python": "3", "packages": {"torch": "2"}},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps({**result, **changes}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    entries = metrics if metrics is not None else [{"step": s, "loss": 1 / s, "seconds": 0.01} for s in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return folder
