"""Labelled images: a folder for each class, or a table that names the files."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rankwise.errors import UserError
from rankwise.finetuning.table import IMAGES, Columns, Table

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
IMAGE_NAMES = ("image", "file_name", "filename", "image_path", "file", "path")
_TRAIN, _EVALUATION = "train", ("validation", "val", "valid", "dev", "test")  # the first that is there
_COLUMNS = Columns("file", None, "folder")


def read_image_folder(folder: Path, *, text: str | None = None, label: str | None = None) -> Table:
    """The images below ``folder``: each of its subfolders is a class.

    Where all its subfolders are called ``train``, ``validation`` (or ``val``, ``valid``, ``dev``, ``test``), and
    ``train`` has subfolders, ``train`` is read and ``evaluation`` names the other; of several the first in this order.
    Files with another ending than an image's, and images outside a class's folder, are counted in ``dropped``; hidden
    ones are not. The revision is the sha256 of all paths and contents.

    Raises:
        UserError: no image in a subfolder.
    """
    if text not in (None, _COLUMNS.text) or label not in (None, _COLUMNS.label):
        raise UserError(f"{folder} is a folder of images, whose class is the subfolder; leave --text and --label out")
    below = _folders(folder)
    evaluation = None
    if _TRAIN in below and set(below) <= {_TRAIN, *_EVALUATION} and _folders(folder / _TRAIN):
        evaluation = next((str(folder / name) for name in _EVALUATION if name in below), None)
        folder = folder / _TRAIN
    files = [
        file
        for file in sorted(folder.rglob("*"), key=lambda file: file.relative_to(folder).as_posix())
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    images = [file for file in files if is_image_name(file.name) and file.parent != folder]
    if not images:
        raise UserError(
            f"{folder} is a folder without images in subfolders; expected one subfolder for each class with its images "
            f"({', '.join(IMAGE_ENDINGS)}) in it, or a table such as CSV"
        )
    records = [(file.relative_to(folder).as_posix(), file, file.relative_to(folder).parts[0]) for file in images]
    return _table(enumerate(records), _COLUMNS, str(folder), b"", len(files) - len(images), evaluation)


def image_column(frame: pd.DataFrame, text: str | None) -> str | None:
    """The column of image files: the one named if all that it holds are, or the first with a usual name that is."""
    lower = {name.lower(): name for name in frame.columns}
    candidates = [text] if text else [lower[name] for name in IMAGE_NAMES if name in lower]
    for name in candidates:
        values = frame[name].dropna()
        if len(values) and all(isinstance(value, str) and is_image_name(value) for value in values):
            return name
    return None


def is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS)


def image_table(
    names: Sequence[Any], labels: Sequence[Any], numbers: Sequence[int], columns: Columns, path: Path, dropped: int
) -> Table:
    """Rows of the images that a table names, relative to the table's folder.

    Absolute names and names that lead out of that folder are refused, so that a table from elsewhere cannot make a run
    read (and its predictions name) other files of this machine. Links inside the folder may lead anywhere.

    Raises:
        UserError: a file that is not there, or not below the table's folder.
    """
    folder = path.parent
    records = []
    for number, name, label in zip(numbers, names, labels, strict=True):
        inside = os.path.normpath(name)
        if Path(name).is_absolute() or Path(inside).parts[0] == os.pardir:
            raise UserError(
                f"row {number} of {path} names {name}, which is not below the table's folder; put the table above the "
                "images and name them relative to it"
            )
        file = folder / inside
        if not os.path.isfile(file):  # noqa: PTH113  # unlike Path.is_file, no exception for a name that is too long
            raise UserError(f"row {number} of {path} names {name}, which does not exist in {folder}")
        records.append((number, (str(name), file, label)))
    return _table(records, columns, str(path), path.read_bytes(), dropped, None)


def _table(
    records: Iterable[tuple[int, tuple[str, Path, Any]]],
    columns: Columns,
    source: str,
    begin: bytes,
    dropped: int,
    evaluation: str | None,
) -> Table:
    sha256, rows = hashlib.sha256(begin), []
    for number, (name, file, label) in records:
        rows.append({"row": number, "text": name, "text_pair": None, "label": label, "file": str(file)})
        sha256.update(f"\0{name}\0{_content(file)}".encode())
    return Table(rows, columns, source, sha256.hexdigest(), dropped, IMAGES, evaluation)


def _content(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the image {file}: {error}") from None


def _folders(folder: Path) -> dict[str, Path]:
    return {child.name: child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")}
