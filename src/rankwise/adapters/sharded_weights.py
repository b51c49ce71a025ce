"""Weights that are spread over processes, read and written whole; without any, nothing here costs anything.

DeepSpeed's ZeRO-3 leaves an empty tensor in the place of a parameter, with its shape in ``ds_shape``, and fills it inside
``deepspeed.zero.GatheredParameters``. FSDP2 makes it a DTensor. The ZeRO-3 side is written after DeepSpeed's documentation
and tested against a stand-in (tests/adapters/test_sharded_weights.py), never against DeepSpeed itself.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter, wherever its numbers are."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(parameters: Iterable[Tensor], *, writing: bool = False) -> Iterator[None]:
    """The parameters whole inside the block, on every process, which all have to enter it.

    Args:
        parameters: any; those that ZeRO-3 has not taken apart are left alone.
        writing: what the first process wrote into them is everybody's afterwards. Otherwise changes are lost.
    """
    apart = list({id(p): p for p in parameters if _taken_apart(p)}.values())
    if not apart:
        yield
        return
    import deepspeed  # type: ignore[import-not-found]  # there is no such parameter without it

    with deepspeed.zero.GatheredParameters(apart, modifier_rank=0 if writing else None):
        yield


def whole_entries(model: nn.Module, state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """These entries of the model's state dict, whole; all processes have to ask for them in the same order."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: _whole(state[name], parameters.get(name)) for name in names}


def is_first_process() -> bool:
    """Whether this is the process that writes files: the only one, or the first of ``torch.distributed``."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def share_first(parameters: Iterable[Tensor]) -> None:
    """Under ``torch.distributed`` every process gets the first one's numbers; nothing to do for gathered ones."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for parameter in parameters:
        if not _taken_apart(parameter):  # leaving :func:`gathered` has done it
            torch.distributed.broadcast(parameter.data, 0)


def require_writable(name: str, parameter: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a parameter that FSDP holds in pieces.

    Raises:
        ValueError: the message names it.
    """
    if _is_dtensor(parameter) or tuple(full_shape(parameter)) != shape:
        raise ValueError(
            f"the adapter of {name} is sharded already, and nothing can be written into its pieces; initialize it before "
            "fully_shard, FullyShardedDataParallel or accelerator.prepare wraps the model"
        )


def _whole(value: Tensor, parameter: Any) -> Tensor:
    if _is_dtensor(value):
        return value.full_tensor()  # type: ignore[attr-defined]
    if not value.numel() and _taken_apart(parameter):  # else somebody has gathered the state dict already
        with gathered([parameter]):
            return parameter.detach().clone()
    return value


def _taken_apart(parameter: Any) -> bool:
    """Not one that somebody has gathered around us: leaving a second gathering would empty it under his hands."""
    return hasattr(parameter, "ds_id") and not parameter.numel()


def _is_dtensor(value: Any) -> bool:
    return hasattr(value, "full_tensor")  # not isinstance: that would import torch.distributed.tensor for everybody
