"""kill -9 at any point of `rankwise finetune`, or a disk that takes no more: the run resumes to the end it would have had."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.finetuning.run_outcomes import outcome
from tests.finetuning.tiny_checkpoint import offline_environment

pytestmark = pytest.mark.slow
POINTS, MOMENTS = 30, 8  # kills before the n-th write, and after so many seconds
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.finetuning.killed_runs"], env=offline_environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
    ) as program:  # fmt: skip

        def ask(arguments: list[str], out: Path, **how: float) -> dict[str, Any]:
            assert program.stdin is not None
            assert program.stdout is not None
            print(json.dumps({"arguments": arguments, "under": str(out), **how}), file=program.stdin, flush=True)
            return json.loads(program.stdout.readline())

        yield ask
        program.kill()


def command(tiny: SimpleNamespace, out: Path) -> list[str]:
    options = (
        f"finetune --model {tiny.model} --data {tiny.classes} --task classification --shots 17 --steps 12 --batch-size 4 "
        f"--rank 4 --precision fp32 --save-every 3 --early-stopping 2 --validate-every 2 --out {out}"
    )
    return options.split()


def finish(run: Run, tiny: SimpleNamespace, out: Path) -> None:
    """What a person would do next: go on if there is something to go on with, else type the command again."""
    begun = (out / "config.json").is_file()
    done = run(["finetune", "--resume", "--out", str(out)] if begun else command(tiny, out), out)
    assert done["status"] == 0, (begun, done, sorted(path.name for path in out.iterdir()))


def same_folder(one: Path, other: Path) -> None:
    assert outcome(one) == outcome(other)
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    assert {path.name for path in (one / "lora").iterdir()} == {path.name for path in (other / "lora").iterdir()}


@pytest.mark.timeout(900)
def test_every_point_resumes_to_the_same_end(tiny: SimpleNamespace, tmp_path: Path, run: Run) -> None:
    whole = tmp_path / "whole"
    reference = run(command(tiny, whole), whole)
    assert reference["status"] == 0
    writes = reference["events"]
    assert writes > 60, "the kill would not be everywhere"
    draw = np.random.default_rng(0)
    points = sorted({1, 2, 3, writes - 2, writes - 1, writes, *draw.integers(1, writes + 1, POINTS - 6).tolist()})
    moments = draw.uniform(0.3, 1.0, MOMENTS) * reference["seconds"]
    kills = [{"kill_at": int(n)} for n in points] + [{"after": float(s)} for s in moments]
    assert len(kills) >= 30
    killed = 0
    for number, kill in enumerate(kills):
        out = tmp_path / f"run-{number}"
        outcome_of_kill = run(command(tiny, out), out, **kill)
        killed += outcome_of_kill["status"] == -9
        if not (out / "report.html").is_file():  # the report is the last thing a run writes
            finish(run, tiny, out)
        same_folder(out, whole)
    assert killed >= len(points)


def test_killed_again_and_again(tiny: SimpleNamespace, tmp_path: Path, run: Run) -> None:
    """Every attempt is killed later than the one before, resumed or begun anew, until one comes through."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    writes = run(command(tiny, whole), whole)["events"]
    for kill_at in range(5, writes, 9):
        begun = (out / "config.json").is_file()
        run(["finetune", "--resume", "--out", str(out)] if begun else command(tiny, out), out, kill_at=kill_at)
        if (out / "report.html").is_file():
            break
    else:
        finish(run, tiny, out)
    same_folder(out, whole)


@pytest.mark.parametrize("largest", [500, 2_000, 10_000, 60_000])
def test_files_that_cannot_be_written(tiny: SimpleNamespace, tmp_path: Path, run: Run, largest: int) -> None:
    """Python, torch and safetensors each fail in their own words; a person reads one."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run(command(tiny, whole), whole)["status"] == 0
    failed = run(command(tiny, out), out, largest=largest)
    assert failed["status"] == 1, failed["said"]
    assert failed["said"].count("\nerror:") == 1, failed["said"]
    assert "Traceback" not in failed["said"]
    assert "unexpected" not in failed["said"]
    assert "File too large" in failed["said"] or "torch could not write" in failed["said"]
    finish(run, tiny, out)
    same_folder(out, whole)
