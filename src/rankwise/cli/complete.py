"""``rankwise complete``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rankwise.errors import UserError

_EXAMPLE = """
Fill a matrix with holes: ratings, sensors, a picture. The rank is found, not chosen.

[bold]Example[/bold]

  rankwise complete ratings.csv --row user --col item --value rating --out runs/ml --predict pairs.csv

  rankwise complete picture.png --observed 0.3 --out runs/picture

Reads CSV, TSV, Parquet (one entry a line: --row, --col, --value), whole matrices (CSV, .npy, .npz, .mtx) and pictures.
The run folder then holds model/, summary.json, predictions.csv and report.html. Ctrl-C leaves a run that the same command
goes on with. Later predictions from a finished run:

  rankwise complete --from runs/ml --predict more.csv --predictions more-filled.csv

More entries than one machine holds: the same command under torchrun, the run folder where every machine sees it:

  torchrun --nproc-per-node 2 -m rankwise complete ratings.csv --row user --col item --value rating --out runs/ml
"""

_OF_PREDICTING = ("from_run", "predict", "interval", "predictions", "row", "col", "header", "delimiter", "jobs")
_DATA, _MODEL, _PREDICTION, _PICTURE = "Data", "Model", "Predictions", "Pictures"


def register(app: typer.Typer) -> None:
    app.command("complete", help=_EXAMPLE, no_args_is_help=True)(complete)


def complete(
    context: typer.Context,
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
    filled: Annotated[
        str | None,
        typer.Option(
            help="Also write the whole matrix, its holes filled: a .csv or .npy file.", rich_help_panel=_PREDICTION
        ),
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
        runs = _completion_runs()
    pairs = runs.Pairs.checked(predict, interval, predictions, row, col, header, delimiter)
    target = None if pairs is None else pairs.target
    whole = runs.checked_filled(filled)
    inputs = {"the data": data, "--mask": mask, "--predict": predict}
    runs.check_targets(inputs, {"--predictions": target, "--filled": whole})
    _check_threads(jobs)
    if from_run is not None:
        _check_only_predicts(context)
        if pairs is None:
            raise UserError("--from needs --predict with a table of the entries to predict")
        runs.predict_from(Path(from_run), pairs, jobs, console)
        return
    if data is None or out is None:
        missing = " and ".join(name for name, given in (("the data file", data), ("--out", out)) if given is None)
        raise UserError(
            f"{missing} missing; for example:\n  rankwise complete ratings.csv --row user --col item --value rating --out "
            "runs/ml"
        )
    settings = runs.CompletionSettings(
        row=row, col=col, value=value, header=header, row_labels=row_labels, delimiter=delimiter, key=key,
        observed=observed, mask=mask, rank=rank, depth=depth, solver=solver, intercept=intercept, loss=loss,
        clip=runs.parsed_bounds(clip), max_iter=max_iter, dtype=dtype, calibrate=calibrate, seed=seed,
    )  # fmt: skip
    if filled is not None and runs.is_picture(data):
        raise UserError("a picture is filled into filled.png in the run folder; leave --filled out")
    settings.check(data, predicts=pairs is not None, with_intervals=pairs is not None and pairs.level is not None)
    with runs.torchrun_processes() as together:
        jobs = runs.fair_jobs(jobs)
        if together.size > 1:
            settings.check_for_several()
        if together.rank > 0:
            runs.follow(Path(out), settings, jobs, together)
            return
        others = runs.Others(together) if together.size > 1 else None
        runs.CompletionRun(Path(out), data, settings, jobs, console, others).go(pairs, whole)
        if others is not None:  # where it failed, torchrun ends them: they may be waiting in the middle of a fit
            others.end()


def _check_only_predicts(context: typer.Context) -> None:
    """With --from nothing is read or fitted: an option about that would be ignored."""
    given = [
        parameter.opts[-1] if parameter.param_type_name == "option" else "the data file"
        for parameter in context.command.params
        if parameter.name not in _OF_PREDICTING
        and getattr(context.get_parameter_source(parameter.name or ""), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise UserError(f"--from takes everything else from a finished run; leave {', '.join(given)} out")


def _check_threads(jobs: int | None) -> None:
    if jobs is not None and not 1 <= jobs <= 1024:
        raise UserError(f"--jobs must be a number of threads from 1, got {jobs}")


def _completion_runs() -> Any:
    """The room behind the command, loaded only once its options have parsed."""
    try:
        import rankwise.completion  # noqa: F401
        from rankwise import completion_runs
    except ImportError as error:
        raise UserError(f"completing needs more packages ({error}): pip install 'rankwise[completion]'") from None
    return completion_runs
