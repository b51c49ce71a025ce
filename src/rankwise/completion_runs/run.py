"""One run: read, keep the entries, fit, calibrate, summarize, draw; stopped anywhere, it goes on from what is kept."""

import math
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rankwise.completion_runs.filled import write_filled
from rankwise.completion_runs.folder import (
    FORMAT_VERSION,
    KIND,
    MetricsFile,
    check_parents,
    identity,
    is_same_file,
    plain_number,
    read_config,
)
from rankwise.completion_runs.predictions import Pairs, predict_from, write_predictions
from rankwise.completion_runs.progress import progress, say
from rankwise.completion_runs.settings import CompletionSettings, is_picture
from rankwise.completion_runs.several import Others
from rankwise.environment import environment
from rankwise.errors import Interrupted, UserError

if TYPE_CHECKING:
    from rankwise.completion import Calibration, DeepMatrixCompletion, Observations
    from rankwise.completion.reading import Labels, Picture

_TABLES = (".csv", ".tsv", ".txt", ".tab", ".psv", ".dat", ".data")
_PACKAGES = ("numpy", "scipy", "scikit-learn", "numba", "torch")
_ENTRIES = "entries.safetensors"
_ERROR_INTERVAL = 0.95  # of the held-out error


class CompletionRun:
    """A run folder: config.json, labels.json, metrics.jsonl, model/, summary.json, report.html; for pictures the PNGs.

    ``entries.safetensors`` is there until the fit is done: a stopped run begins from it and not from the text again.
    """

    def __init__(
        self, folder: Path, data: str, settings: CompletionSettings, jobs: int | None, console: Console,
        others: "Others | None" = None,
    ):  # fmt: skip
        self.folder = folder
        self.data = data
        self.settings = settings
        self.jobs = jobs
        self.console = console
        self.others = others
        self.notes: list[str] = []

    def go(self, pairs: Pairs | None, filled: Path | None = None) -> None:
        """Do what is left to do.

        Args:
            pairs: entries to predict.
            filled: file for the whole matrix, its holes filled.
        """
        state = self._state()
        if state == "finished":
            if filled is not None:
                self._fill_from_kept(filled)
            self.say(f"{self.folder} is finished: nothing to fit (another --out starts another run)")
            (self.folder / _ENTRIES).unlink(missing_ok=True)
            if not (self.folder / "report.html").is_file():
                self._report()
            if pairs is not None:
                predict_from(self.folder, pairs, self.jobs, self.console)
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
        if filled is not None:
            write_filled(filled, model, observations, labels, self.console)
        (self.folder / _ENTRIES).unlink(missing_ok=True)  # not before the matrix is written that needs them
        if pairs is not None and asked is not None:
            write_predictions(self.folder, pairs, asked, labels, model, self.console)

    def _fill_from_kept(self, filled: Path) -> None:
        """The whole matrix of a finished run that was stopped before it was written."""
        from rankwise.completion import DeepMatrixCompletion
        from rankwise.completion.reading import load_entries, load_labels

        if not (self.folder / _ENTRIES).is_file():
            raise UserError(
                f"{self.folder} is finished and keeps no entries, so --filled needs a new run: choose another --out"
            )
        model = DeepMatrixCompletion.load(self.folder / "model")
        write_filled(filled, model, load_entries(self.folder), load_labels(self.folder), self.console)

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
            check_parents(self.folder)
            return "new"
        config = read_config(self.folder)
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
            if not is_same_file(path, config["inputs"].get(what, {})):
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
                "format_version": FORMAT_VERSION,
                "kind": KIND,
                "settings": self._settings_to_keep(),
                "inputs": {what: identity(path) for what, path in self._files().items()},
                "notes": self.notes,
                "environment": environment(_PACKAGES),
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
        self.notes = list(read_config(self.folder).get("notes", []))
        picture = self._read_picture() if is_picture(self.data) else None
        return picture, load_entries(self.folder), load_labels(self.folder)

    # -- reading

    def _read(self) -> "tuple[Picture | None, Observations, Labels]":
        from rankwise.completion.reading import Labels, read_matrix, read_table

        asked = self.settings
        picture = None
        if is_picture(self.data):
            picture = self._read_picture()
            observations = picture.observations()
            labels = Labels(None, None, "row", "column", observations.shape)
        elif asked.row is not None and asked.col is not None:
            with progress(self.console, f"reading {Path(self.data).name}") as (report, _):
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
        if self.others is not None and height < width:
            self.notes.append(
                "several processes share the rows, which are fewer than the columns: with rows and columns swapped each "
                "would need less memory"
            )
            self.say(f"note: {self.notes[-1]}")
        return picture, observations, labels

    def _read_whole(self, read_matrix: Any, labels: Any) -> "tuple[Observations, Labels]":
        asked = self.settings
        text = Path(self.data.lower().removesuffix(".gz")).suffix in _TABLES
        with progress(self.console, f"reading {Path(self.data).name}") as (report, _):
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
        mine = observations if self.others is None else self.others.fit(self.folder)
        started = time.perf_counter()
        with (
            progress(self.console, "fitting") as (_, describe),
            MetricsFile(self.folder / "metrics.jsonl") as metrics,
        ):

            def noted(entry: dict[str, Any]) -> None:
                plain = {name: plain_number(value) for name, value in entry.items()}
                metrics.append(plain)
                measured = ", ".join(
                    f"{name} {plain[name]:.3g}" for name in ("residual", "noise", "rank") if plain.get(name) is not None
                )
                describe(f"fitting: {plain['stage']} {plain.get('iteration', '')}: {measured}")

            model.fit(mine, callback=noted)
        seconds = time.perf_counter() - started
        calibrated = self._calibrate(model, observations, picture)
        shutil.rmtree(self.folder / "model", ignore_errors=True)  # of a run stopped just here
        model.save(self.folder / "model")
        self._summarize(model, observations, picture, seconds, calibrated)
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
        if self.others is not None:
            self.others.calibrate()
        with progress(self.console, "fitting without a tenth of the entries") as (_, describe):

            def noted(entry: dict[str, Any]) -> None:
                describe(f"fitting without a tenth of the entries: {entry['stage']} {entry.get('iteration', '')}")

            return model.calibrate(callback=noted)

    def _summarize(
        self, model: "DeepMatrixCompletion", observations: "Observations", picture: "Picture | None", seconds: float,
        calibrated: "Calibration | None",
    ) -> None:  # fmt: skip
        from rankwise.files import write_json

        summary: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
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
            "noise": plain_number(model.noise_),
            "unobserved_rows": len(model.unobserved_rows_),
            "unobserved_columns": len(model.unobserved_columns_),
            "merged_duplicates": model.merged_duplicates_,
            "picture": None,
            "notes": self.notes,
        }
        if calibrated is not None:
            summary |= {
                "held_out_rmse": plain_number(calibrated.rmse),
                "held_out_interval": [plain_number(bound) for bound in calibrated.rmse_interval],
                "held_out_entries": calibrated.count,
                "baseline_rmse": plain_number(calibrated.baseline_rmse),
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
        say(self.console, text)


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
