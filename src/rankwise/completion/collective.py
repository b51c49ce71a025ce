"""What processes that hold different rows of one matrix tell each other; alone, all of it does nothing."""

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Numbers = TypeVar("Numbers", bool, int, float, NDArray[Any])


class Collective:
    """One process that holds every row.

    With several (:class:`TorchCollective`) each call is made by all of them, in the same order.
    """

    rank = 0
    size = 1

    def total(self, part: Numbers) -> Numbers:
        """The sum of everybody's ``part``, the same bits for everybody."""
        return part

    def agreed(self, value: Numbers) -> Numbers:
        """The first process's ``value``: what decides where to go must not differ in the last bit."""
        return value

    def stacked(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Everybody's rows, one process's after the other's."""
        return rows

    def parts(self, thing: Any) -> list[Any]:
        """Everybody's ``thing``, small ones."""
        return [thing]

    def exchanged(self, things: NDArray[Any], counts: NDArray[np.int64]) -> NDArray[Any]:
        """What the others have for this process: ``counts[r]`` of everybody's ``things`` are for process r, in order."""
        return things


ALONE = Collective()


class TorchCollective(Collective):
    """Processes of the default group of ``torch.distributed``; any backend that works on CPU tensors, such as gloo."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def total(self, part: Numbers) -> Numbers:
        import torch
        import torch.distributed as dist

        summed = torch.from_numpy(np.array(part, order="C"))
        dist.all_reduce(summed)
        return summed.numpy() if isinstance(part, np.ndarray) else type(part)(summed.item())

    def agreed(self, value: Numbers) -> Numbers:
        import torch
        import torch.distributed as dist

        told = torch.from_numpy(np.array(value, order="C"))
        dist.broadcast(told, 0)
        return told.numpy() if isinstance(value, np.ndarray) else type(value)(told.item())

    def stacked(self, rows: NDArray[Any]) -> NDArray[Any]:
        import torch
        import torch.distributed as dist

        counts = self.parts(len(rows))
        longest = np.zeros((max(counts), *rows.shape[1:]), rows.dtype)
        longest[: len(rows)] = rows
        everyone = [torch.from_numpy(np.empty_like(longest)) for _ in range(self.size)]
        dist.all_gather(everyone, torch.from_numpy(longest))
        return np.concatenate([part.numpy()[:count] for part, count in zip(everyone, counts, strict=True)])

    def parts(self, thing: Any) -> list[Any]:
        import torch.distributed as dist

        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, thing)
        return everyone

    def exchanged(self, things: NDArray[Any], counts: NDArray[np.int64]) -> NDArray[Any]:
        import torch
        import torch.distributed as dist

        coming = torch.empty(self.size, dtype=torch.int64)
        dist.all_to_all_single(coming, torch.from_numpy(counts.astype(np.int64)))
        got = torch.from_numpy(np.empty(int(coming.sum()), things.dtype))
        dist.all_to_all_single(got, torch.from_numpy(np.ascontiguousarray(things)), coming.tolist(), counts.tolist())
        return got.numpy()


def this_collective() -> Collective:
    """All processes of the default group of ``torch.distributed``, or this one alone where there is none."""
    import torch.distributed as dist

    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return TorchCollective() if several else ALONE
