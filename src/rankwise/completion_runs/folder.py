"""The small files of a completion run, and whether its inputs are still the same."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from rankwise.errors import UserError

KIND = "completion"
FORMAT_VERSION = 1


def check_parents(path: Path) -> None:
    """Refuse a path below something that is no folder, or where nothing may be written."""
    for parent in path.absolute().parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise UserError(f"cannot make {path}: {parent} is no folder")
            if not os.access(parent, os.W_OK | os.X_OK):
                raise UserError(f"cannot make {path}: {parent} may not be written to")
            break
    if len(os.fsencode(path.name)) > 200:
        raise UserError(f"cannot make {path}: the name is too long")


def check_targets(inputs: dict[str, str | None], targets: dict[str, Path | None]) -> None:
    """A file that is written replaces one of its name: refuse an input, or the same file twice. By option."""
    taken = {option: Path(path) for option, path in inputs.items() if path is not None}
    for option, target in targets.items():
        if target is None:
            continue
        for other, path in taken.items():
            there = os.path.exists(target) and os.path.exists(path)  # noqa: PTH110
            if os.path.samefile(target, path) if there else target.absolute() == path.absolute():  # noqa: PTH121
                raise UserError(
                    f"{option} {target} is the file of {other}, which it would replace; choose another file"
                )
        taken[option] = target


class MetricsFile:
    """One JSON object a line, flushed: a killed run keeps what it measured."""

    def __init__(self, path: Path):
        self._file = path.open("w", encoding="utf-8")
        self.append({"format_version": FORMAT_VERSION})

    def append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *failed: object) -> None:
        self._file.close()


def plain_number(value: Any) -> Any:
    """A NumPy number as Python's; None where it is not finite, which JSON cannot say."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not os.path.isfile(file):  # noqa: PTH113  # no exception for a name that is too long
        raise UserError(f"{folder} is in use and holds no run of rankwise complete; choose another folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.get("kind") != KIND:
            raise UserError(f"{folder} holds something else than a run of rankwise complete; choose another folder")
        if not isinstance(config["settings"], dict) or not isinstance(config["inputs"]["data"], dict):
            raise TypeError("settings or inputs are no objects")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}); start the run again in a new folder") from None
    return config


def identity(path: str) -> dict[str, Any]:
    """Name without folders, size and content of a file."""
    stat = os.stat(path)  # noqa: PTH116
    return {
        "file": Path(path).name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns, "sha256": _sha256(path)
    }  # fmt: skip


def is_same_file(path: str, known: dict[str, Any]) -> bool:
    """By size and time, or by content where only the time differs. A file that has gone since is no other file."""
    try:
        stat = os.stat(path)  # noqa: PTH116
    except OSError:
        return bool(known) and Path(path).name == known.get("file")
    if stat.st_size != known.get("bytes"):
        return False
    return stat.st_mtime_ns == known.get("modified_ns") or _sha256(path) == known.get("sha256")


def _sha256(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
