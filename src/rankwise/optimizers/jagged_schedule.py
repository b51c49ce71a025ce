"""Schedules that warm up again after every restart."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR

Factor = Callable[[int], float]


def cosine_factor(step: int, *, total_steps: int, warmup_steps: int, least: float) -> float:
    """Of the learning rate at a step, counted from 0: up in a line to 1, then half a cosine down to ``least``."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))


def rewarmup_factor(step: int, *, restart_every: int, rewarmup_steps: int) -> float:
    """1 until the first restart; after each one up in a line from 0 to 1."""
    since = step % restart_every
    return since / rewarmup_steps if step >= restart_every and since < rewarmup_steps else 1.0


def jagged(factor: Factor, *, restart_every: int, rewarmup_steps: int) -> Factor:
    """A schedule that falls to 0 after every ``restart_every`` steps and climbs back to where it would be by then.

    Raises:
        ValueError: fewer than one step between restarts, or a re-warm-up that is longer than that.
    """
    if restart_every < 1:
        raise ValueError(f"restart_every counts optimizer steps and must be at least 1, got {restart_every}")
    if not 0 <= rewarmup_steps < restart_every:
        raise ValueError(
            f"rewarmup_steps must be at least 0 and below restart_every = {restart_every}, got {rewarmup_steps}: the rate "
            "would never be whole again"
        )
    return partial(_product, factor, partial(
        rewarmup_factor, restart_every=restart_every, rewarmup_steps=rewarmup_steps
    ))  # fmt: skip


def jagged_cosine(
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int,
    restart_every: int,
    warmup_steps: int = 0,
    rewarmup_steps: int = 0,
    least: float = 0.1,
) -> LambdaLR:
    """ReLoRA's schedule: one cosine over the whole run, cut to 0 after every restart, with a short linear way back up.

    A restarted adapter has no moments: its first Adam steps would be as long as the rate allows, in whatever direction one
    batch shows. The first step after a restart has rate 0 and only fills the moments. The cosine itself is not restarted.

    Restart where the schedule does: after the optimizer's steps number ``restart_every``, twice that, and so on.

    Args:
        optimizer: whose groups' rates are the highest ones.
        total_steps: optimizer steps of the run.
        restart_every: optimizer steps between two restarts.
        warmup_steps: at the start of the run.
        rewarmup_steps: after every restart.
        least: what the cosine ends at, as a share of the highest rate.

    Raises:
        ValueError: a number out of range.

    Source: Lialin et al. 2023, §3 ("jagged cosine"); there the way up is a line to where the cosine is at its end, here it
    multiplies the cosine. That differs by at most π/8·rewarmup_steps/total_steps of the rate, and goes with any schedule.

    Example:
        >>> import torch
        >>> from rankwise.optimizers.jagged_schedule import jagged_cosine
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule = jagged_cosine(optimizer, total_steps=8, restart_every=4, rewarmup_steps=2, least=0.0)
        >>> rates = []
        >>> for _ in range(8):
        ...     rates.append(round(schedule.get_last_lr()[0], 2))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [1.0, 0.96, 0.85, 0.69, 0.0, 0.15, 0.15, 0.04]
    """
    if total_steps < 1 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"total_steps must be at least 1 and warmup_steps at most that, got {total_steps} and {warmup_steps}"
        )
    if not 0 <= least <= 1:
        raise ValueError(f"least is a share of the rate, from 0 to 1; got {least}")
    cosine = partial(cosine_factor, total_steps=total_steps, warmup_steps=warmup_steps, least=least)
    return LambdaLR(optimizer, jagged(cosine, restart_every=restart_every, rewarmup_steps=rewarmup_steps))


def _product(first: Factor, second: Factor, step: int) -> float:
    return first(step) * second(step)
