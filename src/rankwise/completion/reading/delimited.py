"""A delimited text file: its delimiter and column names, its records in chunks, and the line of a bad one."""

import csv
import gzip
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.completion.reading.byte_stream import ByteStream, is_gzip
from rankwise.errors import UserError

Progress = Callable[[int, int], None]

CHUNK_ROWS = 250_000
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none"})  # compared in lower case, without spaces around

_DELIMITERS = (",", "\t", ";", "|")
_SPELLINGS = {"\\t": "\t", "tab": "\t", "space": " ", "comma": ",", "semicolon": ";"}
_SAMPLE = 1 << 16
_LONGEST_LINE = 1 << 26
_BLOCKS = (1 << 12, 1 << 25)  # least and most bytes a chunk
_OTHER_FORMATS = {b"PAR1": "Parquet (.parquet)", b"PK\x03\x04": "a zip archive", b"\x93NUMPY": "NumPy (.npy)"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Delimited:
    """How a text file is to be read.

    Attributes:
        path: the file, plain or gzip.
        delimiter: one character.
        quoted: whether double quotes enclose fields. They do, except in a tab-separated file whose first line has none.
        header: whether the first record holds names.
        names: of the columns; "1", "2", … without a header.
        sample: the first records as text, the header among them.
        line_bytes: mean and longest length of a line of the sample.
    """

    path: Path
    delimiter: str
    quoted: bool
    header: bool
    names: tuple[str, ...]
    sample: tuple[tuple[str, ...], ...]
    line_bytes: tuple[float, int]

    def batches(self, columns: Sequence[int], chunk_rows: int, progress: Progress | None = None) -> Iterator[Any]:
        """The named columns as pyarrow batches of strings, about ``chunk_rows`` records each, in the file's order.

        Args:
            columns: positions from 0.
            chunk_rows: positive.
            progress: called with (bytes read, bytes of the file) after every batch.

        Raises:
            UserError: a record has another number of fields, a quote never closes, or a text is not UTF-8.
        """
        pa = import_pyarrow()
        positions = [str(place) for place in range(len(self.names))]
        chosen = [positions[place] for place in columns]
        mean, longest = self.line_bytes
        block = int(min(max(chunk_rows * mean, 16 * longest, _BLOCKS[0]), max(16 * longest, _BLOCKS[1])))
        with ByteStream(self.path) as stream:
            try:
                reader = pa.csv.open_csv(
                    pa.PythonFile(stream, mode="r"),
                    # the names are in the file's first record, which may have duplicates: positions stand for them
                    read_options=pa.csv.ReadOptions(
                        use_threads=False,
                        block_size=block,
                        column_names=positions,
                        skip_rows_after_names=int(self.header),
                    ),
                    parse_options=pa.csv.ParseOptions(
                        delimiter=self.delimiter,
                        quote_char='"' if self.quoted else False,
                        newlines_in_values=self.quoted,
                    ),
                    convert_options=pa.csv.ConvertOptions(
                        column_types={name: pa.string() for name in positions},
                        include_columns=chosen,
                        strings_can_be_null=False,
                    ),
                )
                for batch in reader:
                    yield batch
                    if progress is not None:
                        progress(stream.done, stream.size)
            except pa.ArrowException as error:
                raise self._explained(str(error), block) from None
            if self.quoted and stream.quotes % 2:
                self._check_quotes()

    def numbers(self, texts: Any, first_record: int, column: int) -> NDArray[np.float64]:
        """Texts as float64, with NaN where they are empty or one of the usual words for "missing".

        Args:
            texts: pyarrow array of strings.
            first_record: number of the first text's record, from 0 after the header; for the error.
            column: its position, from 0; for the error.

        Raises:
            UserError: a text is neither a number nor empty, or is infinite; names file, line and column.
        """
        values = numbers_of(texts)
        if not isinstance(values, int):
            infinite = np.flatnonzero(np.isinf(values))
            if not len(infinite):
                return values
            values = int(infinite[0])
        came = texts[values].as_py()
        advice = "leave a value empty where nothing was observed"
        if re.fullmatch(r"\s*[+-]?\d+,\d+\s*", came):
            advice = "write decimals with a point"
        raise UserError(
            f"{self.path}, {self.line_of(first_record + values)}, column {self.names[column]!r}: expected a finite "
            f"number, got {_shortened(came)!r}; {advice}"
        )

    def line_of(self, record: int) -> str:
        """ "line 12" for the number of a record (from 0 after the header): slow, for messages only."""
        try:
            with self._text() as text:
                reader = self._records(text)
                filled = (reader.line_num for fields in reader if fields)
                line = next(islice(filled, record + self.header, None), None)
        except csv.Error:
            line = None
        return f"record {record + 1:,}" if line is None else f"line {line:,}"

    def _explained(self, reason: str, block: int) -> UserError:
        expected = re.search(r"Expected (\d+) columns, got (\d+)", reason)
        if expected:
            if self.quoted:
                self._check_quotes()
            line, got = self._first_ragged(int(expected[1]))
            return UserError(
                f"{self.path}{line}: expected {expected[1]} fields separated by {self.delimiter!r}, as in the first "
                f"line, got {got or expected[2]}; is the file cut short, or a text with {self.delimiter!r} not in "
                "double quotes?"
            )
        if "UTF8" in reason:
            return UserError(
                f"{self.path}{self._first_undecodable()} is not UTF-8; save it as UTF-8, for example with "
                "iconv -f latin1 -t utf-8"
            )
        if "straddling" in reason:
            return UserError(
                f"{self.path} has a record of more than {block:,} bytes: a double quote that never closes, or a file "
                "that is no table"
            )
        return UserError(f"{self.path} cannot be read as text separated by {self.delimiter!r}: {reason}")

    def _first_ragged(self, expected: int) -> tuple[str, int]:
        try:
            with self._text() as text:
                reader = self._records(text)
                for fields in reader:
                    if fields and len(fields) != expected:
                        return f", line {reader.line_num:,}", len(fields)
        except csv.Error:
            pass
        return "", 0

    def _first_undecodable(self) -> str:
        with self._text(errors="surrogateescape") as text:
            for number, line in enumerate(text, 1):
                if any("\udc80" <= letter <= "\udcff" for letter in line):
                    return f", line {number:,},"
        return ""

    def _check_quotes(self) -> None:
        """An odd number of quotes is either a stray one inside a field, which is a letter, or one that never closes."""
        line = 1
        try:
            with self._text() as text:
                reader = csv.reader(text, delimiter=self.delimiter, strict=True)
                for _ in reader:
                    line = reader.line_num + 1
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise UserError(
                    f"{self.path}, line {line:,}: a double quote opens here and never closes; is the file cut short?"
                ) from None

    def _records(self, text: io.TextIOBase) -> Any:
        return _csv_reader(text, self.delimiter, self.quoted)

    def _text(self, errors: str = "replace") -> io.TextIOBase:
        if is_gzip(self.path):
            return gzip.open(self.path, "rt", encoding="utf-8-sig", errors=errors, newline="")
        return self.path.open("rt", encoding="utf-8-sig", errors=errors, newline="")


def import_pyarrow() -> Any:
    """pyarrow with its csv, compute and parquet modules, or an error that says how to get it."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading tables needs pyarrow ({error}): pip install pyarrow") from None
    return pyarrow


def sniffed(path: Path, *, delimiter: str | None, header: bool | None) -> Delimited:
    """What kind of delimited text a file holds, from its beginning.

    Args:
        path: an existing file.
        delimiter: one character, or "tab"; found among comma, tab, semicolon and bar if None.
        header: whether the first record holds names; None: it does if it has a field that is neither a number nor
            empty, the first field apart.

    Raises:
        UserError: the file is not text, not UTF-8, has no record, or the delimiter is not one character.
    """
    sample, whole = _sample(path)
    try:
        text = sample.decode("utf-8", errors="replace")
        names_line = sample.split(b"\n", 1)[0].decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(
            f"{path}, line 1, is not UTF-8; save it as UTF-8, for example with iconv -f latin1 -t utf-8"
        ) from None
    chosen = _checked_delimiter(delimiter) if delimiter is not None else _likeliest_delimiter(path, text, whole)
    quoted = chosen != "\t" or '"' in names_line
    records = _sampled_records(text, chosen, quoted, whole)
    if not records:
        raise UserError(f"{path} has no rows; expected a table with at least one")
    if header is None:
        header = any(not looks_numeric(field) for field in records[0][1:] or records[0])
    first = records[0]
    names = tuple(field.strip() for field in first) if header else tuple(str(i + 1) for i in range(len(first)))
    if header and whole and len(records) == 1:
        raise UserError(f"{path} has a first line and nothing below it; expected a header and at least one row")
    lines = sample.splitlines() or [b""]
    return Delimited(
        path,
        chosen,
        quoted,
        header,
        names,
        tuple(map(tuple, records)),
        (max(1.0, len(sample) / len(lines)), max(1, *map(len, lines))),
    )


def looks_numeric(field: str) -> bool:
    """Whether a field is a number or stands for a missing one."""
    word = field.strip()
    return word.lower() in MISSING or _NUMBER.fullmatch(word) is not None


def numbers_of(texts: Any) -> NDArray[np.float64] | int:
    """Strings as float64 with NaN for the missing; the position of the first that is no number if there is one."""
    pa = import_pyarrow()
    pc = pa.compute
    try:  # usually nothing is missing and nothing has spaces around it
        return pc.cast(texts, pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        words = pc.utf8_trim_whitespace(texts)
        missing = pc.is_in(pc.utf8_lower(words), value_set=pa.array(sorted(MISSING)))
        words = pc.if_else(missing, "nan", words)
    try:
        return pc.cast(words, pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        low, high = 0, len(words) - 1  # the first that fails lies in low … high
        while low < high:
            middle = (low + high) // 2
            try:
                pc.cast(words.slice(low, middle - low + 1), pa.float64())
                low = middle + 1
            except pa.ArrowInvalid:
                high = middle
        return low


def _sample(path: Path) -> tuple[bytes, bool]:
    """The first lines, and whether they are all there is."""
    with path.open("rb") as opened:
        start = opened.read(8)
    for magic, name in _OTHER_FORMATS.items():
        if start.startswith(magic):
            raise UserError(f"{path} is no text: it holds {name}; unpack or rename it")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is UTF-16; save it as UTF-8, for example with iconv -f utf-16 -t utf-8")
    with ByteStream(path) as stream:
        sample = stream.read(_SAMPLE)
        whole = False
        while not whole and b"\n" not in sample and b"\r" not in sample[:-1] and len(sample) < _LONGEST_LINE:
            more = stream.read(_SAMPLE)
            whole = not more
            sample += more
        whole = whole or not stream.read(1)
    if b"\0" in sample:
        raise UserError(f"{path} is no text: it has zero bytes; expected a table such as CSV in UTF-8")
    if not sample.strip():
        raise UserError(f"{path} has no rows; expected a table with at least one")
    return sample, whole


def _checked_delimiter(delimiter: str) -> str:
    chosen = _SPELLINGS.get(delimiter.lower(), delimiter)
    if len(chosen) != 1 or not chosen.isascii() or chosen in '"\r\n\0':
        raise UserError(f"the delimiter must be one character, such as , or tab; got {delimiter!r}")
    return chosen


def _likeliest_delimiter(path: Path, text: str, whole: bool) -> str:
    """The one that cuts every record into the same number of fields; of several, the one that makes most."""
    first = text.split("\n", 1)[0]
    if path.name.lower().removesuffix(".gz").endswith(".tsv") and "\t" in first:
        return "\t"
    counts: dict[str, set[int]] = {}
    for delimiter in _DELIMITERS:
        try:
            counts[delimiter] = set(
                map(len, _sampled_records(text, delimiter, '"' in first or delimiter != "\t", whole))
            )
        except UserError:
            continue
    even = {delimiter: max(sizes) for delimiter, sizes in counts.items() if len(sizes) == 1 and max(sizes) > 1}
    if even:
        return max(even, key=lambda delimiter: even[delimiter])
    return max(_DELIMITERS, key=first.count)


def _sampled_records(text: str, delimiter: str, quoted: bool, whole: bool) -> list[list[str]]:
    try:
        reader = _csv_reader(io.StringIO(text, newline=""), delimiter, quoted)
        records = [fields for fields in islice(reader, 200) if fields]
    except csv.Error as error:
        raise UserError(f"the file cannot be read as text separated by {delimiter!r} ({error})") from None
    # the last record of a sample may be cut by the end of the sample
    return records[:-1] if not whole and 1 < len(records) < 200 else records


def _csv_reader(text: io.TextIOBase, delimiter: str, quoted: bool) -> Any:
    return csv.reader(text, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)


def _shortened(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
