"""The picture of README and docs/few-labels.md, from the summary.json of two studies.

python studies/draw.py
"""

import json
from pathlib import Path
from typing import Any

from rankwise.finetuning.comparison.report import scores_figure

ROOT = Path(__file__).parent.parent


def main() -> None:
    classes, pairs = (_summary(name) for name in ("five-tasks", "few-labels"))
    both = {
        **classes,
        "scores": classes["scores"] + [cell for cell in pairs["scores"] if cell["task"] == "stsb"],
        "tasks": [*classes["tasks"], "stsb"],
        "metrics": {**classes["metrics"], "stsb": pairs["metrics"]["stsb"]},
    }
    scores_figure(both).savefig(ROOT / "docs" / "images" / "few-labels.png", dpi=160, bbox_inches="tight")


def _summary(study: str) -> dict[str, Any]:
    return json.loads((ROOT / "studies" / study / "summary.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
