"""python -m reproduction FIGURE: measure one figure of the documents, draw it, and compare with what is expected."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from reproduction.record import as_record, deviations, write_record

ROOT = Path(__file__).parent


def figures() -> list[str]:
    """All figures there are, such as ``icml24/fig5``."""
    return sorted(run.parent.relative_to(ROOT).as_posix() for run in ROOT.glob("*/*/run.py"))


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    if given.figure is None:
        print("\n".join(f"{name:<16}{_module(name).TITLE}" for name in figures()))
        return 0
    module, home = _module(given.figure), ROOT / given.figure
    quick_home = Path("runs") / "reproduction" / given.figure
    out = given.out or (quick_home if given.quick else home)
    out.mkdir(parents=True, exist_ok=True)
    if given.redraw:
        record = json.loads((out / "measured.json").read_text(encoding="utf-8"))
    else:
        settings = module.QUICK if given.quick else module.SETTINGS
        measured = module.measure(settings, given.seed)
        record = as_record(given.figure, settings, given.seed, given.quick, measured)
        write_record(out / "measured.json", record)
    module.draw(record).savefig(out / f"{home.name}.png", dpi=110)
    print(f"wrote {out}")
    if record["quick"]:
        print("--quick checks that everything runs; its numbers are not the figure's")
        return 0
    return _report(record, json.loads((home / "expected.json").read_text(encoding="utf-8")))


def _report(record: dict[str, Any], expected: dict[str, Any]) -> int:
    found = deviations(record["results"], expected)
    for line in found:
        print(f"DEVIATES  {line}")
    print(f"{len(expected['checks']) - len(found)} of {len(expected['checks'])} checks within tolerance")
    return 1 if found else 0


def _module(figure: str) -> Any:
    return importlib.import_module("reproduction." + figure.replace("/", ".") + ".run")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reproduction",
        description="Measure a figure of the documents again. Without FIGURE: list them.",
        epilog="example: python -m reproduction icml24/fig5 --quick",
    )
    parser.add_argument("figure", nargs="?", choices=figures(), metavar="FIGURE", help="such as icml24/fig5")
    parser.add_argument("--quick", action="store_true", help="a tiny version in seconds, into runs/reproduction/")
    parser.add_argument("--out", type=Path, help="folder for measured.json and the picture (default: the figure's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the data and the starts (default 0)")
    parser.add_argument("--redraw", action="store_true", help="only draw, from the measured.json that is there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
