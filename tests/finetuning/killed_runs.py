"""Runs ``rankwise finetune`` and ends it by SIGKILL as soon as it is about to touch the disk for the n-th time.

A program of its own: everything is imported once, and each run is a fork of it. Reads lines of JSON
``{"arguments": [...], "under": FOLDER}``, with ``kill_at`` (that n), ``after`` (seconds until a kill) or ``largest`` (bytes
that a file may have: what is longer fails to be written), and answers each with ``{"events": how often the disk was
touched, "status": exit code or minus the signal, "said": what came on stderr}``.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rankwise.cli.main import main

_TOUCHING = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.unlink", "shutil.rmtree", "os.chmod")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Killer:
    """Counts what the process does to one folder, from Python's own audit events: each comes before its deed."""

    def __init__(self, under: str, kill_at: int | None):
        self.under, self.kill_at, self.events = under, kill_at, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & _WRITING:
                return
        elif event in _TOUCHING:
            path = arguments[0]
        else:
            return
        if not str(os.fspath(path) if isinstance(path, str | os.PathLike) else "").startswith(self.under):
            return
        self.events += 1
        if self.events == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    arguments: list[str], under: str, kill_at: int | None = None, after: float | None = None, largest: int | None = None
) -> dict[str, Any]:
    read_end, write_end = os.pipe()
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            if largest is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
            killer = Killer(under, kill_at)
            sys.addaudithook(killer)
            if after is not None:
                threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
            status = main(arguments)
            os.write(write_end, str(killer.events).encode())
            sys.stderr.flush()
            os._exit(status)
        os.close(write_end)
        _, status = os.waitpid(child, 0)
        with os.fdopen(read_end) as pipe:
            events = pipe.read()
        said.seek(0)
        return {
            "events": int(events) if events else None,
            "status": os.waitstatus_to_exitcode(status),
            "said": said.read().decode(),
        }


def warm_up() -> None:
    """Import what a run needs, so that forks begin at once."""
    import rankwise.diagnostics
    import rankwise.finetuning.runner  # noqa: F401


if __name__ == "__main__":
    warm_up()
    for line in sys.stdin:
        started = time.monotonic()
        asked = json.loads(line)
        assert Path(asked["under"]).is_absolute()
        found = run(**asked)
        print(json.dumps({**found, "seconds": time.monotonic() - started}), flush=True)
