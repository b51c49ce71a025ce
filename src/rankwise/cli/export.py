"""``rankwise export``."""

from typing import Annotated

import typer

from rankwise.errors import UserError

_HELP = """
Turn a saved Deep LoRA adapter into a plain LoRA that every LoRA runtime loads.

By default each layer keeps its numerical rank, which changes the update by rounding only; layers of rank 0 are left out.

[bold]Example[/bold]

  rankwise export runs/deep/adapter --out lora --energy 0.99
"""


def register(app: typer.Typer) -> None:
    app.command("export", help=_HELP, no_args_is_help=True)(export)


def export(
    adapter: Annotated[str, typer.Argument(help="Folder of the saved adapter.")],
    out: Annotated[str, typer.Option(help="Folder to create for the LoRA adapter.")],
    rank: Annotated[int | None, typer.Option(help="Keep at most this many directions a layer.")] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of every layer's energy, in (0, 1].")] = None,
    tol: Annotated[float | None, typer.Option(help="Drop singular values below tol times the largest.")] = None,
) -> None:
    try:
        from rankwise.adapters import export_adapter_folder
    except ImportError as error:
        raise UserError(f"export needs more packages: {error}") from None
    try:
        summary = export_adapter_folder(adapter, out, rank=rank, energy=energy, tol=tol)
    except ValueError as error:
        raise UserError(str(error)) from None
    typer.echo(str(summary))
