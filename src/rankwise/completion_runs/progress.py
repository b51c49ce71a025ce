"""Progress on a terminal, sentences anywhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn


@contextmanager
def progress(console: Console, what: str) -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """A bar on a terminal, nothing elsewhere: a function for (done, of) and one for another description."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task = bar.add_task(what, total=None)
    with bar:
        yield (
            lambda done, total: bar.update(task, completed=done, total=total),
            lambda text: bar.update(task, description=text),
        )


def say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
