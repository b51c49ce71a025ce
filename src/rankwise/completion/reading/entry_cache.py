"""Entries as compact arrays in a folder, so that what was read from a long text once is not read again."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from rankwise.completion.collective import ALONE, Collective
from rankwise.completion.observations import Observations
from rankwise.completion.sharding import row_cuts
from rankwise.errors import UserError
from rankwise.files import save_tensors, write_json

FORMAT_VERSION = 1
ENTRIES_FILE = "entries.safetensors"
LABELS_FILE = "labels.json"


@dataclass(frozen=True)
class Labels:
    """What the rows and the columns of a matrix are called.

    Attributes:
        rows: m texts, or None if they go by their number from 0.
        columns: n texts, or None likewise.
        row_name: what a row is, such as "user".
        column_name: what a column is.
        shape: (m, n).
    """

    rows: Sequence[str] | None = field(repr=False)
    columns: Sequence[str] | None = field(repr=False)
    row_name: str
    column_name: str
    shape: tuple[int, int]

    def texts(self) -> tuple[Sequence[str], Sequence[str]]:
        """m and n texts, numbers where there are no others.

        Example:
            >>> from rankwise.completion.reading import Labels
            >>> Labels(["ann", "bob"], None, "user", "column", (2, 3)).texts()
            (['ann', 'bob'], ['0', '1', '2'])
        """
        rows, columns = (
            list(map(str, range(size))) if given is None else given
            for given, size in zip((self.rows, self.columns), self.shape, strict=True)
        )
        return rows, columns


def save_entries(observations: Observations, folder: Path) -> None:
    """Write the entries: 12 bytes each in float64, 8 in float32."""
    arrays = {
        "shape": np.array(observations.shape, np.int64),
        "merged": np.array([observations.merged], np.int64),
        "row_starts": observations.row_starts,
        "columns": observations.columns,
        "values": observations.values,
    }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    save_tensors(tensors, folder / ENTRIES_FILE, kind="observed-entries")


def load_entries(folder: Path, together: Collective = ALONE) -> Observations:
    """The entries that :func:`save_entries` wrote; of several processes each reads its own rows only.

    Raises:
        UserError: they are missing or damaged, or cannot be cut into so many parts.
    """
    file = folder / ENTRIES_FILE
    try:
        with safe_open(file, framework="np") as arrays:
            width = int(arrays.get_tensor("shape")[1])
            starts = arrays.get_tensor("row_starts")
            cuts = row_cuts(np.diff(starts), together.size)
            first, end = int(cuts[together.rank]), int(cuts[together.rank + 1])
            part = slice(int(starts[first]), int(starts[end]))
            columns, values = (arrays.get_slice(name)[part] for name in ("columns", "values"))
            merged = int(arrays.get_tensor("merged")[0]) if together.rank == 0 else 0
    except UserError:
        raise
    except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"{file} is missing or damaged ({error}); every process must see the same run folder") from None
    rows = np.repeat(np.arange(end - first, dtype=np.int32), np.diff(starts[first : end + 1]))
    mine = Observations.from_coordinates(rows, columns, values, (end - first, width), values.dtype)
    mine = replace(mine, merged=merged)
    return mine if together.size == 1 else mine.shared(together, first)


def save_labels(labels: Labels, folder: Path) -> None:
    """Write the labels as JSON."""
    write_json(
        folder / LABELS_FILE,
        {
            "format_version": FORMAT_VERSION,
            "shape": list(labels.shape),
            "row_name": labels.row_name,
            "column_name": labels.column_name,
            "rows": None if labels.rows is None else list(labels.rows),
            "columns": None if labels.columns is None else list(labels.columns),
        },
    )


def load_labels(folder: Path) -> Labels:
    """The labels that :func:`save_labels` wrote.

    Raises:
        UserError: they are missing or damaged.
    """
    file = folder / LABELS_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        height, width = map(int, content["shape"])
        labels = Labels(
            content["rows"], content["columns"], content["row_name"], content["column_name"], (height, width)
        )
        if tuple(map(len, labels.texts())) != labels.shape:
            raise ValueError("their number is not that of rows and columns")
        return labels
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is missing or damaged ({error}); start again in a new folder") from None
