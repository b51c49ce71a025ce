"""``rankwise complete``."""

import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from rankwise import __version__
from rankwise.errors import UserError

if TYPE_CHECKING:
    from rankwise.completion import Calibration, DeepMatrixCompletion, Observations
    from rankwise.completion.reading import EntryTable, Labels, Picture

_EXAMPLE = """
Fill a matrix with holes: ratings, sensors, a picture. The rank is found, not chosen.

[bold]Example[/bold]

  rankwise complete ratings.csv --row user --col item --value rating --out runs/ml --predict pairs.csv

  rankwise complete picture.png --observed 0.3 --out runs/picture

Reads CSV, TSV, Parquet (one entry a line: --row, --col, --value), whole matrices (CSV, .npy, .npz, .mtx) and pictures.
The run folder then holds model/, summary.json, predictions.csv and report.html. Ctrl-C leaves a run that the same command
goes on with. Later predictions from a finished run:

  rankwise complete --from runs/ml --predict more.csv --predictions more-filled.csv
"""

_DATA, _MODEL, _PREDICTION, _PICTURE = "Data", "Model", "Predictions", "Pictures"
_PICTURES = (".png", ".jpg", ".jpeg")
_TABLES = (".csv", ".tsv", ".txt", ".tab", ".psv", ".dat", ".data")
_PACKAGES = ("numpy", "scipy", "scikit-learn", "numba", "torch")
_ENTRIES = "entries.safetensors"
_KIND = "completion"
_FORMAT_VERSION = 1
_ERROR_INTERVAL = 0.95  # of the held-out error
_LEVEL = 0.9
_PAIRS_AT_A_TIME = 1_000_000


class Interrupted(RuntimeError):
    """The run was stopped by Ctrl-C; the message says how to go on."""


def register(app: typer.Typer) -> None:
    app.command("complete", help=_EXAMPLE, no_args_is_help=True)(complete)


def complete(
    data: Annotated[str | None, typer.Argument(help="File with the observed entries, or a picture.")] = None,
    out: Annotated[str | None, typer.Option(help="Run folder to create, or one to go on with.")] = None,
    row: Annotated[
        str | None, typer.Option(help="Column of a table that names an entry's row.", rich_help_panel=_DATA)
    ] = None,
    col: Annotated[
        str | None, typer.Option(help="Column of a table that names an entry's column.", rich_help_panel=_DATA)
    ] = None,
    value: Annotated[str | None, typer.Option(help="Column of a table with the values.", rich_help_panel=_DATA)] = None,
    header: Annotated[
        bool | None,
        typer.Option(
            "--header/--no-header",
            help="Whether a text's first line has names; without, columns go by number: --row 1.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    row_labels: Annotated[
        bool | None,
        typer.Option(
            "--row-labels/--no-row-labels",
            help="Whether each line of a whole matrix as text begins with a name.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option(help="Of a text, such as ; or tab; found otherwise.", rich_help_panel=_DATA)
    ] = None,
    key: Annotated[str | None, typer.Option(help="Which array of an .npz file.", rich_help_panel=_DATA)] = None,
    observed: Annotated[
        float | None,
        typer.Option(help="Share of a picture's pixels to keep, drawn by --seed.", rich_help_panel=_PICTURE),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(help="PNG of the same size: black where a pixel is to be filled.", rich_help_panel=_PICTURE),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", "-r", help="Upper bound on the rank; from the data otherwise.", rich_help_panel=_MODEL),
    ] = None,
    depth: Annotated[int, typer.Option(help="Layers of the factorization.", rich_help_panel=_MODEL)] = 3,
    solver: Annotated[
        str, typer.Option(help="auto, weight-decay, evidence or gradient-descent.", rich_help_panel=_MODEL)
    ] = "auto",
    intercept: Annotated[
        bool | None,
        typer.Option(
            "--intercept/--no-intercept",
            help="Means of rows and columns; where the data are noisy otherwise.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    loss: Annotated[
        str, typer.Option(help="squared, or huber where some entries are far off.", rich_help_panel=_MODEL)
    ] = "squared",
    clip: Annotated[
        str | None, typer.Option(help="Bounds of the values: low,high or observed.", rich_help_panel=_MODEL)
    ] = None,
    max_iter: Annotated[int | None, typer.Option(help="Iterations at most.", rich_help_panel=_MODEL)] = None,
    dtype: Annotated[
        str, typer.Option(help="float64, or float32: half the memory.", rich_help_panel=_MODEL)
    ] = "float64",
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="A second fit without a tenth of the entries: the error to expect, and intervals.",
            rich_help_panel=_MODEL,
        ),
    ] = True,
    predict: Annotated[
        str | None,
        typer.Option(
            help="Table of entries to predict: with the --row and --col columns, or row and column for a whole matrix.",
            rich_help_panel=_PREDICTION,
        ),
    ] = None,
    interval: Annotated[
        float | None, typer.Option(help="Level of the predictions' intervals (0.9).", rich_help_panel=_PREDICTION)
    ] = None,
    predictions: Annotated[
        str | None,
        typer.Option(help="CSV to write (predictions.csv in the run folder).", rich_help_panel=_PREDICTION),
    ] = None,
    from_run: Annotated[
        str | None,
        typer.Option("--from", help="Finished run to predict from, without a fit.", rich_help_panel=_PREDICTION),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws starts, held-out entries and --observed.")] = 0,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", help="Threads (all).")] = None,
) -> None:
    console = Console(stderr=True)
    with console.status("loading"):
        _completion()
    pairs = _Pairs.checked(predict, interval, predictions, row, col, header, delimiter)
    _check_threads(jobs)
    if from_run is not None:
        if data is not None or out is not None:
            raise UserError("--from takes everything from a finished run; leave the data file and --out out")
        if pairs is None:
            raise UserError("--from needs --predict with a table of the entries to predict")
        _predict_from(Path(from_run), pairs, jobs, console)
        return
    if data is None or out is None:
        missing = " and ".join(name for name, given in (("the data file", data), ("--out", out)) if given is None)
        raise UserError(
            f"{missing} missing; for example:\n  rankwise complete ratings.csv --row user --col item --value rating --out "
            "runs/ml"
        )
    settings = _Settings(
        row=row, col=col, value=value, header=header, row_labels=row_labels, delimiter=delimiter, key=key,
        observed=observed, mask=mask, rank=rank, depth=depth, solver=solver, intercept=intercept, loss=loss,
        clip=_bounds(clip), max_iter=max_iter, dtype=dtype, calibrate=calibrate, seed=seed,
    )  # fmt: skip
    settings.check(data, pairs)
    _Run(Path(out), data, settings, jobs, console).go(pairs)


# --- what was asked for -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """Everything that a run's numbers depend on, besides its input files."""

    row: str | None
    col: str | None
    value: str | None
    header: bool | None
    row_labels: bool | None
    delimiter: str | None
    key: str | None
    observed: float | None
    mask: str | None
    rank: int | None
    depth: int
    solver: str
    intercept: bool | None
    loss: str
    clip: list[float] | str | None
    max_iter: int | None
    dtype: str
    calibrate: bool
    seed: int

    def check(self, data: str, pairs: "_Pairs | None") -> None:
        """Whatever can be wrong before a file is opened."""
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed must be a whole number from 0 to {2**32 - 1:,}, got {self.seed}")
        named = {"--row": self.row, "--col": self.col, "--value": self.value}
        missing = [option for option, given in named.items() if given is None]
        if 0 < len(missing) < 3:
            raise UserError(f"a table of entries needs --row, --col and --value; {' and '.join(missing)} missing")
        if _is_picture(data):
            if not missing:
                raise UserError(f"{data} is a picture; leave --row, --col and --value out")
            if self.observed is not None and self.mask is not None:
                raise UserError("give --observed or --mask, not both")
            if pairs is not None:
                raise UserError("a picture is filled as a whole, into filled.png; leave --predict out")
        elif self.observed is not None or self.mask is not None:
            raise UserError(f"--observed and --mask are for pictures (.png, .jpg); {data} is none")
        if not self.calibrate and pairs is not None and pairs.level is not None:
            raise UserError("--interval needs the held-out errors that --no-calibrate leaves out")
        if Path(data).suffix.lower() in (".parquet", ".pq") and missing:
            raise UserError(f"{data} is a table; name its columns with --row, --col and --value")
        if self.dtype not in ("float64", "float32"):
            raise UserError(f"--dtype must be float64 or float32, got {self.dtype}")
        self.model(None)

    def model(self, jobs: int | None) -> "DeepMatrixCompletion":
        """The estimator asked for.

        Raises:
            UserError: an option is out of its range.
        """
        completion = _completion()
        from rankwise.completion.solver import SolverOptions

        SolverOptions(
            rank=self.rank, depth=self.depth, solver=self.solver, loss=self.loss, max_iter=self.max_iter, dtype=self.dtype
        )  # fmt: skip
        return completion.DeepMatrixCompletion(
            rank=self.rank, depth=self.depth, solver=self.solver, fit_intercept=self.intercept, loss=self.loss,
            clip=tuple(self.clip) if isinstance(self.clip, list) else self.clip,
            max_iter=self.max_iter, dtype=self.dtype, n_jobs=jobs, random_state=self.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class _Pairs:
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
    ) -> "_Pairs | None":  # fmt: skip
        if interval is not None and not 0 < interval < 1:
            raise UserError(f"--interval must be a level between 0 and 1 such as 0.9, got {interval:g}")
        if predict is None:
            if interval is not None or predictions is not None:
                raise UserError("--interval and --predictions go with --predict, the table of entries to predict")
            return None
        target = None if predictions is None else Path(predictions)
        if target is not None:
            _check_target(target, predict)
        return cls(predict, interval, target, row, column, header, delimiter)

    def of_run(self, settings: dict[str, Any]) -> "_Pairs":
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

        with _progress(console, f"reading {Path(self.file).name}") as (report, _):
            return read_table(
                self.file, row=self.row or "", column=self.column or "", value=None, header=self.header is not False,
                delimiter=self.delimiter, labels=labels.texts(), progress=report,
            )  # fmt: skip

    def names(self) -> list[str]:
        """Of the two label columns of the predictions."""
        return [self.row or "row", self.column or "column"] if self.header else ["row", "column"]


def _bounds(text: str | None) -> list[float] | str | None:
    if text is None or text == "observed":
        return text
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = math.nan, math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"--clip must be low,high such as 1,5, or observed; got {text!r}")
    return [low, high]


def _check_threads(jobs: int | None) -> None:
    if jobs is not None and not 1 <= jobs <= 1024:
        raise UserError(f"--jobs must be a number of threads from 1, got {jobs}")


def _check_target(target: Path, pairs: str) -> None:
    """The CSV replaces a file of its name: refuse what could not be written after a long fit, or is the input."""
    if os.path.isdir(target):  # noqa: PTH112  # no exception for a name that is too long
        raise UserError(f"--predictions {target} is a folder; name a file in it")
    if os.path.exists(target) and os.path.exists(pairs) and os.path.samefile(target, pairs):  # noqa: PTH110, PTH121
        raise UserError(f"--predictions {target} is the table with the pairs itself; choose another file")
    _check_parents(target)


def _check_parents(path: Path) -> None:
    """Refuse a path below something that is no folder, or where nothing may be written."""
    for parent in path.absolute().parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise UserError(f"cannot make {path}: {parent} is no folder")
            if not os.access(parent, os.W_OK | os.X_OK):
                raise UserError(f"cannot make {path}: {parent} may not be written to")
            break
    if len(os.fsencode(path.name)) > 200:
        raise UserError(f"cannot make {path}: the name is too long")


def _is_picture(data: str) -> bool:
    return Path(data).suffix.lower() in _PICTURES


def _completion() -> Any:
    """The room behind the command, loaded only once its options have parsed."""
    try:
        from rankwise import completion
    except ImportError as error:
        raise UserError(f"completing needs more packages ({error}): pip install 'rankwise[completion]'") from None
    return completion


# --- a run ------------------------------------------------------------------------------------------------------------


class _Run:
    """A run folder: config.json, labels.json, metrics.jsonl, model/, summary.json, report.html; for pictures the PNGs.

    ``entries.safetensors`` is there until the fit is done: a stopped run begins from it and not from the text again.
    """

    def __init__(self, folder: Path, data: str, settings: _Settings, jobs: int | None, console: Console):
        self.folder = folder
        self.data = data
        self.settings = settings
        self.jobs = jobs
        self.console = console
        self.notes: list[str] = []

    def go(self, pairs: _Pairs | None) -> None:
        """Do what is left to do."""
        state = self._state()
        if state == "finished":
            self.say(f"{self.folder} is finished: nothing to fit (another --out starts another run)")
            (self.folder / _ENTRIES).unlink(missing_ok=True)
            if not (self.folder / "report.html").is_file():
                self._report()
            if pairs is not None:
                _predict_from(self.folder, pairs, self.jobs, self.console)
            return
        picture, observations, labels = self._read() if state == "new" else self._kept()
        asked = None
        if pairs is not None:
            pairs = pairs.of_run(vars(self.settings))
            asked = pairs.read(labels, self.console)
        if state == "new":
            self._keep(picture, observations, labels)
        try:
            model = self._fitted(observations, picture)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; {self.folder} keeps the entries, and the same command starts the fit again from them"
            ) from None
        except MemoryError:
            raise UserError("out of memory; --dtype float32, a smaller --rank or --no-calibrate need less") from None
        self._report()
        if pairs is not None and asked is not None:
            _write_predictions(self.folder, pairs, asked, labels, model, self.console)

    def _state(self) -> str:
        """ "new", "interrupted" or "finished".

        Raises:
            UserError: the folder is another's, or of other settings or data.
        """
        try:
            taken = os.path.lexists(self.folder) and (not self.folder.is_dir() or any(self.folder.iterdir()))
        except OSError as error:
            raise UserError(f"cannot use {self.folder}: {error.strerror}") from None
        if not taken:
            _check_parents(self.folder)
            return "new"
        config = _read_config(self.folder)
        asked, kept = self._settings_to_keep(), config["settings"]
        changed = [name for name in sorted({*asked, *kept}) if asked.get(name) != kept.get(name)]
        if changed:
            listed = ", ".join(f"{name} {kept.get(name)!r}, now {asked.get(name)!r}" for name in changed)
            raise UserError(f"{self.folder} holds a run of other settings ({listed}); choose another --out")
        if set(config["inputs"]) != set(self._files()):
            raise UserError(
                f"{self.folder} holds a run {'with' if 'mask' in config['inputs'] else 'without'} --mask; "
                "choose another --out"
            )
        for what, path in self._files().items():
            if not _is_same_file(path, config["inputs"].get(what, {})):
                raise UserError(f"{self.folder} holds a run on other data than {path} is now; choose another --out")
        return "finished" if (self.folder / "summary.json").is_file() else "interrupted"

    def _files(self) -> dict[str, str]:
        return {"data": self.data} | ({"mask": self.settings.mask} if self.settings.mask is not None else {})

    def _settings_to_keep(self) -> dict[str, Any]:
        kept = dict(vars(self.settings))
        del kept["mask"]  # known by its content
        return kept

    def _keep(self, picture: "Picture | None", observations: "Observations", labels: "Labels") -> None:
        """Make the folder, after everything was read: a mistake in a file leaves nothing behind."""
        from rankwise.completion.reading import save_entries, save_labels
        from rankwise.files import replacing_folder, write_json

        with self.console.status("keeping the entries"):
            config = {
                "format_version": _FORMAT_VERSION,
                "kind": _KIND,
                "settings": self._settings_to_keep(),
                "inputs": {what: _identity(path) for what, path in self._files().items()},
                "notes": self.notes,
                "environment": _environment(),
            }
            try:
                with replacing_folder(self.folder) as temporary:
                    save_labels(labels, temporary)
                    save_entries(observations, temporary)
                    if picture is not None:
                        picture.save(temporary / "original.png")
                        picture.save(temporary / "observed.png", holes=True)
                    write_json(temporary / "config.json", config)
            except OSError as error:
                raise UserError(f"cannot make {self.folder}: {error.strerror or error}") from None
            except ValueError as error:
                raise UserError(f"cannot make {self.folder}: {error}") from None

    def _kept(self) -> "tuple[Picture | None, Observations, Labels]":
        from rankwise.completion.reading import load_entries, load_labels

        self.say(f"going on with {self.folder}: the fit starts again from the entries kept there")
        self.notes = list(_read_config(self.folder).get("notes", []))
        picture = self._read_picture() if _is_picture(self.data) else None
        return picture, load_entries(self.folder), load_labels(self.folder)

    # -- reading

    def _read(self) -> "tuple[Picture | None, Observations, Labels]":
        from rankwise.completion.reading import Labels, read_matrix, read_table

        asked = self.settings
        picture = None
        if _is_picture(self.data):
            picture = self._read_picture()
            observations = picture.observations()
            labels = Labels(None, None, "row", "column", observations.shape)
        elif asked.row is not None and asked.col is not None:
            with _progress(self.console, f"reading {Path(self.data).name}") as (report, _):
                table = read_table(
                    self.data, row=asked.row, column=asked.col, value=asked.value, header=asked.header is not False,
                    delimiter=asked.delimiter, dtype=asked.dtype, progress=report,
                )  # fmt: skip
            self._note_lines(table)
            labels = Labels(table.row_labels, table.column_labels, asked.row, asked.col, table.shape)
            observations = table.observations()
        else:
            observations, labels = self._read_whole(read_matrix, Labels)
        height, width = observations.shape
        self.say(
            f"{Path(self.data).name}: {height:,} × {width:,}, {observations.count:,} entries observed "
            f"({100 * observations.density:.3g} %)"
        )
        return picture, observations, labels

    def _read_whole(self, read_matrix: Any, labels: Any) -> "tuple[Observations, Labels]":
        asked = self.settings
        text = Path(self.data.lower().removesuffix(".gz")).suffix in _TABLES
        with _progress(self.console, f"reading {Path(self.data).name}") as (report, _):
            try:
                matrix = read_matrix(
                    self.data, asked.key, header=asked.header, labels=asked.row_labels, delimiter=asked.delimiter,
                    dtype=asked.dtype, progress=report,
                )  # fmt: skip
            except UserError as error:
                advice = "\nif every line is one entry, name its columns with --row, --col and --value"
                raise UserError(
                    f"{error}{advice if text and 'expected a finite number' in str(error) else ''}"
                ) from None
        found = matrix.observations
        if text and found.shape[1] <= 5 and found.shape[0] > 20 * found.shape[1]:
            self.notes.append(
                f"read as a whole matrix of {found.shape[1]} columns; if every line is one entry, name the columns with "
                "--row, --col and --value, and choose another --out"
            )
            self.say(f"note: {self.notes[-1]}")
        return found, labels(matrix.row_labels, matrix.column_labels, "row", "column", found.shape)

    def _read_picture(self) -> "Picture":
        from rankwise.completion.reading import read_image

        asked = self.settings
        picture = read_image(
            self.data, asked.observed if asked.mask is None else asked.mask, seed=asked.seed, dtype=asked.dtype
        )
        if picture.observed.all():
            raise UserError(f"every pixel of {self.data} is known: nothing to fill; give --observed 0.3, or a --mask")
        return picture

    def _note_lines(self, table: Any) -> None:
        for count, what in ((table.empty_values, "value"), (table.empty_labels, "row or column label")):
            if count:
                self.notes.append(f"{count:,} lines left out: their {what} is empty")
                self.say(f"note: {self.notes[-1]}")

    # -- fitting

    def _fitted(self, observations: "Observations", picture: "Picture | None") -> "DeepMatrixCompletion":
        model = self.settings.model(self.jobs)
        started = time.perf_counter()
        with (
            _progress(self.console, "fitting") as (_, describe),
            _MetricsFile(self.folder / "metrics.jsonl") as metrics,
        ):

            def noted(entry: dict[str, Any]) -> None:
                plain = {name: _plain(value) for name, value in entry.items()}
                metrics.append(plain)
                measured = ", ".join(
                    f"{name} {plain[name]:.3g}" for name in ("residual", "noise", "rank") if plain.get(name) is not None
                )
                describe(f"fitting: {plain['stage']} {plain.get('iteration', '')}: {measured}")

            model.fit(observations, callback=noted)
        seconds = time.perf_counter() - started
        calibrated = self._calibrate(model, observations, picture)
        shutil.rmtree(self.folder / "model", ignore_errors=True)  # of a run stopped just here
        model.save(self.folder / "model")
        self._summarize(model, observations, picture, seconds, calibrated)
        (self.folder / _ENTRIES).unlink(missing_ok=True)
        return model

    def _calibrate(
        self, model: "DeepMatrixCompletion", observations: "Observations", picture: "Picture | None"
    ) -> "Calibration | None":
        if not self.settings.calibrate:
            return None
        if observations.count < 2:
            self.notes.append("no held-out error: only one entry is observed")
            return None
        if self.settings.observed is not None:
            return None  # the pixels hidden tell the error better, at no cost
        if picture is not None and picture.channels > 1:
            self.notes.append("entries were held out one colour at a time; pixels without any colour err more")
        with _progress(self.console, "fitting without a tenth of the entries"):
            return model.calibrate()

    def _summarize(
        self, model: "DeepMatrixCompletion", observations: "Observations", picture: "Picture | None", seconds: float,
        calibrated: "Calibration | None",
    ) -> None:  # fmt: skip
        from rankwise.files import write_json

        summary: dict[str, Any] = {
            "format_version": _FORMAT_VERSION,
            "rows": observations.shape[0],
            "columns": observations.shape[1],
            "observed": observations.count,
            "density": observations.density,
            "rank": model.rank_,
            "singular_values": [float(value) for value in model.singular_values_],
            "held_out_rmse": None,
            "held_out_interval": None,
            "held_out_entries": None,
            "baseline_rmse": None,
            "interval_level": _ERROR_INTERVAL,
            "seconds": seconds,
            "route": model.route_,
            "iterations": model.n_iter_,
            "converged": bool(model.converged_),
            "noise": _plain(model.noise_),
            "unobserved_rows": len(model.unobserved_rows_),
            "unobserved_columns": len(model.unobserved_columns_),
            "merged_duplicates": model.merged_duplicates_,
            "picture": None,
            "notes": self.notes,
        }
        if calibrated is not None:
            summary |= {
                "held_out_rmse": _plain(calibrated.rmse),
                "held_out_interval": [_plain(bound) for bound in calibrated.rmse_interval],
                "held_out_entries": calibrated.count,
                "baseline_rmse": _plain(calibrated.baseline_rmse),
            }
        if picture is not None:
            summary["picture"] = self._fill(model, picture)
        write_json(self.folder / "summary.json", summary)
        self.say(_one_line(summary))

    def _fill(self, model: "DeepMatrixCompletion", picture: "Picture") -> dict[str, Any]:
        """Write filled.png, with the observed pixels as they were; how far the others are from the original."""
        import numpy as np

        hidden = ~picture.mask
        filled = picture.matrix.copy()
        filled[hidden] = np.clip(model.reconstruct(), 0, 1)[hidden]
        picture.save(self.folder / "filled.png", filled)
        psnr = None
        if self.settings.observed is not None:  # otherwise what lies below the holes is nothing to compare with
            error = float(np.mean((filled[hidden] - picture.matrix[hidden]).astype(np.float64) ** 2))
            psnr = -10 * math.log10(max(error, 1e-12))
        return {"hidden_pixels": int((~picture.observed).sum()), "psnr": psnr}

    def _report(self) -> None:
        try:
            from rankwise.diagnostics.completion_report import write_completion_report
        except ImportError as error:  # the run itself is whole: a missing matplotlib must not fail it
            self.say(f"no report: reports need more packages ({error}): pip install 'rankwise[report]'")
            return
        with self.console.status("drawing the report"):
            page = write_completion_report(self.folder)
        self.say(f"report: {page}")

    def say(self, text: str) -> None:
        _say(self.console, text)


def _one_line(summary: dict[str, Any]) -> str:
    text = (
        f"rank {summary['rank']} ({summary['route']}, {summary['iterations']} iterations, {summary['seconds']:.1f} s)"
    )
    if summary["held_out_rmse"] is not None:
        low, high = summary["held_out_interval"]
        text += (
            f"; held-out RMSE {summary['held_out_rmse']:.4g} ({100 * _ERROR_INTERVAL:.0f} % interval {low:.4g} to "
            f"{high:.4g}), row and column means alone {summary['baseline_rmse']:.4g}"
        )
    if summary["picture"] and summary["picture"]["psnr"] is not None:
        text += f"; {summary['picture']['psnr']:.2f} dB on hidden pixels"
    if not summary["converged"]:
        text += "; stopped before it had converged"
    return text


class _MetricsFile:
    """One JSON object a line, flushed: a killed run keeps what it measured."""

    def __init__(self, path: Path):
        self._file = path.open("w", encoding="utf-8")
        self.append({"format_version": _FORMAT_VERSION})

    def append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> "_MetricsFile":
        return self

    def __exit__(self, *failed: object) -> None:
        self._file.close()


def _plain(value: Any) -> Any:
    """A NumPy number as Python's; None where it is not finite, which JSON cannot say."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not os.path.isfile(file):  # noqa: PTH113  # no exception for a name that is too long
        raise UserError(f"{folder} is in use and holds no run of rankwise complete; choose another folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.get("kind") != _KIND:
            raise UserError(f"{folder} holds something else than a run of rankwise complete; choose another folder")
        if not isinstance(config["settings"], dict) or not isinstance(config["inputs"]["data"], dict):
            raise TypeError("settings or inputs are no objects")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}); start the run again in a new folder") from None
    return config


def _identity(path: str) -> dict[str, Any]:
    """Name without folders, size and content of a file."""
    stat = os.stat(path)  # noqa: PTH116
    return {
        "file": Path(path).name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns, "sha256": _sha256(path)
    }  # fmt: skip


def _is_same_file(path: str, known: dict[str, Any]) -> bool:
    """By size and time, or by content where only the time differs. A file that has gone since is no other file."""
    try:
        stat = os.stat(path)  # noqa: PTH116
    except OSError:
        return bool(known) and Path(path).name == known.get("file")
    if stat.st_size != known.get("bytes"):
        return False
    return stat.st_mtime_ns == known.get("modified_ns") or _sha256(path) == known.get("sha256")


def _sha256(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _environment() -> dict[str, Any]:
    """Versions; nothing from the environment's variables."""
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "rankwise": __version__,
        "python": platform.python_version(),
        "platform": platform.system(),
        "packages": packages,
    }


# --- predictions ------------------------------------------------------------------------------------------------------


def _predict_from(folder: Path, pairs: _Pairs, jobs: int | None, console: Console) -> None:
    completion = _completion()
    from rankwise.completion.reading import load_labels

    config = _read_config(folder)
    if not os.path.isfile(folder / "summary.json"):  # noqa: PTH113
        raise UserError(f"{folder} is not finished; run the command that made it again, then predict from it")
    if _is_picture(config["inputs"]["data"]["file"]):
        raise UserError(f"{folder} is a picture's: it is filled as a whole, see {folder / 'filled.png'}")
    pairs = pairs.of_run(config["settings"])
    labels = load_labels(folder)
    with console.status("loading the model"):
        model = completion.DeepMatrixCompletion.load(folder / "model")
    if labels.shape != (len(model.left_), len(model.right_)):
        raise UserError(f"{folder} is damaged: its labels and its model differ in shape; run it again in a new folder")
    model.n_jobs = jobs
    if model.calibration_ is None and pairs.level is not None:
        raise UserError(f"{folder} was fitted without held-out errors (--no-calibrate), so it has no intervals")
    _write_predictions(folder, pairs, pairs.read(labels, console), labels, model, console)


def _write_predictions(
    folder: Path, pairs: _Pairs, asked: "EntryTable", labels: "Labels", model: "DeepMatrixCompletion", console: Console
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
        with temporary.open("w", encoding="utf-8", newline="") as file, _progress(console, "predicting") as (report, _):
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
        _say(console, f"note: {asked.empty_labels:,} lines of {pairs.file} left out: a label is empty")
    if unknown:
        new = asked.row_labels[labels.shape[0] :] + asked.column_labels[labels.shape[1] :]
        listed = ", ".join(new[:3]) + (f" and {len(new) - 3:,} more" if len(new) > 3 else "")
        _say(
            console,
            f"note: {unknown:,} of {len(asked.rows):,} pairs have labels that the run does not know ({listed}): they are "
            "predicted by the means of what it does know, without interval",
        )
    within = "" if level is None else f" with {100 * level:g} % intervals"
    _say(console, f"{len(asked.rows):,} predictions{within}: {target}")


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
    return "" if number != number else f"{number:.7g}"


# --- progress ---------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(console: Console, what: str) -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """A bar on a terminal, nothing elsewhere: a function for (done, of) and one for another description."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task = bar.add_task(what, total=None)
    with bar:
        yield (
            lambda done, total: bar.update(task, completed=done, total=total),
            lambda text: bar.update(task, description=text),
        )


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
