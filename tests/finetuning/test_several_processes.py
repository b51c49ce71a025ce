"""`rankwise finetune` in two processes: the run of one, written once, and gone on with whoever dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rankwise.errors import UserError
from rankwise.finetuning.processes import ALONE, launched_processes
from tests.finetuning.run_outcomes import losses, outcome, validations
from tests.finetuning.tiny_checkpoint import offline_environment, save_tiny_checkpoint

# Adam's steps are nearly linear in the gradient with so large an eps: rounding stays rounding
COMMON = "--steps 11 --shots 17 --rank 4 --precision fp32 --adam-eps 1 --head-start random --schedule constant --save-every 3"
DATA = {"classification": "classes", "pair-similarity": "pairs"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "rankwise"]
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "rankwise",
]  # fmt: skip
ALONE_COMMAND = [sys.executable, "-m", "rankwise"]
WAYS = {"torchrun": (TORCHRUN, ""), "accelerate": (ACCELERATE, ""), "processes": (ALONE_COMMAND, "--processes 2")}


def environment() -> dict[str, str]:
    return {k: v for k, v in offline_environment().items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def start(launcher: list[str], out: Path, options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launcher, "finetune", "--out", str(out), *options.split()],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip


def run(launcher: list[str], out: Path, options: str) -> str:
    process = start(launcher, out, options)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stdout + stderr
    return stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Without dropout: processes draw different units, and no one process could draw as two do."""
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "embedding", dropout=0.0))


def options(model: str, tiny: SimpleNamespace, task: str, more: str = "") -> str:
    return f"--model {model} --data {getattr(tiny, DATA[task])} --task {task} --solver train {COMMON} {more}"


CASES = [
    ("torchrun", "classification", "--method deep-lora --batch-size 8 --lr 0.5 --direction-dropout 0"),
    ("accelerate", "classification", "--method lora --batch-size 8 --lr 0.5 --accumulate 2"),
    ("processes", "pair-similarity", "--method lora --batch-size 4 --lr 5 --early-stopping 3 --validate-every 2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "task", "more"), CASES, ids=lambda value: value.split()[0])
def test_two_processes_make_the_run_of_one(
    tiny: SimpleNamespace, tmp_path: Path, model: str, way: str, task: str, more: str
) -> None:
    """17 rows do not divide: the last batch of an epoch leaves parts unequal, or empty."""
    launcher, given = WAYS[way]
    one, two = tmp_path / "one", tmp_path / "two"
    run(ALONE_COMMAND, one, options(model, tiny, task, more))
    said = run(launcher, two, options(model, tiny, task, f"{more} {given}"))
    assert said.count("report: ") == 1, "the first process alone writes and speaks"
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    alone, shared = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    assert json.loads((two / "config.json").read_text())["processes"] == 2
    assert alone.keys() == shared.keys()
    for key, tensor in alone.items():
        torch.testing.assert_close(shared[key], tensor, rtol=0, atol=1e-5 * max(1.0, float(tensor.abs().max())))
    assert max(loss for _, loss in losses(one)) < 20, "a wild run would make much of rounding"
    assert [step for step, _ in losses(two)] == [step for step, _ in losses(one)]
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(one)], rel=1e-3, abs=1e-4)
    assert [step for step, _ in validations(two)] == [step for step, _ in validations(one)]
    assert outcome(two)[0].count("\n") == outcome(one)[0].count("\n")


def wait_for_checkpoint(out: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not list(out.glob("checkpoints/checkpoint-*/checksums.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def processes_of(parent: int) -> dict[int, int]:
    """{rank: process id} of the processes below this one."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"\nPPid:\t{parent}\n" in (folder / "status").read_text():
                variables = (folder / "environ").read_bytes().split(b"\0")
                found |= {int(v[5:]): int(folder.name) for v in variables if v.startswith(b"RANK=")}
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def long_run(tiny: SimpleNamespace, model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Options of a run in two processes that leaves time to kill one, and the folder of one that was let alone."""
    more = "--method deep-lora --batch-size 4 --lr 0.02 --processes 2"
    given = options(model, tiny, "classification", more).replace("--steps 11", "--steps 150")
    out = tmp_path_factory.mktemp("long") / "run"
    run(ALONE_COMMAND, out, given)
    return given, out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for the processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_leaves_a_resumable_run(tmp_path: Path, long_run: tuple[str, Path], rank: int) -> None:
    given, whole = long_run
    out = tmp_path / "run"
    process = start(ALONE_COMMAND, out, given)
    wait_for_checkpoint(out, process)
    os.kill(processes_of(process.pid)[rank], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "--resume" in said
    assert "Traceback" not in said
    assert not (out / "result.json").exists()
    run(ALONE_COMMAND, out, "--resume")
    assert outcome(out) == outcome(whole)


@pytest.mark.slow
def test_a_mistake_is_said_once(tiny: SimpleNamespace, tmp_path: Path, model: str) -> None:
    process = start(
        ALONE_COMMAND, tmp_path / "run", options(model, tiny, "classification", "--batch-size 3 --processes 2")
    )
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said.count("error:") == 1
    assert "choose a multiple of 2" in said
    assert not (tmp_path / "run").exists()


def test_alone_everything_is_trivial() -> None:
    assert (ALONE.count, ALONE.rank, ALONE.first) == (1, 0, True)
    assert ALONE.together([1, 2]) == ALONE.mine([1, 2]) == [1, 2]
    assert ALONE.agreed("x") == "x"
    assert not ALONE.any(False)
    ALONE.wait()


@pytest.mark.parametrize(
    ("variable", "what"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_what_shards_the_model_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, what: str) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=f"does not train under {what}"):
        launched_processes()
