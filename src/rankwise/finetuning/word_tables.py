"""Words with a tag each: from a column of lists, or a CoNLL file of one word a line."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rankwise.errors import UserError
from rankwise.finetuning.table import WORDS, Columns, Table

CONLL_ENDINGS = (".conll", ".bio", ".iob", ".iob2")
WORD_NAMES = ("tokens", "words", "text", "sentence")
TAG_NAMES = ("ner_tags", "tags", "labels", "ner", "pos_tags", "upos", "chunk_tags", "label")
_DOCUMENT = "-DOCSTART-"  # how CoNLL files begin a document


def word_columns(frame: pd.DataFrame, text: str | None, label: str | None) -> Columns | None:
    """The columns of words and tags; None where the text column (if named) or every candidate holds no lists."""
    lower = {name.lower(): name for name in frame.columns}
    words = text or next(
        (lower[name] for name in WORD_NAMES if name in lower and holds_lists(frame[lower[name]])), None
    )
    if words is None or not holds_lists(frame[words]):
        return None
    tags = label or next(
        (
            lower[name]
            for name in TAG_NAMES
            if name in lower and lower[name] != words and holds_lists(frame[lower[name]])
        ),
        None,
    )
    if tags is None:
        raise UserError(
            f"column {words!r} holds lists of words, but no column of tags was found among "
            f"{', '.join(frame.columns)}. Name it with --label"
        )
    return Columns(words, None, tags)


def holds_lists(column: pd.Series) -> bool:
    present = column.dropna()
    return len(present) > 0 and all(isinstance(value, list | tuple | np.ndarray) for value in present)


def word_table(frame: pd.DataFrame, columns: Columns, source: str, revision: str) -> Table:
    """Rows of words and tags; those without a word are dropped and counted.

    Raises:
        UserError: a row whose tags are no list or are not as many as its words.
    """
    sentences = []
    for number, (words, tags) in enumerate(zip(frame[columns.text], frame[columns.label], strict=True)):
        absent = [not isinstance(value, list | tuple | np.ndarray) for value in (words, tags)]
        if absent[0] or len(words) == 0:
            continue
        if absent[1]:
            raise UserError(
                f"row {number} of {source} has the tags {tags!r}; expected a list with a tag for every word"
            )
        if len(words) != len(tags):
            raise UserError(
                f"row {number} of {source} has {len(words)} words ({columns.text}) and {len(tags)} tags "
                f"({columns.label}); expected a tag for every word"
            )
        sentences.append((number, [str(word) for word in words], list(tags)))
    return _table(sentences, columns, source, revision, len(frame) - len(sentences))


def read_conll(path: Path, *, text: str | None = None, label: str | None = None) -> Table:
    """A word and its columns a line, the word first and the tag last, a blank line after each sentence.

    Columns are split at tabs where the file has any, at blanks otherwise. Lines of ``-DOCSTART-`` are left out.

    Raises:
        UserError: a missing or empty file, wrong encoding, or lines of different numbers of columns.

    Example:
        >>> import pathlib, tempfile
        >>> from rankwise.finetuning import read_table
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "names.conll"
        >>> _ = file.write_text("Ada B-PER\\nsings O\\n\\nParis B-LOC\\n", encoding="utf-8")
        >>> [(row["words"], row["label"]) for row in read_table(str(file)).rows]
        [(('Ada', 'sings'), ('B-PER', 'O')), (('Paris',), ('B-LOC',))]
    """
    columns = Columns("words", None, "tags")
    if text not in (None, columns.text) or label not in (None, columns.label):
        raise UserError(
            f"the columns of {path} have no names: the word is the first and the tag the last; leave --text out"
        )
    try:
        raw = path.read_bytes()
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start} cannot be read); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    separator = "\t" if "\t" in content else None
    sentences: list[tuple[int, list[str], list[Any]]] = []
    words: list[str] = []
    tags: list[Any] = []
    width = None
    # not splitlines, which also splits at characters that stand in words
    for number, line in enumerate([*content.replace("\r\n", "\n").split("\n"), ""], start=1):
        if not line.strip():
            if words:
                sentences.append((len(sentences), words, tags))
                words, tags = [], []
            continue
        cells = [cell.strip() for cell in line.split(separator)]
        if cells[0] == _DOCUMENT:
            continue
        width = width or len(cells)
        if len(cells) != width or width < 2 or not cells[0] or not cells[-1]:
            raise UserError(
                f"line {number} of {path} has {len(cells)} columns ({line.strip()[:40]!r}), expected "
                f"{max(width, 2)}: a word first, its tag last, and a blank line between sentences"
            )
        words.append(cells[0])
        tags.append(cells[-1])
    return _table(sentences, columns, str(path), hashlib.sha256(raw).hexdigest(), 0)


def _table(
    sentences: Iterable[tuple[int, Sequence[str], Sequence[Any]]],
    columns: Columns,
    source: str,
    revision: str,
    dropped: int,
) -> Table:
    rows = [
        {"row": number, "text": " ".join(words), "text_pair": None, "label": tuple(tags), "words": tuple(words)}
        for number, words, tags in sentences
    ]
    if not rows:
        raise UserError(f"{source} has no words; expected at least one sentence with a tag for every word")
    return Table(rows, columns, source, revision, dropped, WORDS)
