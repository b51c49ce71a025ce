"""Two processes that share the tests out must have found the same ones, in the same order and under the same names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def collected(hash_seed: int) -> list[str]:
    # a process of its own: the order of a set of strings depends on the hash seed, a gzip header on the second
    options = ["--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "tests"]
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.slow
def test_the_same_tests_are_found_by_every_process() -> None:
    first, second = collected(1), collected(2)
    assert len(first) > 1000
    assert [pair for pair in zip(first, second, strict=False) if pair[0] != pair[1]] == []
    assert len(first) == len(second)
