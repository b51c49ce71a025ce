"""The tasks of the papers by name: eight of GLUE, two made of E2E NLG; anything else is a table of the user's own.

Sources: Wang et al., *GLUE* (ICLR 2019), whose official metrics these are; Novikova et al., *The E2E Dataset* (SIGDIAL
2017).
"""

import csv
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import UserError
from rankwise.finetuning.data import Columns, Table, read_table

_HUB = "nyu-mll/glue"
_TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class NamedTask:
    """A task with its rows and its headline metric.

    Attributes:
        name: what it is called, ``"stsb"``; a user's table is called by its path.
        title: one line for a reader.
        kind: the task for :func:`rankwise.finetuning.make_task`.
        metric: the key of ``Task.score`` that is the headline; empty: the task's own primary metric.
        train: the rows to draw from.
        evaluation: the official development rows; None: hold some of ``train`` out.
    """

    name: str
    title: str
    kind: str
    metric: str
    train: Table
    evaluation: Table | None


def load_named_task(name: str, data_root: Path | None = None) -> NamedTask:
    """Load one of :data:`TASK_NAMES`, or a user's own file or ``hub:NAME``.

    The GLUE tasks are read from ``glue_<name>/`` under the data folder (the standard release's TSV; for STS-B the
    original ``sts-train.csv`` and ``sts-dev.csv``) or, where there is no such folder, from ``nyu-mll/glue`` on the hub.
    ``e2e-price`` and ``e2e-nlg`` are read from ``e2e_nlg/{trainset,devset}.csv.gz``. Texts stay as written. Labels
    written as numbers become numbers, the same ones from the hub as from a file. An evaluation row of ``e2e-nlg`` is
    one meaning representation with the list of all its references as label.

    Args:
        name: see above.
        data_root: the data folder; the environment variable ``RANKWISE_DATA`` unless given.

    Raises:
        UserError: unknown name, missing or damaged file, hub out of reach.

    Example:
        >>> import pathlib, tempfile
        >>> from rankwise.finetuning.named_tasks import load_named_task
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> (folder / "glue_rte").mkdir()
        >>> lines = "index\\tsentence1\\tsentence2\\tlabel\\n0\\tIt rains.\\tIt is wet.\\tentailment\\n"
        >>> for file in ("train.tsv", "dev.tsv"):
        ...     _ = (folder / "glue_rte" / file).write_text(lines, encoding="utf-8")
        >>> task = load_named_task("rte", folder)
        >>> task.metric, task.train.rows[0]["text_pair"], task.train.rows[0]["label"]
        ('accuracy', 'It is wet.', 'entailment')
    """
    if name in _GLUE:
        return _load_glue(name, _GLUE[name], _data_folder(data_root))
    if name in _E2E:
        return _E2E[name](name, _data_folder(data_root))
    there = os.path.exists(name)  # noqa: PTH110  # unlike Path.exists, no exception for a name that is too long
    if there or name.startswith("hub:") or name.lower().endswith(_TABLE_ENDINGS):
        return NamedTask(name, f"{name}: a table of your own", "auto", "", read_table(name), None)
    raise UserError(
        f"unknown task {name!r}; expected one of {', '.join(TASK_NAMES)}, the path of a "
        f"{', '.join(_TABLE_ENDINGS)} file, or hub:NAME"
    )


@dataclass(frozen=True)
class _GlueTask:
    """How one GLUE task lies in its files and on the hub.

    Attributes:
        columns: names in the local files' header, or in ``names``.
        hub_columns: names on the hub.
        classes: the labels there are; none: scores from 0 to 5.
        names: the columns of files without a header.
        optional_columns: source columns that some rows have at their end.
        broken: share of rows that may have too few columns and is then dropped.
    """

    title: str
    metric: str
    columns: Columns
    hub_columns: Columns
    classes: tuple[str, ...]
    kind: str = "classification"
    files: tuple[str, str] = ("train.tsv", "dev.tsv")
    hub_splits: tuple[str, str] = ("train", "validation")
    names: tuple[str, ...] = ()
    optional_columns: int = 0
    broken: float = 0.0

    def label(self, written: str, where: str) -> Any:
        """The label as a class name, or as a number where it is written as one."""
        if self.classes:
            if written in self.classes:
                return int(written) if written.isdigit() else written
            expected = f"one of {', '.join(self.classes)}"
        else:
            try:
                if 0 <= float(written) <= 5:
                    return float(written)
            except ValueError:
                pass
            expected = "a score from 0 to 5"
        raise UserError(f"{where} has the label {written!r}, expected {expected}; is the file in another format?")


_YES_NO = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = Columns("sentence1", "sentence2", "label")
_SINGLE = Columns("sentence", None, "label")

_GLUE: dict[str, _GlueTask] = {
    "cola": _GlueTask(
        "CoLA: is the sentence acceptable English?", "matthews", _SINGLE, _SINGLE, _YES_NO,
        names=("source", "label", "mark", "sentence"),
    ),
    "sst2": _GlueTask("SST-2: does the film review like the film?", "accuracy", _SINGLE, _SINGLE, _YES_NO),
    "mrpc": _GlueTask(
        "MRPC: do two news sentences say the same?", "accuracy_f1",
        Columns("#1 String", "#2 String", "Quality"), _PAIR, _YES_NO,
    ),
    "stsb": _GlueTask(
        # auto: cosine on an embedding model, a regression head on any other, as in the ICML paper
        "STS-B: how similar in meaning are two sentences, from 0 to 5?", "spearman",
        Columns("sentence1", "sentence2", "score"), _PAIR, (), kind="auto", files=("sts-train.csv", "sts-dev.csv"),
        names=("genre", "file", "year", "index", "score", "sentence1", "sentence2"), optional_columns=2,
    ),
    "qqp": _GlueTask(
        # some questions of the release hold line breaks, so their rows lie in pieces; the usual loaders drop them too
        "QQP: do two questions ask the same?", "accuracy_f1", Columns("question1", "question2", "is_duplicate"),
        Columns("question1", "question2", "label"), _YES_NO, broken=1e-3,
    ),
    "mnli": _GlueTask(
        "MNLI: does the premise entail or contradict the hypothesis, or neither? (matched genres)", "accuracy",
        Columns("sentence1", "sentence2", "gold_label"), Columns("premise", "hypothesis", "label"),
        ("entailment", "neutral", "contradiction"), files=("train.tsv", "dev_matched.tsv"),
        hub_splits=("train", "validation_matched"),
    ),
    "qnli": _GlueTask(
        "QNLI: does the sentence answer the question?", "accuracy", Columns("question", "sentence", "label"),
        Columns("question", "sentence", "label"), _ENTAILMENT,
    ),
    "rte": _GlueTask("RTE: does the first text entail the second?", "accuracy", _PAIR, _PAIR, _ENTAILMENT),
}  # fmt: skip


def _data_folder(data_root: Path | None) -> Path | None:
    given = data_root if data_root is not None else os.environ.get("RANKWISE_DATA") or None
    if given is None:
        return None
    if not Path(given).is_dir():
        named = "" if data_root is not None else " that RANKWISE_DATA names"
        raise UserError(f"the data folder {given}{named} is no folder; expected one with glue_rte/, e2e_nlg/ and so on")
    return Path(given)


def _load_glue(name: str, task: _GlueTask, root: Path | None) -> NamedTask:
    folder = root / f"glue_{name}" if root is not None else None
    if folder is not None and folder.is_dir():
        train, evaluation = (_read_tsv(folder / file, task) for file in task.files)
    else:
        train, evaluation = (_read_hub_split(name, split, task, folder) for split in task.hub_splits)
    return NamedTask(name, task.title, task.kind, task.metric, train, evaluation)


def _read_tsv(path: Path, task: _GlueTask) -> Table:
    """One file of the GLUE release: tabs between columns, one row a line, quotes are characters like any other."""
    text, revision = _read_text(path)
    # not splitlines, which also splits at characters that stand in sentences
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
    names = task.names or tuple(lines[0].split("\t") if lines else ())
    header_lines = 0 if task.names else 1
    used = [name for name in (task.columns.text, task.columns.text_pair, task.columns.label) if name is not None]
    missing = [name for name in used if name not in names]
    if missing and lines:
        raise UserError(f"the header of {path} lacks {', '.join(missing)}; it has {', '.join(names)}")
    widths = range(len(names), len(names) + task.optional_columns + 1)
    records, broken = [], 0
    for row, line in enumerate(lines[header_lines:]):
        cells = dict(enumerate(line.split("\t")))
        if len(cells) not in widths:
            if len(cells) < len(names) and broken < task.broken * len(lines):
                broken += 1
                continue
            raise UserError(
                f"line {row + header_lines + 1} of {path} has {len(cells)} columns, expected {len(names)}; "
                "is the file cut short or in another format?"
            )
        text_, pair, label = (
            cells[names.index(name)] if name is not None else None
            for name in (task.columns.text, task.columns.text_pair, task.columns.label)
        )
        records.append((row, text_, pair, task.label(label, f"row {row} of {path}") if label else None))
    return _table(records, task.columns, str(path), revision, broken)


def _read_hub_split(name: str, split: str, task: _GlueTask, folder: Path | None) -> Table:
    """The same rows from the hub (or its cache, offline), with the labels that the files have.

    The revision is the sha256 of the rows: what the cache serves offline has no commit to ask for.
    """
    looked = f"no folder {folder}" if folder is not None else "RANKWISE_DATA names no data folder"
    advice = f"Put {' and '.join(task.files)} into glue_{name}/ of a folder and name it with RANKWISE_DATA"
    try:
        import datasets
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise UserError(
            f"the rows of {name} are not here ({looked}), and getting them from the hub needs one more package: "
            f"pip install 'rankwise[hub]'. Or: {advice}"
        ) from None
    try:
        loaded = datasets.load_dataset(_HUB, name, split=split)
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot get {name}: {looked}, and {_HUB} on the hub gave: {first}. {advice}") from None
    columns, source = task.hub_columns, f"hub:{_HUB}:{name}:{split}"
    frame, feature = loaded.to_pandas(), loaded.features[columns.label]
    texts = frame[columns.text].tolist()
    pairs = frame[columns.text_pair].tolist() if columns.text_pair else [None] * len(texts)
    sha256, records = hashlib.sha256(), []
    # to_numpy and not tolist: the hub's 4.6 is a float32, and only as such is it written as 4.6
    for row, (text, pair, value) in enumerate(zip(texts, pairs, frame[columns.label].to_numpy(), strict=True)):
        label = None
        if value is not None and value >= 0:  # -1: unlabelled
            written = feature.int2str(int(value)) if isinstance(feature, datasets.ClassLabel) else str(value)
            # the hub has a name for every class; where the files have the number, so have we
            label = task.label(written if written in task.classes else str(value), f"row {row} of {source}")
        records.append((row, text, pair, label))
        sha256.update(json.dumps([text, pair, label]).encode())
    return _table(records, columns, source, sha256.hexdigest(), 0)


def _load_e2e_price(name: str, root: Path | None) -> NamedTask:
    train, evaluation = (_price_table(path) for path in _e2e_files(root))
    return NamedTask(
        name, "E2E price range: which price range does the sentence tell?", "classification", "accuracy",
        train, evaluation,
    )  # fmt: skip


def _load_e2e_nlg(name: str, root: Path | None) -> NamedTask:
    train_file, evaluation_file = _e2e_files(root)
    rows, revision = _read_e2e(train_file)
    train = _table(
        [(row, mr, None, ref) for row, mr, ref in rows], Columns("mr", None, "ref"), str(train_file), revision, 0
    )
    return NamedTask(
        name, "E2E NLG: say in a sentence what the attributes of a restaurant say", "generation", "bleu",
        train, _grouped_table(evaluation_file),
    )  # fmt: skip


_E2E: dict[str, Callable[[str, Path | None], NamedTask]] = {"e2e-price": _load_e2e_price, "e2e-nlg": _load_e2e_nlg}
TASK_NAMES: tuple[str, ...] = (*_GLUE, *_E2E)


def _price_table(path: Path) -> Table:
    """Reference sentences labelled with the price range of their meaning representation; those without are dropped."""
    rows, revision = _read_e2e(path)
    found = ((row, ref, re.search(r"priceRange\[([^\]]+)\]", mr)) for row, mr, ref in rows)
    records = [(row, ref, None, price.group(1) if price else None) for row, ref, price in found]
    return _table(records, Columns("ref", None, "priceRange"), str(path), revision, 0)


def _grouped_table(path: Path) -> Table:
    """One row per distinct meaning representation, where it stands first, with the list of its references."""
    rows, revision = _read_e2e(path)
    kept = [(row, mr, ref) for row, mr, ref in rows if mr.strip() and ref.strip()]
    references: dict[str, list[str]] = {}
    first: dict[str, int] = {}
    for row, mr, ref in kept:
        references.setdefault(mr, []).append(ref)
        first.setdefault(mr, row)
    records = [(first[mr], mr, None, refs) for mr, refs in references.items()]
    return _table(records, Columns("mr", None, "ref"), str(path), revision, len(rows) - len(kept))


def _e2e_files(root: Path | None) -> tuple[Path, Path]:
    files = "e2e_nlg/trainset.csv.gz and e2e_nlg/devset.csv.gz"
    if root is None:
        raise UserError(
            f"no data folder: set RANKWISE_DATA to one that holds {files} (github.com/tuetschek/e2e-dataset)"
        )
    return root / "e2e_nlg" / "trainset.csv.gz", root / "e2e_nlg" / "devset.csv.gz"


def _read_e2e(path: Path) -> tuple[list[tuple[int, str, str]], str]:
    """Number, meaning representation and reference of every row, and the file's sha256."""
    text, revision = _read_text(path)
    try:
        # strict: a file that ends inside a quoted text is an error and not a shorter text
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise UserError(f"cannot read {path} as CSV ({error}); is it cut short?") from None
    if lines and lines[0] != ["mr", "ref"]:
        raise UserError(f"the header of {path} must be mr,ref; it is {','.join(lines[0])}")
    for row, line in enumerate(lines[1:]):
        if len(line) != 2:
            raise UserError(f"row {row} of {path} has {len(line)} columns, expected 2 (mr, ref)")
    return [(row, mr, ref) for row, (mr, ref) in enumerate(lines[1:])], revision


def _read_text(path: Path) -> tuple[str, str]:
    """The text of a plain or gzipped UTF-8 file, and the sha256 of the file as it lies on the disk."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"the data file {path} does not exist") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is cut short or damaged ({error}); get it again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start} cannot be read); get it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return text, hashlib.sha256(raw).hexdigest()


def _table(
    records: Iterable[tuple[int, str | None, str | None, Any]],
    columns: Columns,
    source: str,
    revision: str,
    dropped: int,
) -> Table:
    """The rows (number, text, pair, label) that have every text and a label; the others are counted as dropped."""
    rows = []
    for row, text, pair, label in records:
        texts = (text,) if columns.text_pair is None else (text, pair)
        if label is None or label == "" or not all(part and part.strip() for part in texts):
            dropped += 1
        else:
            rows.append({"row": row, "text": text, "text_pair": pair, "label": label})
    if not rows:
        raise UserError(f"{source} has no labelled row ({dropped} incomplete); is the file cut short?")
    return Table(rows, columns, source, revision, dropped)
