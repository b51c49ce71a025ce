"""How every benchmark here measures: two sides alternate in one process; the median of the pairwise ratios counts."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def alternate(ours: Callable[[], object], peer: Callable[[], object], pairs: int, warmup: int = 1) -> dict[str, Any]:
    """Time ``ours`` and ``peer`` in turn, the first of each pair changing sides; seconds per call and their ratios."""
    for _ in range(warmup):
        ours(), peer()
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for pair in range(pairs):
        sides = [("ours", ours), ("peer", peer)]
        for name, call in sides if pair % 2 == 0 else reversed(sides):
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(times["ours"], times["peer"], strict=True)]
    return {
        "pairs": pairs,
        "ours_seconds": times["ours"],
        "peer_seconds": times["peer"],
        "ratios": ratios,
        "median_ours_seconds": statistics.median(times["ours"]),
        "median_peer_seconds": statistics.median(times["peer"]),
        "median_ratio": statistics.median(ratios),
    }


def peak_memory_bytes(arguments: list[str]) -> int:
    """Peak resident memory of ``python arguments`` in a fresh process (Linux).

    From VmHWM, which starts at zero with the new program; ru_maxrss carries the parent's peak across fork and exec.
    """
    code = (
        "import re, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
        "print('PEAK', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout.split("PEAK")[-1]) * 1024


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    flags = torch.backends.cpu.get_cpu_capability()
    return {"cpu": cpu, "instructions": flags, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    names = ("rankwise", "torch", "transformers", "peft", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "python": platform.python_version()}


def write_result(name: str, command: str, content: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    payload = {"format_version": 1, "command": command, "machine": machine(), "versions": versions(), **content}
    path.write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path
