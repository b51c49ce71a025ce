"""Long tables, one observed entry a line: streamed into codes and values, whatever the size of the text."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.completion.observations import Observations
from rankwise.completion.reading.byte_stream import existing_file
from rankwise.completion.reading.delimited import CHUNK_ROWS, Progress, import_pyarrow, numbers_of, sniffed
from rankwise.errors import UserError

_TEXT = (".csv", ".tsv", ".txt", ".tab", ".psv", ".dat", ".data")
_PARQUET = (".parquet", ".pq")
EXPECTED = "a table as .csv, .tsv, .txt (each also as .gz) or .parquet"


@dataclass(frozen=True)
class EntryTable:
    """Entries of a matrix whose rows and columns go by labels.

    Attributes:
        rows: (nnz,) int32, the code of each entry's row: its place in ``row_labels``.
        columns: (nnz,) int32, the code of each entry's column.
        values: (nnz,) float32 or float64; NaN throughout where no value column was read.
        row_labels: m texts, in order of first appearance. A label whose every value is empty is among them.
        column_labels: n texts.
        source: what was read.
        empty_values: lines left out because their value was empty: not observed.
        empty_labels: lines left out because the row or the column was empty.
    """

    rows: NDArray[np.int32]
    columns: NDArray[np.int32]
    values: NDArray[np.floating]
    row_labels: list[str] = field(repr=False)
    column_labels: list[str] = field(repr=False)
    source: str
    empty_values: int = 0
    empty_labels: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return len(self.row_labels), len(self.column_labels)

    def observations(self, dtype: Any = None) -> Observations:
        """The entries sorted by row and by column; several of one entry are averaged.

        Raises:
            UserError: no entry is observed, or there are too many for one machine.
        """
        return Observations.from_coordinates(
            self.rows, self.columns, self.values, self.shape, self.values.dtype if dtype is None else dtype
        )


def read_table(
    path: str | os.PathLike[str],
    *,
    row: str,
    column: str,
    value: str | None,
    header: bool = True,
    delimiter: str | None = None,
    dtype: Any = np.float64,
    labels: tuple[Sequence[str], Sequence[str]] | None = None,
    chunk_rows: int = CHUNK_ROWS,
    progress: Progress | None = None,
) -> EntryTable:
    """Read a long table (CSV, TSV, other delimited text, each also as gzip, or Parquet) in chunks.

    At no time is more of the text in memory than a few chunks; what stays is 16 bytes an entry (12 in float32) and the
    labels. Labels may be anything: numbers, texts, dates; spaces around them do not count, and whole numbers stored as
    fractions (12.0) become 12. A value that is empty or NaN (or NA, N/A, null, None) is not observed.

    Args:
        path: the file. Text is UTF-8; gzip is recognised by its content.
        row, column: the columns that say where an entry lies: names in the header, or numbers from 1 as text
            (``"1"``) where ``header`` is false.
        value: the column of numbers; None where the table only asks for entries, and ``values`` is NaN.
        header: whether the first line of a text holds names; Parquet always has names.
        delimiter: one character; found among comma, tab, semicolon and bar if None.
        dtype: float32 or float64, of the values.
        labels: row and column labels that have codes already, as of a fitted model: these come first, new ones follow.
        chunk_rows: about how many lines are taken at a time.
        progress: called with (bytes read, bytes of the file) after every chunk.

    Raises:
        UserError: the file is missing, empty, cut short, no table or not UTF-8; a column is not there; a value is not
            a finite number (file, line and column are named); or no line has both labels.

    Example:
        >>> import pathlib, tempfile
        >>> from rankwise.completion.reading import read_table
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "ratings.csv"
        >>> _ = path.write_text("user,item,rating\\nann,film,4\\nbob,film,\\nann,book,3.5\\n", encoding="utf-8")
        >>> table = read_table(path, row="user", column="item", value="rating")
        >>> table.row_labels, table.column_labels, table.values.tolist(), table.empty_values
        (['ann', 'bob'], ['film', 'book'], [4.0, 3.5], 1)
    """
    if chunk_rows < 1:
        raise UserError(f"chunk_rows must be at least 1, got {chunk_rows}")
    named = [name for name in (row, column, value) if name is not None]
    if len(set(named)) < len(named):
        raise UserError(f"row, column and value must be different columns, got {', '.join(map(repr, named))}")
    file = existing_file(path, EXPECTED)
    ending = Path(file.name.lower().removesuffix(".gz")).suffix
    if ending in _PARQUET:
        chunks = _parquet_chunks(file, named, chunk_rows, progress)
    elif ending in _TEXT:
        chunks = _text_chunks(file, named, header, delimiter, chunk_rows, progress)
    else:
        raise UserError(
            f"cannot tell the format of {file} from {ending or 'a name without ending'!r}; expected {EXPECTED}"
        )
    return _gathered(chunks, file, value, np.dtype(dtype), labels or ((), ()))


def _gathered(
    chunks: Iterator[tuple[Any, Any, NDArray[np.float64] | None]],
    file: Path,
    value: str | None,
    dtype: np.dtype[Any],
    labels: tuple[Sequence[str], Sequence[str]],
) -> EntryTable:
    row_codes, column_codes = ({label: code for code, label in enumerate(known)} for known in labels)
    if (len(row_codes), len(column_codes)) != (len(labels[0]), len(labels[1])):
        raise UserError("the labels given are not distinct; expected each row and each column label once")
    pieces: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    empty_values = empty_labels = placed_lines = 0
    for row_texts, column_texts, numbers in chunks:
        # a line without one of its labels must not give the other a code: it is no line of the matrix
        placed = _filled(row_texts) & _filled(column_texts)
        empty_labels += int(len(placed) - placed.sum())
        if not placed.all():
            mask = import_pyarrow().array(placed)
            row_texts, column_texts = row_texts.filter(mask), column_texts.filter(mask)
            numbers = None if numbers is None else numbers[placed]
        row, column = _coded(row_texts, row_codes), _coded(column_texts, column_codes)
        placed_lines += len(row)
        if numbers is None:
            numbers = np.full(len(row), np.nan)
        else:
            seen = ~np.isnan(numbers)
            empty_values += int(len(seen) - seen.sum())
            row, column, numbers = row[seen], column[seen], numbers[seen]
        with np.errstate(over="ignore"):  # what is too large for the dtype is found at the end
            numbers = numbers.astype(dtype)
        for kept, piece in zip(pieces, (row, column, numbers), strict=True):
            kept.append(piece)
    if not placed_lines:
        raise UserError(f"{file} has no line with both a row and a column label; expected at least one")
    if value is not None and empty_values == placed_lines:
        raise UserError(f"every value of {file} is empty (column {value!r}): nothing is observed")
    rows, columns, values = (_joined(kept) for kept in pieces)
    too_large = int(np.isinf(values).sum())
    if too_large:
        raise UserError(f"{file} has {too_large} values too large for {dtype.name}; read it as float64")
    return EntryTable(rows, columns, values, list(row_codes), list(column_codes), str(file), empty_values, empty_labels)


def _joined(pieces: list[NDArray[Any]]) -> NDArray[Any]:
    """One array of all pieces, which are dropped: not both at once for the three arrays of a table."""
    whole = np.concatenate(pieces)
    pieces.clear()
    return whole


def _filled(texts: Any) -> NDArray[np.bool_]:
    """Which of a dictionary array's texts are there: neither null nor empty."""
    there = np.array([bool(text) for text in texts.dictionary.to_pylist()] + [False])
    indices = texts.indices.fill_null(len(there) - 1).to_numpy(zero_copy_only=False)
    return there[indices]


def _coded(texts: Any, codes: dict[str, int]) -> NDArray[np.int32]:
    """The code of every text; new texts get the next ones, in order of appearance."""
    indices = texts.indices.to_numpy(zero_copy_only=False)
    names = texts.dictionary.to_pylist()
    used = np.zeros(len(names), bool)
    used[indices] = True
    of_name = [codes.setdefault(name, len(codes)) if there else -1 for name, there in zip(names, used, strict=True)]
    return np.array(of_name, np.int32)[indices] if len(indices) else np.empty(0, np.int32)


def _text_chunks(
    file: Path, named: list[str], header: bool, delimiter: str | None, chunk_rows: int, progress: Progress | None
) -> Iterator[tuple[Any, Any, NDArray[np.float64] | None]]:
    text = sniffed(file, delimiter=delimiter, header=header)
    advice = "" if header else " (columns of a file without header go by number)"
    if header and all(name.isdecimal() for name in named):
        advice = ". If its first line is data, read it with header=False (--no-header)"
    if len(text.names) < len(named):
        advice = f". The delimiter is taken to be {text.delimiter!r}; name another with delimiter= (--delimiter)"
        if "::" in "".join(text.sample[0]):
            advice = '. For fields between "::", the delimiter is ":" and columns have the numbers 1, 3, 5, …'
    places = [_place(file, name, text.names, advice) for name in named]
    record = 0
    # pyarrow gives each column once, in the order asked for
    for batch in text.batches(places, chunk_rows, progress):
        texts = [batch.column(index) for index in range(len(places))]
        numbers = text.numbers(texts[2], record, places[2]) if len(places) > 2 else None
        record += batch.num_rows
        yield _labels(texts[0]), _labels(texts[1]), numbers


def _parquet_chunks(
    file: Path, named: list[str], chunk_rows: int, progress: Progress | None
) -> Iterator[tuple[Any, Any, NDArray[np.float64] | None]]:
    pa = import_pyarrow()
    size = file.stat().st_size
    try:
        with pa.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            for name in named:
                _place(file, name, names, "")
            total, record = table.metadata.num_rows, 0
            if not total:
                raise UserError(f"{file} has no rows; expected at least one")
            for batch in table.iter_batches(batch_size=chunk_rows, columns=named, use_threads=False):
                columns = {name: batch.column(batch.schema.get_field_index(name)) for name in named}
                where = f"{file}, row {{:,}}, column "
                texts = [_labels(columns[name]) for name in named[:2]]
                numbers = _parquet_numbers(columns[named[2]], record, where + repr(named[2])) if named[2:] else None
                record += batch.num_rows
                yield texts[0], texts[1], numbers
                if progress is not None:
                    progress(size * record // total, size)
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:  # names need not be UTF-8
        raise UserError(
            f"{file} cannot be read as Parquet ({str(error).splitlines()[0]}); is it cut short, or another format?"
        ) from None


def _parquet_numbers(values: Any, first_record: int, where: str) -> NDArray[np.float64]:
    pa = import_pyarrow()
    pc = pa.compute
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    bad: int | None = None
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        numbers = numbers_of(pc.fill_null(values, ""))
        bad, numbers = (numbers, np.empty(0)) if isinstance(numbers, int) else (None, numbers)
    else:
        try:
            # not safe: a whole number beyond 2^53 is rounded, as it is everywhere else
            numbers = pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise UserError(
                f"{where.partition(', row')[0]} must hold numbers in the value column, got {values.type}"
            ) from None
    infinite = np.flatnonzero(np.isinf(numbers))
    if bad is None and len(infinite):
        bad = int(infinite[0])
    if bad is not None:
        raise UserError(
            f"{where.format(first_record + bad + 1)}: expected a finite number, got {values[bad].as_py()!r}; leave a "
            "value empty where nothing was observed"
        )
    return numbers


def _labels(labels: Any) -> Any:
    """Labels of any type as a dictionary array of texts, null where there is none."""
    pa = import_pyarrow()
    pc = pa.compute
    if pa.types.is_null(labels.type):
        labels = labels.cast(pa.string())
    coded = labels if pa.types.is_dictionary(labels.type) else labels.dictionary_encode()
    names = coded.dictionary
    if pa.types.is_floating(names.type):
        texts = [
            None if name != name else f"{name:.0f}" if name.is_integer() else repr(name) for name in names.to_pylist()
        ]
        names = pa.array(texts, pa.string())
    else:
        names = pc.utf8_trim_whitespace(names.cast(pa.string()))
        names.validate(full=True)  # a Parquet file may call bytes a string that are none
    return pa.DictionaryArray.from_arrays(coded.indices, names)


def _place(file: Path, name: str, names: Sequence[str], advice: str) -> int:
    count = list(names).count(name)
    if count == 1:
        return list(names).index(name)
    listed = ", ".join(names[:30]) + (f", … ({len(names):,} in all)" if len(names) > 30 else "")
    if count:
        raise UserError(f"{file} has {count} columns named {name!r}; rename them. It has {listed}")
    raise UserError(f"{file} has no column {name!r}; it has {listed}{advice}")
