"""A run of several processes: the first reads, decides and writes, the others do their share of the fits."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.completion_runs.settings import CompletionSettings

if TYPE_CHECKING:
    from rankwise.completion import Observations
    from rankwise.completion.collective import Collective

_PATIENCE = timedelta(days=1)  # reading a long file takes; a process that dies is noticed by torchrun
_FIT, _CALIBRATE, _END = "fit", "calibrate", "end"


class Others:
    """The processes beside the first, as the first sees them: told what comes next, they do it at the same time."""

    def __init__(self, together: "Collective"):
        self._together = together

    def fit(self, folder: Path) -> "Observations":
        """They start to fit their rows of the entries kept in the folder; the first's own rows are returned."""
        from rankwise.completion.reading import load_entries

        self._together.parts(_FIT)
        return load_entries(folder, self._together)

    def calibrate(self) -> None:
        self._together.parts(_CALIBRATE)

    def end(self) -> None:
        self._together.parts(_END)


def follow(folder: Path, settings: CompletionSettings, jobs: int | None, together: "Collective") -> None:
    """What a process beside the first does: its share of whatever comes, until the end."""
    from rankwise.completion.reading import load_entries

    model = settings.model(jobs)
    while (work := together.parts(None)[0]) != _END:
        if work == _FIT:
            model.fit(load_entries(folder, together))
        elif work == _CALIBRATE:
            model.calibrate()


@contextmanager
def torchrun_processes() -> Iterator["Collective"]:
    """All processes that ``torchrun`` started, or this one alone."""
    from rankwise.completion.collective import ALONE, this_collective

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield this_collective()
    finally:
        dist.destroy_process_group()


def fair_jobs(jobs: int | None) -> int | None:
    """Threads of this process: as asked, or its part of the machine's if ``torchrun`` started several on it."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return jobs if jobs is not None or beside == 1 else max(1, (os.cpu_count() or 1) // beside)
