"""``rankwise finetune``."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rankwise.errors import UserError

_EXAMPLE = """
Adapt a pretrained model on a few labelled rows with Deep LoRA, or with another --method.

[bold]Example[/bold]

  rankwise finetune --model ./all-MiniLM-L6-v2 --data pairs.csv --shots 64 --out runs/deep

The run folder then holds adapter/ (PEFT's format), result.json, predictions.csv, report.html, and for Deep LoRA lora/, a
plain LoRA that every LoRA runtime loads. Ctrl-C leaves a run that goes on with

  rankwise finetune --resume --out runs/deep
"""

_DATA, _ADAPTER, _TRAINING, _STOPPING = "Data", "Adapter", "Training", "Early stopping"


def register(app: typer.Typer) -> None:
    app.command("finetune", help=_EXAMPLE, no_args_is_help=True)(finetune)


def finetune(
    context: typer.Context,
    out: Annotated[str, typer.Option(help="Run folder to create.")],
    model: Annotated[str | None, typer.Option(help="Model folder, or a hub name such as org/name.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="CSV, TSV, JSONL, Parquet or CoNLL file, folder of images, or hub:NAME.", rich_help_panel=_DATA
        ),
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            help="auto, pair-similarity (two texts and a score on an embedding model), classification, regression, "
            "token-classification (a tag a word), image-classification, generation (text from text) or causal-lm (prompt and "
            "completion).",
            rich_help_panel=_DATA,
        ),
    ] = "auto",
    method: Annotated[
        str,
        typer.Option(
            help="deep-lora, lora, dora, pissa, adalora, vera, loha, oft, … (docs/methods.md has all), or auto: what measured best "
            "for such a task.",
            rich_help_panel=_ADAPTER,
        ),
    ] = "deep-lora",
    shots: Annotated[
        int | None,
        typer.Option(help="Labelled rows to train on, drawn by --seed; the rest is held out.", rich_help_panel=_DATA),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the rows, the frames and the order.")] = 0,
    eval_data: Annotated[str | None, typer.Option(help="File with the held-out rows.", rich_help_panel=_DATA)] = None,
    eval_limit: Annotated[int, typer.Option(help="At most this many held-out rows.", rich_help_panel=_DATA)] = 2000,
    text: Annotated[str | None, typer.Option(help="Text column; guessed otherwise.", rich_help_panel=_DATA)] = None,
    text_pair: Annotated[str | None, typer.Option(help="Second text column.", rich_help_panel=_DATA)] = None,
    label: Annotated[str | None, typer.Option(help="Label or score column.", rich_help_panel=_DATA)] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="One more metric to report, by name (balanced_accuracy, r2, …) or as module:function; repeatable.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    primary_metric: Annotated[
        str | None,
        typer.Option(help="The metric that early stopping and the report look at.", rich_help_panel=_DATA),
    ] = None,
    class_weights: Annotated[
        str | None,
        typer.Option(
            help="How much a row of a class counts: balanced, or by name, as in neg=1,pos=3.", rich_help_panel=_TRAINING
        ),
    ] = None,
    packing: Annotated[
        bool,
        typer.Option("--packing", help="Of causal-lm: short rows share a sequence.", rich_help_panel=_TRAINING),
    ] = False,
    r: Annotated[
        int, typer.Option("--rank", "-r", help="Width: upper bound on the rank.", rich_help_panel=_ADAPTER)
    ] = 8,
    inner_depth: Annotated[int | None, typer.Option(help="Inner factors (3).", rich_help_panel=_ADAPTER)] = None,
    init_scale: Annotated[
        float | None,
        typer.Option(
            help="Inner factors of the other variants start at this times I (1e-3).", rich_help_panel=_ADAPTER
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="The start: zero-left (the default), or inner factors ε between compressed (the paper's), spectral or "
            "random frames.",
            rich_help_panel=_ADAPTER,
        ),
    ] = None,
    direction_dropout: Annotated[
        float | None,
        typer.Option(
            help="Share of the adapter's directions that a row of a training batch does without (0.3).",
            rich_help_panel=_ADAPTER,
        ),
    ] = None,
    solver: Annotated[
        str,
        typer.Option(
            help="train (optimizer steps), ridge (closed form, for pair similarity on few rows), or auto.",
            rich_help_panel=_ADAPTER,
        ),
    ] = "auto",
    preset: Annotated[
        str | None,
        typer.Option(help="paper: the ICML 2024 settings (lr 1e-2, outer-lr-ratio 1e-2).", rich_help_panel=_ADAPTER),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate; the method's own unless given.", rich_help_panel=_TRAINING)
    ] = None,
    outer_lr_ratio: Annotated[
        float | None,
        typer.Option(
            help="Rate of U and V over the inner factors' (10; other variants 1); 0 freezes them.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    head: Annotated[
        str,
        typer.Option(help="A classifier's head: trained, or frozen at its start.", rich_help_panel=_TRAINING),
    ] = "trained",
    head_start: Annotated[
        str | None,
        typer.Option(
            help="The head's start: fitted to the labels first (the default), or random.", rich_help_panel=_TRAINING
        ),
    ] = None,
    head_lr: Annotated[float, typer.Option(help="Learning rate of the head.", rich_help_panel=_TRAINING)] = 1e-3,
    adam_eps: Annotated[
        float | None, typer.Option(help="Adam's eps (deep-lora 1e-6, lora 1e-8).", rich_help_panel=_TRAINING)
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", rich_help_panel=_TRAINING)] = 200,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Of the rates: linear (warm-up, then down to 0; the default) or constant.", rich_help_panel=_TRAINING
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Rows a step, of all processes and passes together.", rich_help_panel=_TRAINING)
    ] = 16,
    accumulate: Annotated[
        int,
        typer.Option(
            help="Passes that a step's rows are taken in, one after the other: less memory, the same step.",
            rich_help_panel=_TRAINING,
        ),
    ] = 1,
    early_stopping: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many scores in a row, on labelled rows set apart, that are no better than the best; keep "
            "the adapter of the best.",
            rich_help_panel=_STOPPING,
        ),
    ] = None,
    validate_every: Annotated[
        int | None, typer.Option(help="Steps between those scores (a tenth of the run).", rich_help_panel=_STOPPING)
    ] = None,
    validation_rows: Annotated[
        int | None,
        typer.Option(help="Labelled rows set apart for them (a fifth), not trained on.", rich_help_panel=_STOPPING),
    ] = None,
    validation_data: Annotated[
        str | None, typer.Option(help="File that brings such rows instead.", rich_help_panel=_STOPPING)
    ] = None,
    init_batches: Annotated[
        int, typer.Option(help="Batches averaged for the gradient that places U and V.", rich_help_panel=_TRAINING)
    ] = 1,
    max_length: Annotated[int, typer.Option(help="Tokens kept of a text.", rich_help_panel=_TRAINING)] = 128,
    precision: Annotated[
        str, typer.Option(help="auto (measures bf16 on this machine), fp32 or bf16.", rich_help_panel=_TRAINING)
    ] = "auto",
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints (a tenth of the run).", rich_help_panel=_TRAINING)
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(help="Processes that share each step; one for each GPU unless given.", rich_help_panel=_TRAINING),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out; its settings count.")] = False,
) -> int:
    console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    with console.status("loading PyTorch and transformers"):
        runner, settings_module = _load()
    if resume:
        if model is not None or data is not None:
            raise UserError(
                "--resume takes the model, data and settings from the run folder; leave --model and --data out"
            )
        if runner.tidied(out):  # it had its results, but was killed before the report
            return _write_report(out, console)
        launched = _on_processes(context, lambda: processes if processes is not None else runner.processes_of(out))
        return launched if launched is not None else _write_report_of(runner.resume(out, console), out, console)
    methods = settings_module.METHODS
    if method != settings_module.AUTO and not (method in methods and methods[method].offered):
        offered = ", ".join([settings_module.AUTO, *(name for name, m in methods.items() if m.offered)])
        why = f": {methods[method].why_not}" if method in methods else ""
        raise UserError(f"--method must be one of {offered}; got {method}{why}")
    if model is None or data is None:
        missing = " and ".join(name for name, value in (("--model", model), ("--data", data)) if value is None)
        raise UserError(
            f"{missing} missing; for example:\n  rankwise finetune --model ./my-model --data pairs.csv --out {out}"
        )
    chosen = {
        "inner_depth": inner_depth,
        "init_scale": init_scale,
        "variant": variant,
        "direction_dropout": direction_dropout,
        "lr": lr,
        "outer_lr_ratio": outer_lr_ratio,
        "adam_eps": adam_eps,
        "head_start": head_start,
        "schedule": schedule,
    }
    if preset is not None and preset not in settings_module.PRESETS:
        raise UserError(f"unknown preset {preset!r}; expected {', '.join(settings_module.PRESETS)}")
    if preset is not None and method not in settings_module.PRESETS[preset]:
        known = ", ".join(settings_module.PRESETS[preset])
        raise UserError(f"--preset {preset} holds settings of {known}; it does not go with --method {method}")
    values = {
        **settings_module.PRESETS.get(preset or "", {}).get(method, {}),
        **{k: v for k, v in chosen.items() if v is not None},
    }
    values["r"] = r
    if solver != "auto":
        values["solver"] = solver
    settings = settings_module.FinetuneSettings(
        model=model,
        data=data,
        out=out,
        task=task,
        method=method,
        shots=shots,
        seed=seed,
        eval_data=eval_data,
        eval_limit=eval_limit,
        text=text,
        text_pair=text_pair,
        label=label,
        head=head,
        head_lr=head_lr,
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        early_stopping=early_stopping,
        validate_every=validate_every,
        validation_rows=validation_rows,
        validation_data=validation_data,
        class_weights=_weights(class_weights),
        packing=packing,
        metrics=tuple(metric or ()),
        primary_metric=primary_metric,
        init_batches=init_batches,
        max_length=max_length,
        precision=precision,
        save_every=save_every,
        **values,
    )
    launched = _on_processes(
        context, lambda: processes if processes is not None else runner.usual_processes(batch_size, accumulate)
    )
    return launched if launched is not None else _write_report_of(runner.finetune(settings, console), out, console)


def _weights(given: str | None) -> str | dict[str, float] | None:
    """``balanced``, or the weights of ``neg=1,pos=3``."""
    if given is None or "=" not in given:
        return given
    weights: dict[str, float] = {}
    for part in given.split(","):
        name, _, weight = part.rpartition("=")
        try:
            weights[name.strip()] = float(weight)
        except ValueError:
            raise UserError(
                f"--class-weights must be balanced or weights by name such as neg=1,pos=3, got {part!r}"
            ) from None
    return weights


def _load():  # type: ignore[no-untyped-def]
    """The rooms behind the command, loaded only once its options have parsed."""
    try:
        import transformers

        from rankwise.finetuning import runner, settings
    except ImportError as error:
        raise UserError(f"fine-tuning needs more packages ({error}): pip install 'rankwise[hf,report]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return runner, settings


def _on_processes(context: typer.Context, wanted: Callable[[], int]) -> int | None:
    """The exit code of the command, run anew in as many processes as wanted; None where this process is to do the work."""
    from rankwise.finetuning import launching

    if launching.is_launched() or (count := wanted()) == 1:
        return None
    if count < 1:
        raise UserError(f"--processes must be at least 1, got {count}")
    return launching.run_on_processes(context.obj, count)


def _write_report_of(result: dict[str, Any], out: str, console: Console) -> int:
    from rankwise.finetuning.processes import end_launched

    if result:  # only the first process has one
        _write_report(out, console)
    end_launched()
    return 0


def _write_report(out: str, console: Console) -> int:
    from rankwise.diagnostics import write_report

    try:
        page = write_report([out], Path(out) / "report.html")
    except UserError as error:  # the run itself is whole: a missing matplotlib must not fail it
        console.print(f"no report: {error}", highlight=False, markup=False, soft_wrap=True)
        return 0
    console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)
    return 0
