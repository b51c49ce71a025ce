"""python -m reproduction FIGURE: measure one figure of the documents, draw it, and compare with what is expected."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from rankwise.errors import UserError
from reproduction.record import accepted, as_record, deviations, write_json

ROOT = Path(__file__).parent


def figures() -> list[str]:
    """All figures there are, such as ``icml24/fig5``."""
    return sorted(run.parent.relative_to(ROOT).as_posix() for run in ROOT.glob("*/*/run.py"))


def load(figure: str) -> Any:
    """A figure's module: TITLE, SCALES (name to settings), COMMITTED (the scale kept in its folder), measure and draw."""
    return importlib.import_module("reproduction." + figure.replace("/", ".") + ".run")


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    if given.list or given.figure is None:
        for name in figures():
            module = load(name)
            print(f"{name:<32}{module.TITLE}  [{', '.join(_scales(module))}]")
        return 0
    module, home = load(given.figure), ROOT / given.figure
    scale = given.scale or module.COMMITTED
    if scale not in module.SCALES:
        print(f"{given.figure} has no scale {scale!r}; it has {', '.join(_scales(module))}", file=sys.stderr)
        return 2
    out = given.out or (home if scale == module.COMMITTED else Path("runs") / "reproduction" / given.figure / scale)
    record_file = out / "measured.json"
    if given.redraw:
        if not record_file.is_file():
            print(f"nothing to draw: {record_file} does not exist; leave out --redraw to measure", file=sys.stderr)
            return 2
        record = json.loads(record_file.read_text(encoding="utf-8"))
    else:
        settings = module.SCALES[scale]
        try:
            measured = module.measure(settings, given.seed)
        except UserError as mistake:
            print(mistake, file=sys.stderr)
            return 2
        record = as_record(given.figure, scale, settings, given.seed, measured)
        out.mkdir(parents=True, exist_ok=True)
        write_json(record_file, record)
    module.draw(record).savefig(out / f"{home.name}.png", dpi=110)
    print(f"wrote {out}")
    return _compare(record, home / "expected.json", given.accept)


def _compare(record: dict[str, Any], file: Path, accept: bool) -> int:
    expected = json.loads(file.read_text(encoding="utf-8"))
    checks = expected["scales"].get(record["scale"], [])
    if accept:
        expected["scales"][record["scale"]] = checks = accepted(record["results"], checks)
        write_json(file, expected)
        print(f"wrote {file}")
    found = deviations(record["results"], checks)
    for line in found:
        print(f"DEVIATES  {line}")
    if checks:
        print(f"{len(checks) - len(found)} of {len(checks)} checks within their bands")
    else:
        print(f"nothing is expected of scale {record['scale']!r}; its numbers are in measured.json")
    return 1 if found else 0


def _scales(module: Any) -> list[str]:
    """The committed one first."""
    return sorted(module.SCALES, key=lambda scale: scale != module.COMMITTED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reproduction",
        description="Measure a figure of the documents again, draw it, and compare it with what is expected.",
        epilog="example: python -m reproduction icml24/fig5 --scale small",
    )
    parser.add_argument("figure", nargs="?", choices=figures(), metavar="FIGURE", help="such as icml24/fig5")
    parser.add_argument("--list", action="store_true", help="all figures and their scales, the committed one first")
    parser.add_argument(
        "--scale",
        help="paper: the caption's settings; small: the same on a problem of seconds; "
        "desk, where there is one: what two cores do in minutes (default: the one committed in the figure's folder)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for measured.json and the picture (default: the figure's own for the committed scale, "
        "else runs/reproduction/)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data and the starts (default 0)")
    parser.add_argument("--redraw", action="store_true", help="only draw, from the measured.json that is there")
    parser.add_argument(
        "--accept", action="store_true", help="write this run's numbers into expected.json, where it says from_run"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
