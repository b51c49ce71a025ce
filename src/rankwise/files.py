"""Writing files so that nothing is ever half-written."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = "1"


def save_tensors(tensors: dict[str, Tensor], path: Path, *, kind: str) -> None:
    """Write a safetensors file under a temporary name, then rename it over the target."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # clones: safetensors refuses tensors that share memory, as a wrapped head's bias does with its original
        contiguous = {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()
        }
        save_file(contiguous, temporary, metadata={"format": "pt", "format_version": FORMAT_VERSION, "kind": kind})
        _share(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A fresh folder to write into, moved to ``target`` only when the block succeeds.

    Raises:
        ValueError: ``target`` exists and is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty; choose another folder or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private; the folder is shared like any other
        for file in temporary.rglob("*"):
            _share(file)
        if target.exists():
            target.rmdir()
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _share(file: Path) -> None:
    """A file of safetensors is private to its owner, which nobody who saves a model expects."""
    if file.is_file():
        file.chmod(file.stat().st_mode | 0o044)


def storage_problem(error: BaseException) -> str | None:
    """Why a write failed, if that is what the exception says: torch and safetensors wrap the system's own."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    said = str(error)
    if isinstance(error, SafetensorError) and "error: " in said.lower():
        return said.splitlines()[0]
    # torch does not pass the system's reason on
    if isinstance(error, RuntimeError) and any(words in said for words in ("PytorchStreamWriter", "iostream error")):
        return f"torch could not write a file ({said.splitlines()[0]})"
    return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """UTF-8 JSON, written whole or not at all."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_text(path: Path, content: str, *, newline: str | None = None) -> None:
    """UTF-8 text, written whole or not at all, in a folder that is made if need be; ``newline`` as :func:`open` has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8", newline=newline)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
