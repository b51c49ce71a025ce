"""A progress bar over runs that any number of processes append to one file."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from rankwise.finetuning.comparison.study import StudyFolder

_LOOK_EVERY = 1.0  # seconds


@contextmanager
def counting(folder: "StudyFolder", keys: set[str], console: Console, what: str) -> Iterator[None]:
    """Show how many of these runs are in the folder, on a terminal; a line before and after where there is none."""
    progress = Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
        speed_estimate_period=3600.0,  # runs take minutes
    )
    bar = progress.add_task(what, total=len(keys))
    done = threading.Event()
    if not console.is_terminal:
        console.print(f"{what}: {len(keys)} runs", highlight=False)

    def look() -> None:
        while not done.wait(_LOOK_EVERY):
            progress.update(bar, completed=len(keys & {row["key"] for row in folder.rows()}))

    watcher = threading.Thread(target=look, daemon=True)
    with progress:
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
