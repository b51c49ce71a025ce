"""``rankwise compare``."""

from typing import Annotated, Any

import typer
from rich.console import Console

from rankwise.errors import UserError

_EXAMPLE = """
Compare ways of adapting a model: the same labelled rows for every method, learning rates tuned alike, paired statistics.

[bold]Example[/bold]

  rankwise compare --model ./all-MiniLM-L6-v2 --task pairs.csv --methods none,lora,deep-lora --shots 16,64 --out runs/study

Every run is kept as one line of rows.jsonl; Ctrl-C or a crash loses the run in progress, and the same command goes on.
Asking for more tasks, methods, labels, seeds or learning rates extends a study. Methods may carry options: deep-lora:paper,
deep-lora:spectral+inner_depth=1, lora:r=16.
"""

_WHAT, _RULES, _HOW = "What to compare", "Rules, the same for every run", "How to run it"


def register(app: typer.Typer) -> None:
    app.command("compare", help=_EXAMPLE, no_args_is_help=True)(compare)


def compare(
    out: Annotated[str, typer.Option(help="Study folder: new, or one to go on with.")],
    model: Annotated[
        str | None, typer.Option(help="Model folder, or a hub name such as org/name.", rich_help_panel=_WHAT)
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, e2e-price, e2e-nlg, data files or "
            "hub:NAME. Named tasks are looked for under --data-root.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: none (unadapted), lora, lora-plus, rslora, dora, pissa, adalora, vera, "
            "lora-riemannian, lora-rite, relora, deep-lora, full-width, full, galore, adarankgrad; options after a colon.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    shots: Annotated[
        str | None, typer.Option(help="Comma-separated numbers of labelled rows (16,64,256).", rich_help_panel=_WHAT)
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Trials for each number of rows (5).", rich_help_panel=_WHAT)
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="The paper's experiments: icml24-table1, icml24-fig6, -fig7, -fig8, -fig11, -table2, -table3.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    data_root: Annotated[
        str | None,
        typer.Option(help="Folder of the named tasks' data (else the variable RANKWISE_DATA).", rich_help_panel=_WHAT),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(help="Learning rates tried for each method and task (5); may grow later.", rich_help_panel=_RULES),
    ] = None,
    fixed: Annotated[
        str | None,
        typer.Option(help="Comma-separated methods that keep their default rate: not tuned.", rich_help_panel=_RULES),
    ] = None,
    tune_shots: Annotated[
        int | None, typer.Option(help="Labelled rows of a tuning run (64).", rich_help_panel=_RULES)
    ] = None,
    tune_seeds: Annotated[
        int | None, typer.Option(help="Draws a rate is tried on (2).", rich_help_panel=_RULES)
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="evaluation: official held-out rows; tuning: rows split from train, to screen ideas on.",
            rich_help_panel=_RULES,
        ),
    ] = None,
    eval_limit: Annotated[
        int | None, typer.Option(help="At most this many held-out rows (1000).", rich_help_panel=_RULES)
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="A classifier's head: trained, or frozen at its start as in the paper.", rich_help_panel=_RULES
        ),
    ] = None,
    head_start: Annotated[
        str | None,
        typer.Option(
            help="The head's start: fitted to the labels first (the default), or random as in the paper.",
            rich_help_panel=_RULES,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps (200).", rich_help_panel=_RULES)] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Of the rates: linear (warm-up, then down to 0; the default) or constant, as in the paper.",
            rich_help_panel=_RULES,
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step (16).", rich_help_panel=_RULES)] = None,
    r: Annotated[
        int | None, typer.Option("--rank", "-r", help="Rank of every adapter (8).", rich_help_panel=_RULES)
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens kept of a text (128).", rich_help_panel=_RULES)] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto (measured once a study), fp32 or bf16.", rich_help_panel=_RULES)
    ] = None,
    draw: Annotated[
        str | None, typer.Option(help="without-replacement, or with-replacement as the paper.", rich_help_panel=_RULES)
    ] = None,
    max_eval_tokens: Annotated[
        int | None, typer.Option(help="Leave longer held-out rows out, as the paper did.", rich_help_panel=_RULES)
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Runs at a time.", rich_help_panel=_HOW)] = 1,
    backend: Annotated[
        str, typer.Option(help="processes, or dask (pip install 'rankwise\\[cluster]').", rich_help_panel=_HOW)
    ] = "processes",
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler; a local cluster otherwise.", rich_help_panel=_HOW)
    ] = None,
    shard: Annotated[
        str, typer.Option(help="I/N: the I-th of N parts, each in its own --out, for job arrays.", rich_help_panel=_HOW)
    ] = "1/1",
    merge: Annotated[
        list[str] | None, typer.Option(help="Put the rows of this study into --out; repeat it.", rich_help_panel=_HOW)
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Do failed runs again.", rich_help_panel=_HOW)
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="No runs: summary and report of what is there.", rich_help_panel=_HOW)
    ] = False,
) -> None:
    console = Console(stderr=True)
    with console.status("loading PyTorch and transformers"):
        comparison = _load()
    if report_only or merge:
        if model is not None or task is not None:
            raise UserError(
                "--merge and --report-only take everything from the study folders; leave --model and --task out"
            )
        if merge:
            comparison.merge(merge, out, console)
        else:
            comparison.summarize_study(out, console)
        return
    rules = {
        "model": model,
        "tasks": _names(task),
        "methods": _names(methods),
        "shots": _numbers(shots),
        "seeds": seeds,
        "data_root": data_root,
        "budget": budget,
        "fixed": _names(fixed),
        "tune_shots": tune_shots,
        "tune_seeds": tune_seeds,
        "split": split,
        "eval_limit": eval_limit,
        "head": head,
        "head_start": head_start,
        "steps": steps,
        "schedule": schedule,
        "batch_size": batch_size,
        "r": r,
        "max_length": max_length,
        "precision": precision,
        "draw": draw,
        "max_eval_tokens": max_eval_tokens,
    }
    execution = comparison.Execution(jobs, backend, scheduler, _shard(shard), retry_failed)
    settings = comparison.study_settings(out, {k: v for k, v in rules.items() if v is not None}, preset)
    comparison.compare(settings, execution, console)


def _load() -> Any:
    """The room behind the command, loaded only once its options have parsed."""
    try:
        import transformers

        from rankwise.finetuning import comparison
    except ImportError as error:
        raise UserError(f"comparing needs more packages ({error}): pip install 'rankwise[hf,report]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return comparison


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(number) for number in text.split(",") if number.strip())
    except ValueError:
        raise UserError(f"--shots takes whole numbers such as 16,64,256, got {text!r}") from None


def _shard(text: str) -> tuple[int, int]:
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal()):
        raise UserError(f"--shard takes I/N such as 1/4, got {text!r}")
    return int(number), int(of)
