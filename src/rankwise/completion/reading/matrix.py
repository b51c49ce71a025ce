"""Whole matrices in one file: NumPy, SciPy and Matrix Market files, and text with one line a row."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from rankwise.completion.observations import Observations, as_observations
from rankwise.completion.reading.byte_stream import existing_file
from rankwise.completion.reading.delimited import CHUNK_ROWS, Progress, looks_numeric, sniffed
from rankwise.completion.reading.matrix_market import read_matrix_market
from rankwise.errors import UserError

_TEXT = (".csv", ".tsv", ".txt", ".tab", ".psv", ".dat", ".data")
EXPECTED = "a matrix as .npz, .npy, .mtx, .mtx.gz, .csv, .tsv or .txt"
_CHUNK_CELLS = 4_000_000  # a wide line has many cells


@dataclass(frozen=True)
class LabelledMatrix:
    """The observed entries of a matrix that a file holds as a whole.

    Attributes:
        observations: the entries.
        row_labels: m texts, or None if the file names no rows.
        column_labels: n texts, or None.
        source: what was read.
    """

    observations: Observations
    row_labels: list[str] | None = field(repr=False)
    column_labels: list[str] | None = field(repr=False)
    source: str


def read_matrix(
    path: str | os.PathLike[str],
    key: str | None = None,
    *,
    header: bool | None = None,
    labels: bool | None = None,
    delimiter: str | None = None,
    dtype: Any = np.float64,
    progress: Progress | None = None,
) -> LabelledMatrix:
    """Read a matrix with holes.

    What is observed: the stored entries of a sparse matrix (``scipy.sparse.save_npz``, Matrix Market coordinates),
    zeros among them; the cells of a dense one (.npy, .npz, Matrix Market arrays, text) that are neither NaN nor empty.

    Args:
        path: the file. Nothing in it is unpickled.
        key: which array of an .npz file with several.
        header: whether the first line of a text names the columns; None: it does if a cell after the first is no number.
        labels: whether the first cell of each line of a text names the row; None: it does if the header leaves it
            empty, or one of the first lines begins with something that is no number.
        delimiter: of a text; found among comma, tab, semicolon and bar if None.
        dtype: float32 or float64, of the values.
        progress: called with (bytes read, bytes of the file) while a text or a Matrix Market file is read.

    Raises:
        UserError: the file is missing, empty, cut short, damaged or of another kind; the key is missing or wrong; the
            array is not a matrix of real numbers; an observed value is infinite; nothing is observed.

    Example:
        >>> import pathlib, tempfile
        >>> from rankwise.completion.reading import read_matrix
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "speeds.csv"
        >>> _ = path.write_text("time,north,south\\n08:00,61.5,\\n08:05,,58\\n", encoding="utf-8")
        >>> matrix = read_matrix(path)
        >>> matrix.observations.shape, matrix.observations.values.tolist(), matrix.row_labels, matrix.column_labels
        ((2, 2), [61.5, 58.0], ['08:00', '08:05'], ['north', 'south'])
    """
    file = existing_file(path, EXPECTED)
    name = file.name.lower()
    ending = Path(name.removesuffix(".gz")).suffix
    if key is not None and ending != ".npz":
        raise UserError(f"key {key!r} chooses among the arrays of an .npz file; {file} is none: leave the key out")
    if ending in (".parquet", ".pq"):
        raise UserError(f"{file} is a table; read it with the names of its row, column and value columns")
    if ending in _TEXT:
        return _read_text(file, header, labels, delimiter, dtype, progress)
    if ending == ".mtx":
        content = _parsed(file, "Matrix Market", lambda: read_matrix_market(file, progress))
    elif name.endswith(".npy"):
        content = _parsed(file, "NumPy's .npy", lambda: _array(file))
    elif name.endswith(".npz"):
        content = _parsed(file, "NumPy's .npz", lambda: _from_archive(file, key))
    else:
        raise UserError(
            f"cannot tell the format of {file} from {ending or 'a name without ending'!r}; expected {EXPECTED}"
        )
    return LabelledMatrix(_observed(file, content, dtype), None, None, str(file))


def _parsed(file: Path, kind: str, parse: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about oddities of the file's header, in words for programmers
            return parse()
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{file} says that it holds more than fits in memory; is it damaged?") from None
    except Exception as error:  # parsers of other people on bytes of other people: there is no list of what they raise
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(f"{file} cannot be read as {kind} ({reason}); is it cut short, or another format?") from None


def _array(file: Path) -> Any:
    with file.open("rb") as opened:
        return np.lib.format.read_array(opened, allow_pickle=False)


def _from_archive(file: Path, key: str | None) -> Any:
    # opened here: NumPy leaves its own file open where the archive is damaged
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
        if isinstance(arrays, np.ndarray):
            return arrays  # a .npy under another name
        names = list(arrays.files)
        if key is None and {"format", "shape", "data"} <= set(names):
            opened.seek(0)
            matrix = sp.load_npz(opened)
            if matrix.format in ("csr", "csc", "bsr"):
                matrix.check_format(full_check=True)  # damaged indices would be followed out of the arrays
            return matrix
        if key is None and len(names) != 1:
            raise UserError(f"{file} holds {len(names)} arrays; choose one with key (--key): {', '.join(names)}")
        chosen = names[0] if key is None else key
        if chosen not in names:
            raise UserError(f"{file} has no array {key!r}; it has {', '.join(names)}")
        return arrays[chosen]


def _observed(file: Path, content: Any, dtype: Any) -> Observations:
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what does not fit the dtype is refused as infinite
            return as_observations(content, dtype)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except MemoryError:
        raise UserError(f"{file} holds more than fits in memory") from None


def _read_text(
    file: Path,
    header: bool | None,
    labels: bool | None,
    delimiter: str | None,
    dtype: Any,
    progress: Progress | None,
) -> LabelledMatrix:
    text = sniffed(file, delimiter=delimiter, header=header)
    below = text.sample[text.header :]
    if labels is None:
        unnamed = text.header and not text.names[0] and len(text.names) > 1
        labels = unnamed or any(not looks_numeric(record[0]) for record in below)
    first = int(labels)
    if first == len(text.names):
        raise UserError(
            f"{file} has one column, taken for the row labels as {below[0][0][:40]!r} is no number; expected numbers. If "
            f"they are separated by something else than {text.delimiter!r}, name it with delimiter= (--delimiter)"
        )
    width = len(text.names) - first
    names: list[str] = []
    pieces: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
    record = 0
    chunk_rows = max(1, min(CHUNK_ROWS, _CHUNK_CELLS // len(text.names)))
    for batch in text.batches(range(len(text.names)), chunk_rows, progress):
        if labels:
            names.extend(name.strip() for name in batch.column(0).to_pylist())
        cells = np.empty((batch.num_rows, width))
        for column in range(width):
            cells[:, column] = text.numbers(batch.column(column + first), record, column + first)
        rows, columns = np.nonzero(~np.isnan(cells))
        pieces.append(((rows + record).astype(np.int32), columns.astype(np.int32), cells[rows, columns]))
        record += batch.num_rows
    entries = [np.concatenate(parts) for parts in zip(*pieces, strict=True)]
    seen = _observed(file, (*entries, (record, width)), dtype)
    return LabelledMatrix(seen, names if labels else None, list(text.names[first:]) if text.header else None, str(file))
