"""The processes of a run: this one alone, or as many as ``torchrun`` or ``accelerate launch`` started."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rankwise.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState

_SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}  # what accelerate launch sets


class Processes:
    """What the processes of a run do together; alone, every method is trivial.

    Every process does the same up to the rows of a step and the rows that are scored, which are shared. The first alone
    writes and speaks. Methods are called by all processes, in the same order.
    """

    def __init__(self, state: "PartialState | None" = None):
        self._state = state
        self.count: int = 1 if state is None else state.num_processes
        self.rank: int = 0 if state is None else state.process_index

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Go on only when every process is here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def agreed(self, value: Any) -> Any:
        """The first process's value, on all."""
        if self._state is None:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def together(self, values: Sequence[Any]) -> list[Any]:
        """All processes' values in one list, on all."""
        if self._state is None:
            return list(values)
        from accelerate.utils import gather_object

        return gather_object(list(values))

    def mine(self, values: Sequence[Any]) -> list[Any]:
        """This process's share, every count-th."""
        return list(values[self.rank :: self.count])

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        return flag if self._state is None else any(self.together([flag]))

    def lost_one(self, error: RuntimeError) -> bool:
        """Whether the error says that another process has gone: gloo and NCCL have no common kind of it."""
        return self.count > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower())

    def share_parameters(self, model: nn.Module) -> None:
        """The first process's trainable parameters, on all: what each solved for may differ by rounding."""
        if self._state is None:
            return
        import torch.distributed as dist

        for parameter in model.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, src=0)


ALONE = Processes()


def launched_processes() -> Processes:
    """The processes that ``torchrun`` or ``accelerate launch`` started, this one among them, or this one alone.

    Raises:
        UserError: started with FSDP or DeepSpeed, which ``rankwise finetune`` does not train under.
    """
    for variable, what in _SHARDED.items():
        if os.environ.get(variable, "").lower() == "true":
            raise UserError(
                f"rankwise finetune keeps the whole model in every process and shares the rows; it does not train under "
                f"{what}. Start it by torchrun, or by accelerate launch with a configuration without {what}; for a model "
                "that one device cannot hold write a training script (docs/deep-lora.md)"
            )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from accelerate import PartialState

    return Processes(PartialState(cpu=not torch.cuda.is_available()))  # starts gloo or NCCL


def end_launched() -> None:
    """Leave the other processes in good order, once there is nothing more to do together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def this_device() -> torch.device:
    """This process's GPU where there are any (CUDA, or Apple's), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
