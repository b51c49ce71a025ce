"""A run on disk: config.json, metrics.jsonl, checkpoints/, adapter/, result.json."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankwise.errors import Interrupted, UserError
from rankwise.files import storage_problem, write_json, write_text
from rankwise.finetuning.checkpoints import whole_checkpoints

FORMAT_VERSION = 1
PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy")  # whose versions a run records


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.result_file = path / "result.json"
        self.report_file = path / "report.html"
        self.predictions_file = path / "predictions.csv"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.lora = path / "lora"

    def create(self) -> None:
        """Make the folder; one that holds anything already is refused."""
        self.require_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._clear_temporaries()
        except OSError as error:
            raise UserError(f"cannot make the output folder {self.path}: {error.strerror}") from None

    def require_free(self) -> None:
        """Refuse a folder that holds anything already, or a path that cannot be one."""
        try:
            # a process killed while it wrote its first file has left nothing but that file's beginning
            taken = self.path.exists() and (
                not self.path.is_dir() or any(not _is_temporary(file) for file in self.path.iterdir())
            )
        except OSError as error:
            raise UserError(f"cannot use the output folder {self.path}: {error.strerror}") from None
        if taken:
            hint = "continue it with --resume, or " if self.config_file.is_file() else ""
            raise UserError(f"the output folder {self.path} is in use; {hint}choose another with --out")
        self._require_writable()

    def _require_writable(self) -> None:
        """Find out now, not after the model was loaded and scored."""
        place = self.path
        while not place.exists():
            place = place.parent
        try:
            with tempfile.TemporaryFile(dir=place):  # without a name: another process looks whether the folder is empty
                pass
        except OSError as error:
            raise UserError(f"cannot make the output folder {self.path}: {error.strerror}") from None

    @property
    def how_to_go_on(self) -> str:
        return f"go on with\n  rankwise finetune --resume --out {self.path}"

    @contextmanager
    def storing(self, what: str) -> Iterator[None]:
        """A failed write ends a run that can be gone on with.

        Raises:
            Interrupted: no space left, or another reason that the system gives.
        """
        try:
            yield
        except Exception as error:
            problem = storage_problem(error)
            if problem is None:
                raise
            raise Interrupted(
                f"cannot write {what} to {self.path}: {problem}. What was written before is whole; free some space or "
                f"mend the folder, then {self.how_to_go_on}"
            ) from error

    def clear_unfinished_results(self) -> None:
        """Remove what a run that was killed while it finished left behind."""
        self._clear_temporaries()
        for leftover in (self.adapter, self.lora, *self.path.glob(".adapter.*"), *self.path.glob(".lora.*")):
            shutil.rmtree(leftover, ignore_errors=True)

    def clear_after_results(self) -> bool:
        """Remove what is of no use once the results are there; whether anything was, or the report is still missing."""
        left = [self.checkpoints] if self.checkpoints.exists() else []
        left += [file for file in self.path.iterdir() if _is_temporary(file)]
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        self._clear_temporaries()
        return bool(left) or not self.report_file.is_file()

    def _clear_temporaries(self) -> None:
        for file in self.path.iterdir():
            if _is_temporary(file):
                file.unlink(missing_ok=True)

    def read_config(self) -> dict[str, Any]:
        if not os.path.isfile(self.config_file):  # noqa: PTH113  # no exception for a name that is too long
            raise UserError(f"{self.path} is no run to resume: it has no config.json")
        try:
            config = json.loads(self.config_file.read_text(encoding="utf-8"))
            for key in ("settings", "task", "data", "precision"):
                if key not in config:
                    raise ValueError(f"it has no {key!r}")
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.config_file} is damaged ({error}); start the run again in a new folder") from None
        return config

    def append_metrics(self, **entry: Any) -> None:
        """One JSON object a line, flushed: a killed run keeps what it measured."""
        self.start_metrics()
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")

    def start_metrics(self) -> None:
        """The file with its header alone, unless it is there: a run that solves instead of training measures no steps."""
        if not self.metrics_file.is_file():
            self.metrics_file.write_text(json.dumps({"format_version": FORMAT_VERSION}) + "\n", encoding="utf-8")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All measured entries; the header and a last line cut short by a kill are left out."""
        if not self.metrics_file.is_file():
            return []
        entries = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
        return [entry for entry in entries if "step" in entry]

    def forget_steps_after(self, step: int) -> None:
        """Drop metrics of steps that a resumed run will repeat."""
        kept = [{"format_version": FORMAT_VERSION}, *(e for e in self.read_metrics() if e["step"] <= step)]
        if not self.metrics_file.is_file():
            return
        write_text(self.metrics_file, "".join(json.dumps(entry) + "\n" for entry in kept))

    def write(self, file: Path, content: dict[str, Any]) -> None:
        write_json(file, {"format_version": FORMAT_VERSION, **content})

    def last_checkpoint(self) -> tuple[int, Path] | None:
        """(step, folder) of the newest whole checkpoint."""
        return next(iter(whole_checkpoints(self.checkpoints)), None)


def _is_temporary(file: Path) -> bool:
    """A file on its way: written under such a name, then renamed."""
    return file.name.startswith(".") and file.suffix == ".tmp"
