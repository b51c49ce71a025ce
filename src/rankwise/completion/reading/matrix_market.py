"""Matrix Market files, read with NumPy: scipy 1.17's reader ends the process on some damaged ones.

A zero byte in it, or a last line that ends in a space instead of a line break, and ``scipy.io.mmread`` reads behind its
buffer (segmentation fault, measured). A data file must not do that to a long-running program.
"""

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from rankwise.completion.reading.byte_stream import ByteStream
from rankwise.completion.reading.delimited import Progress
from rankwise.errors import UserError

_ENTRY = np.dtype([("row", np.int64), ("column", np.int64), ("value", np.float64)])
_CHUNK_LINES = 250_000
_NUMBERS = ("real", "double", "integer", "unsigned-integer")
_SYMMETRIES = {"general": 0, "symmetric": 1, "skew-symmetric": -1}


def read_matrix_market(path: Path, progress: Progress | None = None) -> sp.coo_array | NDArray[np.float64]:
    """The matrix of a .mtx file, plain or gzip: sparse for its coordinate form, dense for its array form.

    Args:
        path: an existing file.
        progress: called with (bytes read, bytes of the file).

    Raises:
        UserError: the file is damaged, cut short, complex, a pattern without values, or no Matrix Market file.
    """
    with ByteStream(path) as stream:
        lines = _lines(stream, path)
        words = next(lines, "").lower().split()
        if len(words) != 5 or words[:2] != ["%%matrixmarket", "matrix"] or words[2] not in ("coordinate", "array"):
            raise UserError(
                f"{path} does not begin as a Matrix Market file does, such as "
                "%%MatrixMarket matrix coordinate real general"
            )
        _, _, form, number, symmetry = words
        if number == "pattern":
            raise UserError(f"{path} is a pattern: it says which entries there are but not their values")
        if number not in _NUMBERS or symmetry not in _SYMMETRIES:
            raise UserError(
                f"{path} holds a {number} {symmetry} matrix; expected one of {', '.join(_NUMBERS)} and of "
                f"{', '.join(_SYMMETRIES)}"
            )
        sizes = _sizes(next((line for line in lines if not line.startswith("%") and line.strip()), ""), form, path)
        kind = _ENTRY if form == "coordinate" else np.dtype(np.float64)
        parts: list[NDArray[Any]] = []
        for part in _numbers(lines, kind, path):
            parts.append(part)
            if progress is not None:
                progress(stream.done, stream.size)
    found: NDArray[Any] = np.concatenate(parts) if parts else np.empty(0, kind)
    sign = _SYMMETRIES[symmetry]
    return _coordinates(found, sizes, sign, path) if form == "coordinate" else _array(found, sizes, sign, path)


def _lines(stream: ByteStream, path: Path) -> Iterator[str]:
    """Lines without a copy of the text: pieces of a megabyte, the broken last line joined to the next piece."""
    rest = b""
    while piece := stream.read(1 << 20):
        if b"\0" in piece:
            raise UserError(f"{path} is no text: it has zero bytes; expected Matrix Market")
        whole, line_break, rest = (rest + piece).rpartition(b"\n")
        if line_break:
            yield from io.StringIO(whole.decode("latin-1"))
    if rest:
        yield rest.decode("latin-1")


def _sizes(line: str, form: str, path: Path) -> tuple[int, ...]:
    expected = ("rows", "columns", "entries") if form == "coordinate" else ("rows", "columns")
    words = line.split()
    if len(words) != len(expected) or not all(word.isdecimal() and word.isascii() and len(word) < 19 for word in words):
        raise UserError(f"{path}: expected the numbers of {', '.join(expected)}, got {line.strip()[:60]!r}")
    return tuple(map(int, words))


def _numbers(lines: Iterator[str], kind: np.dtype[Any], path: Path) -> Iterator[NDArray[Any]]:
    done = 0
    while chunk := list(islice(lines, _CHUNK_LINES)):
        try:
            yield np.loadtxt(chunk, dtype=kind, comments="%", ndmin=1)
        except ValueError as error:
            raise UserError(
                f"{path}: after {done:,} lines of numbers, {error}; is the file cut short or damaged?"
            ) from None
        done += len(chunk)


def _coordinates(found: NDArray[Any], sizes: tuple[int, ...], sign: int, path: Path) -> sp.coo_array:
    rows, columns, values = found["row"] - 1, found["column"] - 1, found["value"]
    height, width, count = sizes
    _check_count(len(found), count, path)
    outside = np.flatnonzero((rows < 0) | (rows >= height) | (columns < 0) | (columns >= width))
    if len(outside):
        first = outside[0]
        raise UserError(
            f"{path}: entry {first + 1:,} lies at ({rows[first] + 1}, {columns[first] + 1}), outside the matrix of "
            f"{height:,} × {width:,}; indices begin at 1"
        )
    if sign:
        _check_square(height, width, path)
        apart = rows != columns
        rows, columns, values = (
            np.concatenate([rows, columns[apart]]),
            np.concatenate([columns, rows[apart]]),
            np.concatenate([values, sign * values[apart]]),
        )
    return sp.coo_array((values, (rows, columns)), shape=(height, width))


def _array(found: NDArray[np.float64], sizes: tuple[int, ...], sign: int, path: Path) -> NDArray[np.float64]:
    height, width = sizes
    if not sign:
        _check_count(len(found), height * width, path)
        return found.reshape((height, width), order="F")
    _check_square(height, width, path)
    _check_count(len(found), height * (height + sign) // 2, path)
    matrix = np.zeros((height, width))
    columns, rows = np.triu_indices(height, 0 if sign > 0 else 1)  # the lower triangle, column by column
    matrix[rows, columns] = found
    matrix[columns, rows] = sign * found
    return matrix


def _check_count(found: int, promised: int, path: Path) -> None:
    if found != promised:
        reason = "is it cut short?" if found < promised else "is its first line of numbers right?"
        raise UserError(f"{path} promises {promised:,} numbers and holds {found:,}; {reason}")


def _check_square(height: int, width: int, path: Path) -> None:
    if height != width:
        raise UserError(f"{path} says that it is symmetric and {height:,} × {width:,}; expected a square matrix")
