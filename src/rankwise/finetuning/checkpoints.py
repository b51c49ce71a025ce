"""Which checkpoints of a run are whole: finished, and unchanged since."""

import hashlib
import json
import shutil
from pathlib import Path

from rankwise.files import write_json

_SEAL = "checksums.json"


def seal(checkpoint: Path) -> None:
    """Write the SHA-256 of every file of a finished checkpoint beside them: what is not sealed was not finished."""
    files = {file.name: _sha256(file) for file in sorted(checkpoint.iterdir()) if file.is_file() and file.name != _SEAL}
    write_json(checkpoint / _SEAL, {"format_version": 1, "sha256": files})


def whole_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints that can be gone on from, newest first."""
    return sorted(((step, c) for step, c in _numbered(folder) if _is_whole(c)), reverse=True)


def set_aside_damaged(folder: Path) -> list[Path]:
    """Rename damaged checkpoints and remove unfinished ones: Trainer counts every folder of that name as one of its own.

    Returns:
        The damaged ones, under the names they had. One that was never finished (its process was killed, its disk full) is
        not among them.
    """
    damaged = []
    for _, checkpoint in sorted(_numbered(folder)):
        if not (checkpoint / _SEAL).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)
        elif not _is_whole(checkpoint):
            target = checkpoint.with_name(f"damaged-{checkpoint.name}")
            shutil.rmtree(target, ignore_errors=True)
            checkpoint.rename(target)
            damaged.append(checkpoint)
    return damaged


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    named = ((c.name.removeprefix("checkpoint-"), c) for c in folder.glob("checkpoint-*"))
    return [(int(number), checkpoint) for number, checkpoint in named if number.isdigit()]


def _is_whole(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / _SEAL).read_text(encoding="utf-8"))["sha256"]
        return all(_sha256(checkpoint / name) == sha256 for name, sha256 in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
