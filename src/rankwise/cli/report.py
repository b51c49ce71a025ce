"""``rankwise report``."""

from typing import Annotated

import typer

_HELP = """
One self-contained HTML page (and JSON) that shows finished runs side by side.

[bold]Example[/bold]

  rankwise report runs/deep runs/lora --out report.html
"""


def register(app: typer.Typer) -> None:
    app.command("report", help=_HELP, no_args_is_help=True)(report)


def report(
    runs: Annotated[list[str], typer.Argument(help="Run folders of rankwise finetune.")],
    out: Annotated[
        str, typer.Option(help="HTML file to write; a .json of the same name goes beside it.")
    ] = "report.html",
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Fine-tuning with low rank",
) -> None:
    from rankwise.diagnostics import write_report

    typer.echo(str(write_report(runs, out, title=title)))
