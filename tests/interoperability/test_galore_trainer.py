"""Trainer with GaLoreAdamW, killed between two checkpoints, ends with the numbers of a run that was not."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "galore_trainer.py"


def train(folder: Path, *kill_at: str) -> int:
    done = subprocess.run([sys.executable, str(SCRIPT), str(folder), *kill_at], capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def test_a_killed_run_ends_with_the_numbers_of_one_that_was_not(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(whole) == 0
    assert train(killed, "8") == -signal.SIGKILL
    assert sorted(folder.name for folder in killed.glob("checkpoint-*")) == ["checkpoint-5"]
    assert train(killed) == 0
    expected, found = (load_file(folder / "end.safetensors") for folder in (whole, killed))
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
