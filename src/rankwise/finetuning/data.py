"""Reading a labelled table and guessing what its columns mean."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rankwise.errors import UserError
from rankwise.finetuning.image_tables import image_column, image_table, read_image_folder
from rankwise.finetuning.table import Columns, Table
from rankwise.finetuning.word_tables import CONLL_ENDINGS, holds_lists, read_conll, word_columns, word_table

_TEXT_NAMES = (
    "sentence1",
    "text",
    "sentence",
    "premise",
    "question",
    "question1",
    "query",
    "review",
    "content",
    "title",
    "prompt",
)
_PAIR_NAMES = ("sentence2", "text_pair", "hypothesis", "question2", "answer", "document", "passage")
_LABEL_NAMES = (
    "label",
    "labels",
    "score",
    "similarity_score",
    "similarity",
    "rating",
    "target",
    "class",
    "category",
    "y",
    "completion",
)
# every cell as written: "007", "1e3", "TRUE" and "NA" are texts like any other
_AS_WRITTEN: dict[str, Any] = {"dtype": str, "encoding": "utf-8-sig", "keep_default_na": False, "na_values": [""]}
_FORMATS = ".csv, .tsv, .jsonl, .parquet, .conll (a word a line), a folder of images or hub:NAME"


def read_table(
    source: str, *, text: str | None = None, text_pair: str | None = None, label: str | None = None
) -> Table:
    """Read a CSV, TSV, JSONL or Parquet file, a CoNLL file, a folder of images, or ``hub:NAME[:CONFIG]`` (its train split).

    A text column that holds lists makes a table of words, one of image files a table of images (:class:`Table`).

    Args:
        source: path or ``hub:`` name.
        text, text_pair, label: column names; guessed from the usual names and the content unless given.

    Raises:
        UserError: missing, empty or unreadable file, wrong encoding, missing columns.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "d.csv").write_text("sentence,label\\ngood,1\\nbad,0\\n", encoding="utf-8")
        >>> from rankwise.finetuning import read_table
        >>> table = read_table(str(folder / "d.csv"))
        >>> table.columns.text, table.columns.label, len(table.rows)
        ('sentence', 'label', 2)
    """
    path = None if source.startswith("hub:") else Path(source)
    if path is not None and os.path.isdir(path):  # noqa: PTH112  # unlike Path.is_dir, no exception for a long name
        return read_image_folder(path, text=text, label=label)
    if path is not None and path.suffix.lower() in CONLL_ENDINGS:
        return read_conll(path, text=text, label=label)
    frame, revision = _read_hub(source[4:]) if path is None else _read_file(path)
    if frame.empty:
        raise UserError(f"{source} has no rows; expected a header and at least one labelled row")
    frame.columns = [str(name) for name in frame.columns]
    _require_columns(frame, source, text, text_pair, label)
    other_kinds = text is not None or _usual_text(frame, {label, text_pair}) is None  # texts come first, unless named
    words = word_columns(frame, text, label) if other_kinds else None
    if words is not None:
        return word_table(frame, words, source, revision)
    image = image_column(frame, text) if other_kinds else None
    columns = _guess_columns(frame, source, text or image, text_pair, label)
    used = [columns.text, columns.label] + ([columns.text_pair] if columns.text_pair else [])
    texts = [columns.text] + ([columns.text_pair] if columns.text_pair else [])
    missing = frame[used].isna().any(axis=1)
    for name in texts:
        missing |= frame[name].astype(str).str.strip().eq("")
    if bool(missing.all()):
        raise UserError(f"every row of {source} has an empty text or label (columns {', '.join(used)})")
    kept = frame[~missing]
    labels = _as_numbers(kept[columns.label]).tolist()
    if image is not None and path is not None:
        numbers = np.flatnonzero(~missing.to_numpy()).tolist()
        columns = replace(columns, text_pair=None)
        return image_table(kept[image].tolist(), labels, numbers, columns, path, int(missing.sum()))
    rows = [
        {"row": int(number), "text": str(first), "text_pair": None if second is None else str(second), "label": value}
        for number, first, second, value in zip(
            np.flatnonzero(~missing.to_numpy()),
            kept[columns.text],
            kept[columns.text_pair] if columns.text_pair else [None] * len(kept),
            labels,
            strict=True,
        )
    ]
    return Table(rows, columns, source, revision, int(missing.sum()))


def read_texts(
    source: str, *, text: str | None = None, text_pair: str | None = None, label: str | None = None
) -> list[str]:
    """Every text of the text columns of a CSV, TSV, JSONL or Parquet file, row by row; no labels are needed.

    Args:
        source: path.
        text, text_pair: column names; guessed from the usual names and the content unless given.
        label: a column that is no text.

    Raises:
        UserError: missing, empty or unreadable file, wrong encoding, missing columns, no texts.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "d.csv").write_text("sentence,source\\ngood,a\\nbad,b\\n", encoding="utf-8")
        >>> from rankwise.finetuning.data import read_texts
        >>> read_texts(str(folder / "d.csv"))
        ['good', 'bad']
    """
    frame, _ = _read_file(Path(source))
    frame.columns = [str(name) for name in frame.columns]
    _require_columns(frame, source, text, text_pair, label)
    label = label or next((n for n in frame.columns if n.lower() in _LABEL_NAMES and n not in (text, text_pair)), None)
    columns = _guess_columns(frame, source, text, text_pair, label or "no label")
    used = [name for name in (columns.text, columns.text_pair) if name is not None]
    texts = [cell for row in frame[used].to_numpy().tolist() for cell in row if isinstance(cell, str) and cell.strip()]
    if not texts or image_column(frame, columns.text) is not None:
        raise UserError(f"{source} holds no texts (column {columns.text!r}); name the text column with --text")
    return texts


def numeric_labels(rows: Sequence[dict[str, Any]], source: str, column: str) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """The labels as finite float64, or an error naming the first that is no number."""
    values = np.empty(len(rows))
    for index, row in enumerate(rows):
        try:
            values[index] = float(row["label"])
        except (TypeError, ValueError):
            values[index] = np.nan
        if not np.isfinite(values[index]):
            raise UserError(
                f"column {column!r} of {source} must hold numbers for this task; row {row['row']} has {row['label']!r}. "
                "For class labels use --task classification"
            )
    return values


def plain(value: Any) -> Any:
    """numpy scalars as Python's, and 1.0 as 1: CSV readers turn integer labels into floats when one is missing."""
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def draw(count: int, shots: int, seed: int) -> tuple[list[int], list[int]]:
    """``shots`` of ``count`` positions without replacement, and the rest; the same for the same seed."""
    order = np.random.default_rng(seed).permutation(count)
    return sorted(order[:shots].tolist()), sorted(order[shots:].tolist())


def _read_file(path: Path) -> tuple[pd.DataFrame, str]:
    if not os.path.isfile(path):  # noqa: PTH113  # unlike Path.is_file, no exception for a name that is too long
        kind = "is a folder" if os.path.isdir(path) else "does not exist"  # noqa: PTH112
        raise UserError(f"the data file {path} {kind}; expected {_FORMATS}")
    readers = {
        ".csv": lambda: pd.read_csv(path, **_AS_WRITTEN),
        ".tsv": lambda: pd.read_csv(path, sep="\t", quoting=3, **_AS_WRITTEN),
        ".jsonl": lambda: _read_json_lines(path),
        ".parquet": lambda: pd.read_parquet(path),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"cannot tell the format of {path} from {path.suffix or 'a name without ending'!r}; expected {_FORMATS}"
        )
    try:
        frame = reader()
    except pd.errors.EmptyDataError:
        raise UserError(f"{path} is empty; expected a header and at least one labelled row") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start} cannot be read); save it as UTF-8, for example with "
            "iconv -f latin1 -t utf-8"
        ) from None
    except (pd.errors.ParserError, ValueError, OSError, TypeError, AttributeError) as error:  # pandas' of odd JSON too
        raise UserError(f"cannot read {path} as {path.suffix[1:]}: {error}") from None
    if not isinstance(frame.index, pd.RangeIndex):
        raise UserError(
            f"{path} has rows with more fields than its header has columns; put texts with commas in double quotes"
        )
    return frame, hashlib.sha256(path.read_bytes()).hexdigest()


def _read_json_lines(path: Path) -> pd.DataFrame:
    """One object a line. Asked first: of a line that is a list pandas makes columns named 0, 1, …, and of a mixture a warning."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip() and not line.lstrip().startswith("{"):
                raise ValueError(f'line {number} is no object such as {{"text": "…", "label": 1}}')
    return pd.read_json(path, lines=True, encoding="utf-8-sig", dtype=False)


def _as_numbers(labels: pd.Series) -> pd.Series:
    """Labels written as text, as numbers if every one is a number and no two different spellings become the same."""
    if not pd.api.types.is_string_dtype(labels):
        return labels
    try:
        numbers = pd.to_numeric(labels)
    except (ValueError, TypeError):
        return labels
    return numbers if numbers.nunique() == labels.nunique() or (numbers % 1 != 0).any() else labels


def _read_hub(name: str) -> tuple[pd.DataFrame, str]:
    try:
        import datasets
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise UserError("reading hub:NAME needs one more package: pip install 'rankwise[hub]'") from None
    repository, _, config = name.partition(":")
    if not repository:
        raise UserError("--data hub: needs a name, such as hub:org/name")
    try:
        loaded = datasets.load_dataset(repository, config or None, split="train")
        revision = HfApi().dataset_info(repository).sha or "unknown"
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot get the data set {repository!r} from the hub ({first}). Offline? Download it elsewhere, save it as "
            "Parquet and pass the file"
        ) from None
    frame = loaded.to_pandas()
    for column, feature in loaded.features.items():
        inner = getattr(feature, "feature", None)  # of a list
        if isinstance(feature, datasets.ClassLabel):
            frame[column] = [feature.int2str(int(value)) if value >= 0 else None for value in frame[column]]
        elif isinstance(inner, datasets.ClassLabel):
            frame[column] = [[inner.int2str(int(value)) for value in values] for values in frame[column]]
    return frame, revision


def _require_columns(
    frame: pd.DataFrame, source: str, text: str | None, text_pair: str | None, label: str | None
) -> None:
    names = list(frame.columns)
    for option, name in (("--text", text), ("--text-pair", text_pair), ("--label", label)):
        if name is not None and name not in names:
            raise UserError(f"{source} has no column {name!r} ({option}); it has {', '.join(names)}")


def _usual_text(frame: pd.DataFrame, taken: set[str | None]) -> str | None:
    lower = {name.lower(): name for name in frame.columns}
    found = (lower[name] for name in _TEXT_NAMES if name in lower and lower[name] not in taken)
    return next((name for name in found if not holds_lists(frame[name])), None)


def _guess_columns(
    frame: pd.DataFrame, source: str, text: str | None, text_pair: str | None, label: str | None
) -> Columns:
    names = list(frame.columns)
    lower = {name.lower(): name for name in names}
    label = label or next((lower[name] for name in _LABEL_NAMES if name in lower), None)
    if label is None:
        raise UserError(
            f"cannot tell which column of {source} is the label; it has {', '.join(names)}. Name it with --label"
        )
    if text is None:
        text = _usual_text(frame, {label, text_pair}) or _longest_text(frame, {label, text_pair})
        if text is None:
            raise UserError(f"cannot find a text column in {source}; it has {', '.join(names)}. Name it with --text")
        free = [lower[name] for name in _PAIR_NAMES if name in lower and lower[name] not in (text, label)]
        text_pair = text_pair or next(iter(free), None)
    named = [name for name in (text, text_pair, label) if name is not None]
    if len(set(named)) < len(named):
        raise UserError(f"text, pair and label must be different columns, got {text}, {text_pair} and {label}")
    return Columns(text, text_pair, label)


def _longest_text(frame: pd.DataFrame, taken: set[str | None]) -> str | None:
    lengths = {
        name: frame[name].astype(str).str.len().mean()
        for name in frame.columns
        if name not in taken
        and pd.api.types.is_string_dtype(frame[name])
        and pd.to_numeric(frame[name], errors="coerce").isna().any()
    }
    return max(lengths, key=lambda name: lengths[name]) if lengths else None
