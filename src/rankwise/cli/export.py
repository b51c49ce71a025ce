"""``rankwise export``."""

from typing import Annotated

import typer

from rankwise.errors import UserError

_HELP = """
Turn a saved adapter into a plain LoRA that every LoRA runtime loads, into a Deep LoRA to go on with, or into a GGUF file for
llama.cpp; resize any.

By default each layer keeps its numerical rank, which changes the update by rounding only. The base model is not needed, or
for a GGUF file only its configuration.

[bold]Example[/bold]

  rankwise export runs/deep/adapter --out lora --energy 0.99

  rankwise export somebody/lora --to deep-lora --out start --rank 8

  rankwise export runs/deep/adapter --to gguf --out adapter.gguf
"""
_KINDS = {"DEEPLORA": "deep-lora", "LORA": "lora"}
_TARGETS = ("lora", "deep-lora", "gguf")


def register(app: typer.Typer) -> None:
    app.command("export", help=_HELP, no_args_is_help=True)(export)


def export(
    adapter: Annotated[str, typer.Argument(help="Folder of the saved adapter.")],
    out: Annotated[str, typer.Option(help="Folder to create, or the file with --to gguf.")],
    to: Annotated[str, typer.Option("--to", help="lora, deep-lora or gguf.")] = "lora",
    source: Annotated[
        str | None, typer.Option("--from", help="lora or deep-lora: refuse a folder of another kind.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Keep at most this many directions a layer.")] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of every layer's energy, in (0, 1].")] = None,
    tol: Annotated[float | None, typer.Option(help="Drop singular values below tol times the largest.")] = None,
    r: Annotated[int | None, typer.Option("--r", "-r", help="Width of a Deep LoRA; the rank kept otherwise.")] = None,
    inner_depth: Annotated[int | None, typer.Option(help="Inner factors of a Deep LoRA (3).")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of the base model of a GGUF file; the adapter's own by default."),
    ] = None,
) -> None:
    if to not in _TARGETS:
        raise UserError(f"--to must be lora, deep-lora or gguf, got {to!r}")
    if source not in (None, *_KINDS.values()):
        raise UserError(f"--from must be lora or deep-lora, got {source!r}")
    if to != "deep-lora" and (r is not None or inner_depth is not None):
        raise UserError("--r and --inner-depth go with --to deep-lora; a LoRA's rank is --rank")
    if to != "gguf" and base is not None:
        raise UserError("--base goes with --to gguf; nothing else needs the base model")
    try:
        from rankwise.adapters import deeplora_from_adapter, export_adapter_folder
        from rankwise.adapters.saved_updates import kind_of
    except ImportError as error:
        raise UserError(f"export needs more packages: {error}") from None
    try:
        found = _KINDS[kind_of(adapter)]
        if source not in (None, found):
            raise UserError(f"{adapter} holds a {found} adapter, not {source} as --from says")
        if to == "lora":
            summary = export_adapter_folder(adapter, out, rank=rank, energy=energy, tol=tol)
        elif to == "gguf":
            from rankwise.adapters.gguf import save_as_gguf

            summary = save_as_gguf(adapter, out, base=base, rank=rank, energy=energy, tol=tol)
        else:
            summary = deeplora_from_adapter(
                adapter,
                out,
                rank=rank,
                energy=energy,
                tol=tol,
                r=r,
                inner_depth=3 if inner_depth is None else inner_depth,
            )
    except ValueError as error:
        raise UserError(str(error)) from None
    typer.echo(str(summary))
