"""Which rows train, which decide when to stop, and which are held out to score."""

from dataclasses import dataclass, replace
from pathlib import Path

from rankwise.errors import UserError
from rankwise.finetuning.data import draw, read_table
from rankwise.finetuning.settings import FinetuneSettings
from rankwise.finetuning.table import Table


@dataclass(frozen=True)
class RowSplit:
    """Positions in one table.

    Attributes:
        train: what is trained on.
        validation: what early stopping looks at, never trained on; empty without it.
        held_out: what the run is scored on, never looked at before.
    """

    train: list[int]
    validation: list[int]
    held_out: list[int]


@dataclass(frozen=True)
class LabelledRows:
    """All rows of a run in one table: of --data first, then those held out by name, then of --validation-data."""

    table: Table
    files: tuple[str, ...]
    of_data: int
    of_eval_data: int
    of_validation_data: int

    def require_unchanged(self, revision: str) -> None:
        """Refuse to go on with other rows than a run began with.

        Raises:
            UserError: naming the first file that has changed.
        """
        if revision == self.table.revision:
            return
        pairs = zip(self.files, revision.split("+"), self.table.revision.split("+"), strict=False)
        changed = next((file for file, was, now in pairs if was != now), self.files[0])
        raise UserError(f"{changed} has changed since the run began; start a new run or restore the file")


def read_rows(settings: FinetuneSettings) -> LabelledRows:
    """The tables that the settings name, as one.

    Raises:
        UserError: see :func:`rankwise.finetuning.data.read_table`.
    """
    table = read_table(settings.data, text=settings.text, text_pair=settings.text_pair, label=settings.label)
    columns = table.columns
    counts, files = [len(table.rows)], [settings.data]
    # a folder of images may bring its own part to evaluate on
    for file in (settings.eval_data or table.evaluation, settings.validation_data):
        if file is None:
            counts.append(0)
            continue
        files.append(file)
        if file == settings.validation_data and _same_file(file, files[:-1]):
            raise UserError(f"--validation-data {file} holds rows that are trained on or held out; name another file")
        more = read_table(file, text=columns.text, text_pair=columns.text_pair, label=columns.label)
        counts.append(len(more.rows))
        table = replace(
            table,
            rows=table.rows + more.rows,
            revision=f"{table.revision}+{more.revision}",
            dropped=table.dropped + more.dropped,
        )
    return LabelledRows(table, tuple(files), *counts)


def _same_file(file: str, others: list[str]) -> bool:
    paths = [Path(other) for other in others]
    return any(path.exists() and Path(file).exists() and path.samefile(file) for path in paths)


def split_rows(settings: FinetuneSettings, rows: LabelledRows) -> RowSplit:
    """The split that the settings ask for, drawn by the seed.

    Raises:
        UserError: fewer rows than asked for, or none left to hold out or to train on.
    """
    count = rows.of_data
    if settings.shots is not None and settings.shots > count:
        raise UserError(f"--shots {settings.shots} asks for more rows than {settings.data} has ({count})")
    if rows.of_eval_data:
        train, _ = draw(count, settings.shots or count, settings.seed)
        held_out = list(range(count, count + rows.of_eval_data))
    else:
        shots = settings.shots if settings.shots is not None else max(1, count - max(1, count // 5))
        train, held_out = draw(count, shots, settings.seed)
        if not held_out:
            raise UserError(
                f"all {count} rows of {settings.data} would be trained on and none held out; "
                "lower --shots or name a file with --eval-data"
            )
    if len(held_out) > settings.eval_limit:
        chosen, _ = draw(len(held_out), settings.eval_limit, settings.seed)
        held_out = [held_out[i] for i in chosen]
    train, validation = _set_apart(settings, rows, train)
    return RowSplit(train, validation, held_out)


def _set_apart(settings: FinetuneSettings, rows: LabelledRows, train: list[int]) -> tuple[list[int], list[int]]:
    """(rows to train on, rows to decide by): the labelled rows pay for both, unless a file brings the latter."""
    if settings.early_stopping is None:
        return train, []
    if settings.validation_data is not None:
        start = rows.of_data + rows.of_eval_data
        return train, list(range(start, start + rows.of_validation_data))
    size = settings.validation_rows if settings.validation_rows is not None else max(1, len(train) // 5)
    if size >= len(train):
        raise UserError(
            f"--early-stopping sets {size} of the {len(train)} labelled rows apart, which leaves none to train on; "
            "lower --validation-rows, or name a file with --validation-data"
        )
    apart, kept = draw(len(train), size, settings.seed)
    return [train[i] for i in kept], [train[i] for i in apart]
