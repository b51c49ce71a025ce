"""The pictures of docs/few-labels.md, from a study's summary.json.

python studies/draw.py
"""

import json
from pathlib import Path

from rankwise.finetuning.comparison.report import scores_figure

ROOT = Path(__file__).parent.parent


def main() -> None:
    summary = json.loads((ROOT / "studies" / "few-labels" / "summary.json").read_text(encoding="utf-8"))
    figure = scores_figure(summary)
    figure.savefig(ROOT / "docs" / "images" / "few-labels.png", dpi=160, bbox_inches="tight")


if __name__ == "__main__":
    main()
