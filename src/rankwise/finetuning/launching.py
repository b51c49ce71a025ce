"""One command on one GPU, on several, or on none: the command starts itself again, once for each process."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

import torch

from rankwise.errors import Interrupted


def is_launched() -> bool:
    """Whether a launcher started this process: ours, ``torchrun`` or ``accelerate launch``."""
    return "WORLD_SIZE" in os.environ


def usual_processes(batch_size: int, accumulate: int) -> int:
    """One for each GPU of this machine, but so many that a step's rows can be shared out evenly; 1 without GPUs.

    Example:
        >>> from rankwise.finetuning.launching import largest_even_share
        >>> largest_even_share(16, 6)
        4
    """
    return largest_even_share(max(1, batch_size // accumulate), torch.cuda.device_count())


def largest_even_share(rows: int, most: int) -> int:
    """The largest divisor of ``rows`` that is at most ``most``, at least 1."""
    return max((count for count in range(1, min(rows, most) + 1) if rows % count == 0), default=1)


def run_on_processes(arguments: Sequence[str], count: int) -> int:
    """Run ``rankwise`` with these arguments in ``count`` processes of this machine, by torch's launcher.

    Returns:
        0, or the exit code of the process that failed first, which has said why.

    Raises:
        Interrupted: a signal ended a process, which could not say anything.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes speak for themselves
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "rankwise", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        raise Interrupted(
            f"process {failure.local_rank} of {count} was ended by {failure.signal_name()}; what the run had written is "
            "whole. If it had begun to train, go on with the same command and --resume"
        ) from None
    except SignalException as error:
        raise Interrupted(
            f"stopped by {signal.Signals(error.sigval).name}; go on with --resume and the same --out"
        ) from None
    return 0
