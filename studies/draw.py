"""The picture of README and docs/few-labels.md, from the summary.json of studies/five-tasks.

python studies/draw.py
"""

import json
from pathlib import Path

from rankwise.finetuning.comparison.report import scores_figure

ROOT = Path(__file__).parent.parent


def main() -> None:
    summary = json.loads((ROOT / "studies" / "five-tasks" / "summary.json").read_text(encoding="utf-8"))
    shown = ["none", "lora", "deep-lora"]
    summary["scores"] = [cell for cell in summary["scores"] if cell["method"] in shown]
    scores_figure(summary).savefig(ROOT / "docs" / "images" / "few-labels.png", dpi=160, bbox_inches="tight")


if __name__ == "__main__":
    main()
