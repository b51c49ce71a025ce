"""A resumable study: plan the runs, work them off in one or many processes, keep every row."""

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console

from rankwise.environment import environment
from rankwise.errors import UserError
from rankwise.files import write_json
from rankwise.finetuning.comparison.progress import counting
from rankwise.finetuning.comparison.protocol import RunSpec, StudySettings, confirm_runs, tuning_runs, units
from rankwise.finetuning.comparison.report import write_comparison_report
from rankwise.finetuning.comparison.rows import (
    chosen_learning_rate,
)
from rankwise.finetuning.comparison.summary import summarize, summary_lines
from rankwise.finetuning.comparison.trial import forget_tables, load_task, run_trial, split_rows, training_rows
from rankwise.finetuning.run_folder import FORMAT_VERSION, PACKAGES

BACKENDS = ("processes", "dask")


class StudyFolder:
    """study.json (the rules), rows.jsonl (one run a line, appended), summary.json and report.html (made from them)."""

    def __init__(self, path: Path):
        self.path = path
        self.settings_file = path / "study.json"
        self.rows_file = path / "rows.jsonl"
        self.summary_file = path / "summary.json"
        self.report_file = path / "report.html"

    def append(self, row: dict[str, Any]) -> None:
        """Add one row as a whole line; safe from several processes, on the disk before this returns."""
        line = json.dumps(row, allow_nan=False) + "\n"
        with FileLock(str(self.rows_file) + ".lock"), self.rows_file.open("ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a line cut short by a kill must not swallow this one
                    line = "\n" + line
            file.write(line.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows; a line cut short by a kill is left out, so that its run is done again."""
        if not self.rows_file.is_file():
            return []
        found = []
        for line in self.rows_file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("key"), str):
                found.append(row)
        return found

    def read_settings(self) -> StudySettings:
        try:
            content = json.loads(self.settings_file.read_text(encoding="utf-8"))
            return StudySettings.from_dict({**content["settings"], "out": str(self.path)})
        except FileNotFoundError:
            raise UserError(f"{self.path} is no study: it has no study.json") from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.settings_file} is damaged ({error!r}); start the study in a new folder") from None

    def read_tables(self) -> dict[str, str]:
        """Checksum of every task's data, as the study's first run saw it."""
        return dict(self._read().get("tables", {}))

    def _read(self) -> dict[str, Any]:
        if not self.settings_file.is_file():
            return {}
        return dict(json.loads(self.settings_file.read_text(encoding="utf-8")))

    def write_settings(self, settings: StudySettings, tables: dict[str, str]) -> None:
        shown = settings.to_dict()
        shown.pop("data_root")  # where a machine keeps its data is nobody else's business
        content = {"format_version": FORMAT_VERSION, "settings": shown, "tables": tables}
        environments = self._read().get("environments", [])
        here = environment(PACKAGES)
        if here not in environments:  # one for every version that made some of the rows
            environments.append(here)
        content["environments"] = environments
        write_json(self.settings_file, content)


@dataclass(frozen=True)
class Execution:
    """How the runs are worked off; none of this can change a result.

    Attributes:
        jobs: runs at a time.
        backend: ``processes`` of this machine, or the cluster of ``dask``.
        scheduler: address of a Dask scheduler; a local cluster of ``jobs`` workers unless given.
        shard: (i, n), the i-th of n parts, counted from 1: for job arrays whose parts are merged afterwards.
        retry_failed: do failed runs again.
    """

    jobs: int = 1
    backend: str = "processes"
    scheduler: str | None = None
    shard: tuple[int, int] = (1, 1)
    retry_failed: bool = False

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UserError(f"--jobs must be at least 1, got {self.jobs}")
        if self.backend not in BACKENDS:
            raise UserError(f"--backend must be one of {', '.join(BACKENDS)}, got {self.backend}")
        number, of = self.shard
        if not 1 <= number <= of:
            raise UserError(f"--shard must be I/N with 1 <= I <= N, got {number}/{of}")


def compare(
    settings: StudySettings, execution: Execution | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Run what is missing of a study and write its summary and report.

    A folder that holds a study already is gone on with: finished runs are kept, more tasks, methods, labels or trials
    may be asked for, other rules are refused.

    Returns:
        The content of ``summary.json``.

    Raises:
        UserError: unknown task or method, too few rows, or a folder that holds something else.
        KeyboardInterrupt: Ctrl-C; what had finished is kept, the same call goes on.
    """
    execution = execution or Execution()
    console = console or Console(stderr=True, quiet=True)
    folder = StudyFolder(Path(settings.out))
    if settings.precision == "auto" and execution.shard[1] > 1 and not folder.settings_file.is_file():
        raise UserError("the parts of one study must not each measure what is faster: give --precision fp32 or bf16")
    forget_tables()
    settings = _opened(folder, settings)
    mine = units(settings, execution.shard)
    try:
        tuning = [run for task, label in mine for run in tuning_runs(settings, task, label)]
        _work_off(folder, settings, tuning, execution, console, "choosing learning rates")
        rates = _rates(folder, settings, mine, console)
        _work_off(folder, settings, confirm_runs(settings, rates), execution, console, "trials")
    except KeyboardInterrupt:
        console.print(
            f"stopped; {len(folder.rows())} runs are kept in {folder.rows_file}. The same command goes on",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        raise
    return summarize_study(settings.out, console)


def summarize_study(out: str | os.PathLike[str], console: Console | None = None) -> dict[str, Any]:
    """Write summary.json and report.html from the rows a study has so far."""
    console = console or Console(stderr=True, quiet=True)
    folder = StudyFolder(Path(out))
    settings = folder.read_settings()
    rows = folder.rows()
    summary = summarize(rows, methods=settings.methods, target=_target(settings.methods))
    write_json(folder.summary_file, {"format_version": FORMAT_VERSION, **summary})
    shown = settings.to_dict()
    shown.pop("data_root")
    try:
        page = write_comparison_report(folder.path, shown, rows, summary)
        console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)
    except UserError as error:  # the study itself is whole: a missing matplotlib must not fail it
        console.print(f"no report: {error}", highlight=False, markup=False, soft_wrap=True)
    for line in summary_lines(summary):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return summary


def merge(
    parts: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], console: Console | None = None
) -> dict[str, Any]:
    """Put the rows of several shards of one study into one folder.

    Raises:
        UserError: a part is no study, or the parts follow different rules.
    """
    folders = [StudyFolder(Path(part)) for part in parts]
    if not folders:
        raise UserError("--merge needs at least one study folder")
    settings = folders[0].read_settings()
    for other in folders[1:]:
        settings = settings.extended_by(other.read_settings())
    target = StudyFolder(Path(out))
    settings = _opened(target, replace(settings, out=str(out)), plan=False)
    target.write_settings(settings, {k: v for part in folders for k, v in part.read_tables().items()})
    there = target.rows()
    have = {row["key"] for row in there if row.get("status") == "ok"}
    for folder in folders:
        for row in folder.rows():
            if row["key"] not in have and row not in there:  # the latter: failed rows of an earlier merge
                target.append(row)
                if row.get("status") == "ok":
                    have.add(row["key"])
    return summarize_study(out, console)


def _target(methods: Sequence[str]) -> str:
    """The method in question: Deep LoRA as it is by default, else its first variant, else the last method."""
    return next((m for m in sorted(methods, key=len) if m.partition(":")[0] == "deep-lora"), methods[-1])


def _opened(folder: StudyFolder, wanted: StudySettings, *, plan: bool = True) -> StudySettings:
    """The study of this folder, new or extended, after everything that can be checked has been."""
    if folder.settings_file.is_file():
        settings = folder.read_settings().extended_by(wanted)
    else:
        try:
            taken = folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir()))
        except OSError as error:
            raise UserError(f"cannot use the folder {folder.path}: {error.strerror}") from None
        if taken:
            raise UserError(f"{folder.path} holds something that is no study; choose another --out")
        settings = wanted
    tables = folder.read_tables()
    if plan:
        for name in settings.tasks:
            named, task, _ = load_task(settings, name)
            revision = "+".join(t.revision for t in (named.train, named.evaluation) if t is not None)
            if tables.setdefault(name, revision) != revision:
                raise UserError(
                    f"{name} has changed since the study in {folder.path} began, so its old and new runs could not stand "
                    "in one table; restore the data, or choose another --out"
                )
            pool = split_rows(named, settings, task).pool
            for shots in settings.shots:
                training_rows(pool, shots, 0, settings.draw)
            if any(tuning_runs(settings, name, label) for label in settings.methods):
                training_rows(pool, settings.tune_shots, 0, settings.draw, option="--tune-shots")
        if settings.precision == "auto":
            settings = replace(settings, precision=_measured_precision(settings))
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder.path}: {error.strerror}") from None
    folder.write_settings(settings, tables)
    return settings


def _measured_precision(settings: StudySettings) -> str:
    from rankwise.finetuning.methods import adapt
    from rankwise.finetuning.models import load_model, model_source, text_length
    from rankwise.finetuning.precision import choose_precision
    from rankwise.finetuning.processes import this_device

    _, task, revision = load_task(settings, settings.tasks[0])
    run = RunSpec("tune", settings.tasks[0], "lora", settings.batch_size, 0, 1e-3)
    model = adapt(
        load_model(task, model_source(settings.model), revision).to(this_device()),
        task,
        replace(settings, methods=("lora",), fixed=()).run_settings(run),
    )
    task.max_length = text_length(model, settings.max_length)
    rows = range(min(settings.batch_size, len(task.table.rows)))
    batch = {k: v.to(this_device()) for k, v in task.collate(list(rows)).items()}
    return choose_precision(task, model, batch, this_device())[0]


def _rates(
    folder: StudyFolder, settings: StudySettings, mine: Iterable[tuple[str, str]], console: Console
) -> dict[tuple[str, str], float]:
    """The learning rate of every (task, method): the one with the best tuning score, or the only one there is."""
    rows = folder.rows()
    rates: dict[tuple[str, str], float] = {}
    for task, label in mine:
        grid = settings.grid(label)
        rate = grid[0] if len(grid) == 1 else chosen_learning_rate(rows, task, label).lr
        if rate is None:
            console.print(
                f"{label} failed at every learning rate on {task}: left out",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
        else:
            rates[task, label] = rate
    return rates


def _work_off(
    folder: StudyFolder,
    settings: StudySettings,
    runs: Sequence[RunSpec],
    execution: Execution,
    console: Console,
    what: str,
) -> None:
    finished = {r["key"] for r in folder.rows() if r.get("status") == "ok" or not execution.retry_failed}
    missing = [run for run in runs if run.key not in finished]
    if not missing:
        return
    with counting(folder, {run.key for run in missing}, console, what), _parallel(execution) as submit:
        submit(_do(folder.path, settings, run, execution.jobs) for run in missing)


def _do(path: Path, settings: StudySettings, run: RunSpec, jobs: int) -> Any:
    from joblib import delayed

    return delayed(run_and_append)(str(path), settings, run, jobs)


def run_and_append(path: str, settings: StudySettings, run: RunSpec, jobs: int) -> None:
    """One run, appended to the study by whoever did it: a crash elsewhere loses nothing that has finished."""
    if jobs > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    _be_quiet()
    StudyFolder(Path(path)).append(run_trial(settings, run))


def _be_quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def _parallel(execution: Execution):  # type: ignore[no-untyped-def]
    """joblib over processes, or over a Dask cluster."""
    from joblib import Parallel, parallel_config

    if execution.backend == "processes":
        with warnings.catch_warnings():
            # loky replaces a worker that has grown, between two runs: of no interest to who waits for the study
            warnings.filterwarnings("ignore", category=UserWarning, message="A worker stopped while some jobs")
            # one run a task: batches of runs would be lost together
            yield Parallel(n_jobs=execution.jobs, batch_size=1, pre_dispatch=execution.jobs)
        return
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise UserError("--backend dask needs one more package: pip install 'rankwise[cluster]'") from None
    with ExitStack() as stack:
        try:  # only what reaches the cluster: an OSError of a run is no trouble with it
            if execution.scheduler is None:
                cluster = LocalCluster(n_workers=execution.jobs, threads_per_worker=1, dashboard_address=None)
                stack.enter_context(cluster)
            stack.enter_context(Client(execution.scheduler or cluster))
        except (OSError, TimeoutError) as error:
            where = execution.scheduler or "a local cluster"
            raise UserError(
                f"cannot reach {where} ({error}); start it with `dask scheduler` and `dask worker`"
            ) from None
        stack.enter_context(parallel_config(backend="dask"))
        yield Parallel(n_jobs=-1, batch_size=1)
