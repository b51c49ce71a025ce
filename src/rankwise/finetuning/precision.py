"""Whether bf16 autocast pays on this machine: measured, not assumed."""

import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from rankwise.finetuning.tasks import Batch, Task

_CLEAR_WIN = 0.9  # below this ratio of times; closer calls go to fp32, so that equal machines choose alike


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def choose_precision(task: Task, model: nn.Module, batch: Batch, device: torch.device) -> tuple[str, dict[str, float]]:
    """``fp32`` or ``bf16``, and the seconds of a forward and backward pass under each on the CPU.

    CPUs without bf16 instructions emulate them, much slower; those with them usually gain.
    """
    if device.type == "cuda":
        return ("bf16" if torch.cuda.is_bf16_supported() else "fp32"), {}
    if device.type != "cpu":
        return "fp32", {}
    # a product too small to hurt tells an emulating CPU apart before a whole model runs on it
    sample = torch.randn(256, 256)
    wide = _best(lambda: sample @ sample)
    half = sample.bfloat16()
    if _best(lambda: half @ half) > 2 * wide:
        return "fp32", {}
    seconds = {
        precision: _best(lambda precision=precision: _pass(task, model, batch, device, precision))
        for precision in ("fp32", "bf16")
    }
    return ("bf16" if seconds["bf16"] < _CLEAR_WIN * seconds["fp32"] else "fp32"), seconds


def _pass(task: Task, model: nn.Module, batch: Batch, device: torch.device, precision: str) -> None:
    with autocast(device, precision):
        loss = task.loss(model, batch)
    torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def _best(call: Any, repeats: int = 3) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
