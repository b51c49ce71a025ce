"""``rankwise``: the command and what happens when something goes wrong."""

import importlib
import os
import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from rankwise import __version__

app = typer.Typer(
    name="rankwise",
    help="Learning with low-rank structure: adapters from a few labels, matrices with holes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# typer raises click's exceptions, its own copy of them in newer versions: found by the name both carry
_USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
_PATIENCE = 5  # seconds that a launcher has to end the other processes
_INTERRUPTED = 130  # what newer versions of typer make of a KeyboardInterrupt
_COMMANDS = ("finetune", "compare", "complete", "export", "report", "memory", "compress")


def _version(show: bool) -> None:
    if show:
        typer.echo(f"rankwise {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Learning with low-rank structure: adapters from a few labels, matrices with holes."""


for _name in _COMMANDS:
    importlib.import_module(f"rankwise.cli.{_name}").register(app)


def run(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 something failed or was interrupted, 2 a mistake in what was given."""
    sys.exit(main(arguments))


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code; never a traceback unless RANKWISE_DEBUG is set."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    debug = bool(os.environ.get("RANKWISE_DEBUG"))
    try:
        given = sys.argv[1:] if arguments is None else arguments
        outcome = app(args=given, prog_name="rankwise", standalone_mode=False, obj=given)
    except typer.Abort:
        return _complain("interrupted", 1)
    except _USAGE_ERROR as error:
        # no message where only the command was typed: its help has been shown
        said = error.format_message().strip() or "something is missing"
        return _complain(f"{said}\nsee rankwise --help, or rankwise COMMAND --help", 2)
    except KeyboardInterrupt:
        return _complain("interrupted", 1)
    except BrokenPipeError:
        return 1
    except Exception as error:  # the last line of defence: a person gets a sentence, RANKWISE_DEBUG gets the traceback
        if debug:
            raise
        return _report_failure(error)
    if outcome == _INTERRUPTED:
        return _complain("interrupted", 1)
    return outcome if isinstance(outcome, int) else 0


def _report_failure(error: Exception) -> int:
    from rankwise.errors import Interrupted, UserError

    if isinstance(error, UserError):
        return _complain(str(error), 2)
    if isinstance(error, Interrupted):
        return 1 if _is_a_further_process() else _complain(str(error), 1)
    if isinstance(error, MemoryError):
        return _complain("out of memory; a smaller batch, a shorter maximal length or a lower rank needs less", 1)
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return _complain(
            f"{error.strerror or error}{where}; free some space or choose another folder, then try again", 1
        )
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return _complain(f"unexpected failure: {reason}\nset RANKWISE_DEBUG=1 to see where, and please report it", 1)


def _complain(message: str, code: int) -> int:
    if _is_a_further_process():  # of several with one mistake the first says it, and ends the others
        time.sleep(_PATIENCE)
        message = f"process {os.environ['RANK']}: {message}"
    Console(stderr=True).print(f"[bold red]error:[/bold red] {_escaped(message)}", highlight=False, soft_wrap=True)
    return code


def _is_a_further_process() -> bool:
    return os.environ.get("RANK", "0") != "0"


def _escaped(message: str) -> str:
    from rich.markup import escape

    return escape(message)
