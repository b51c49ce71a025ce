"""Predictions of single entries from a finished run."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rankwise.completion_runs.folder import check_parents, read_config
from rankwise.completion_runs.progress import progress, say
from rankwise.completion_runs.settings import is_picture
from rankwise.errors import UserError

if TYPE_CHECKING:
    from rankwise.completion import DeepMatrixCompletion
    from rankwise.completion.reading import EntryTable, Labels

_LEVEL = 0.9
_PAIRS_AT_A_TIME = 1_000_000


@dataclass(frozen=True)
class Pairs:
    """Entries to predict: a file, how to read it, and where the predictions go."""

    file: str
    level: float | None
    target: Path | None
    row: str | None
    column: str | None
    header: bool | None
    delimiter: str | None

    @classmethod
    def checked(
        cls, predict: str | None, interval: float | None, predictions: str | None,
        row: str | None, column: str | None, header: bool | None, delimiter: str | None,
    ) -> "Pairs | None":  # fmt: skip
        if interval is not None and not 0 < interval < 1:
            raise UserError(f"--interval must be a level between 0 and 1 such as 0.9, got {interval:g}")
        if predict is None:
            if interval is not None or predictions is not None:
                raise UserError("--interval and --predictions go with --predict, the table of entries to predict")
            return None
        target = None if predictions is None else Path(predictions)
        if target is not None:
            _check_target(target)
        return cls(predict, interval, target, row, column, header, delimiter)

    def of_run(self, settings: dict[str, Any]) -> "Pairs":
        """With the run's own columns and header where no others were given; "row" and "column" for a whole matrix."""
        whole = settings.get("row") is None and self.row is None
        header = settings.get("header") if self.header is None else self.header
        return replace(
            self,
            row=self.row or settings.get("row") or "row",
            column=self.column or settings.get("col") or "column",
            header=whole or header is not False,
        )

    def read(self, labels: "Labels", console: Console) -> "EntryTable":
        """The pairs as codes; those of labels that the run does not know are beyond its shape."""
        from rankwise.completion.reading import read_table

        with progress(console, f"reading {Path(self.file).name}") as (report, _):
            return read_table(
                self.file, row=self.row or "", column=self.column or "", value=None, header=self.header is not False,
                delimiter=self.delimiter, labels=labels.texts(), progress=report,
            )  # fmt: skip

    def names(self) -> list[str]:
        """Of the two label columns of the predictions."""
        return [self.row or "row", self.column or "column"] if self.header else ["row", "column"]


def _check_target(target: Path) -> None:
    """Refuse what could not be written after a long fit."""
    if os.path.isdir(target):  # noqa: PTH112  # no exception for a name that is too long
        raise UserError(f"--predictions {target} is a folder; name a file in it")
    check_parents(target)


def predict_from(folder: Path, pairs: Pairs, jobs: int | None, console: Console) -> None:
    from rankwise.completion import DeepMatrixCompletion
    from rankwise.completion.reading import load_labels

    config = read_config(folder)
    if not os.path.isfile(folder / "summary.json"):  # noqa: PTH113
        raise UserError(f"{folder} is not finished; run the command that made it again, then predict from it")
    if is_picture(config["inputs"]["data"]["file"]):
        raise UserError(f"{folder} is a picture's: it is filled as a whole, see {folder / 'filled.png'}")
    pairs = pairs.of_run(config["settings"])
    labels = load_labels(folder)
    with console.status("loading the model"):
        model = DeepMatrixCompletion.load(folder / "model")
    if labels.shape != (len(model.left_), len(model.right_)):
        raise UserError(f"{folder} is damaged: its labels and its model differ in shape; run it again in a new folder")
    model.n_jobs = jobs
    if model.calibration_ is None and pairs.level is not None:
        raise UserError(f"{folder} was fitted without held-out errors (--no-calibrate), so it has no intervals")
    write_predictions(folder, pairs, pairs.read(labels, console), labels, model, console)


def write_predictions(
    folder: Path, pairs: Pairs, asked: "EntryTable", labels: "Labels", model: "DeepMatrixCompletion", console: Console
) -> None:
    """A CSV with a line a pair, whole or not at all: both labels, prediction and, where calibrated, lower and upper.

    A pair with a label that the model does not know is predicted by the intercepts of what it does know, without
    interval.
    """
    import csv

    target = folder / "predictions.csv" if pairs.target is None else pairs.target
    level = None if model.calibration_ is None else (_LEVEL if pairs.level is None else pairs.level)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    unknown = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="") as file, progress(console, "predicting") as (report, _):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*pairs.names(), "prediction", *([] if level is None else ["lower", "upper"])])
            for start in range(0, len(asked.rows), _PAIRS_AT_A_TIME):
                part = slice(start, start + _PAIRS_AT_A_TIME)
                rows, columns = asked.rows[part], asked.columns[part]
                known = (rows < labels.shape[0]) & (columns < labels.shape[1])
                unknown += int(len(known) - known.sum())
                numbers = _predicted(model, rows, columns, known, level)
                names = ([asked.row_labels[code] for code in rows], [asked.column_labels[code] for code in columns])
                writer.writerows(zip(*names, *([_shown(x) for x in n] for n in numbers), strict=True))
                report(min(start + _PAIRS_AT_A_TIME, len(asked.rows)), len(asked.rows))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if asked.empty_labels:
        say(console, f"note: {asked.empty_labels:,} lines of {pairs.file} left out: a label is empty")
    if unknown:
        new = asked.row_labels[labels.shape[0] :] + asked.column_labels[labels.shape[1] :]
        listed = ", ".join(new[:3]) + (f" and {len(new) - 3:,} more" if len(new) > 3 else "")
        say(
            console,
            f"note: {unknown:,} of {len(asked.rows):,} pairs have labels that the run does not know ({listed}): they are "
            "predicted by the means of what it does know, without interval",
        )
    within = "" if level is None else f" with {100 * level:g} % intervals"
    say(console, f"{len(asked.rows):,} predictions{within}: {target}")


def _predicted(model: "DeepMatrixCompletion", rows: Any, columns: Any, known: Any, level: float | None) -> list[Any]:
    """Predictions, and lower and upper bounds if there is a level; the bounds of unknown labels are NaN."""
    import numpy as np

    numbers = [np.full(len(rows), np.nan) for _ in range(1 if level is None else 3)]
    if known.any():
        found = model.predict_entries(rows[known], columns[known], interval=level)
        for whole, some in zip(numbers, (found,) if level is None else found, strict=True):
            whole[known] = some
    if not known.all():
        means = model.solution_.fallback
        guess = np.full(len(rows), means.mean)
        for codes, of_each in ((rows, means.rows), (columns, means.columns)):
            here = codes < len(of_each)
            guess[here] += of_each[codes[here]]
        if model.clip is not None:
            guess = np.clip(guess, *(model.value_range_ if model.clip == "observed" else model.clip))
        numbers[0][~known] = guess[~known]
    return numbers


def _shown(number: float) -> str:
    return "" if number != number else f"{number:.10g}"
