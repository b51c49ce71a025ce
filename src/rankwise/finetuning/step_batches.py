"""Which rows an optimizer step sees, cut for the processes and the passes that share it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, Dataset, Sampler

from rankwise.finetuning.tasks import Batch, Task

STEP_WEIGHT = "step_weight"  # of a batch: what its mean loss counts in the step


@dataclass(frozen=True)
class Part:
    """The rows of one forward pass.

    Attributes:
        positions: rows of the task's table.
        weight: what this part's mean loss counts, so that the plain average over the parts of a step (over processes
            and passes) is the mean over the whole step; 1 where a step has one part.
    """

    positions: tuple[int, ...]
    weight: float


class StepBatches(Sampler[list[Part]]):
    """Batches of ``batch_size`` rows a step, shuffled anew every epoch, each cut into ``processes · passes`` parts.

    A step sees the same rows however many processes and passes share it, the last one of an epoch too, which may be
    short: parts are then unequal, or empty, and their weights make up for it.

    Args:
        positions: the training rows.
        batch_size: rows of a step, of all processes and passes together.
        items: how many things a task's mean loss over some rows is the mean of (:meth:`Task.items`).
        seed: of the order.
        passes: forward passes of one process in a step.
        processes, rank: how many share a step, and which of them this is.

    Example:
        >>> from rankwise.finetuning.step_batches import StepBatches
        >>> two = [StepBatches([0, 1, 2, 3, 4], 4, len, seed=0, processes=2, rank=rank) for rank in (0, 1)]
        >>> [[len(part.positions) for [part] in batches] for batches in two]  # 4 rows as 2 + 2, then the last row
        [[2, 1], [2, 1]]
        >>> [part.weight for [part] in two[1]]  # which the second process has only for company
        [1.0, 0.0]
    """

    def __init__(
        self,
        positions: Sequence[int],
        batch_size: int,
        items: Callable[[Sequence[int]], float],
        *,
        seed: int,
        passes: int = 1,
        processes: int = 1,
        rank: int = 0,
    ):
        self.positions, self.batch_size, self.items = list(positions), batch_size, items
        self.passes, self.processes, self.rank = passes, processes, rank
        self._order = SeedableRandomSampler(self.positions, data_seed=seed)

    def set_epoch(self, epoch: int) -> None:
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size) * self.passes

    def __iter__(self) -> Iterator[list[Part]]:
        order = [self.positions[index] for index in self._order]
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            for number in range(self.passes):
                yield [self._part(rows, number * self.processes + self.rank)]

    def _part(self, rows: list[int], number: int) -> Part:
        parts = self.processes * self.passes
        if parts == 1:
            return Part(tuple(rows), 1.0)
        mine = rows[number::parts]
        if not mine:  # every process has to take part in the exchange of gradients
            return Part((rows[0],), 0.0)
        return Part(tuple(mine), self.items(mine) * parts / self.items(rows))


class StepLoader(DataLoader[Any]):
    """Tensors of the parts, with their weight under ``STEP_WEIGHT``."""

    def __init__(self, batches: StepBatches, task: Task):
        def collate(parts: list[Part]) -> Batch:
            [part] = parts
            return {**task.collate(part.positions), STEP_WEIGHT: part.weight}

        super().__init__(_Parts(len(batches.positions)), batch_sampler=batches, collate_fn=collate)
        self._batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer, so that a resumed run goes on in the order of its epoch."""
        self._batches.set_epoch(epoch)


class _Parts(Dataset[Part]):
    """What a DataLoader asks for each member of a batch: our sampler yields the parts themselves."""

    def __init__(self, rows: int):
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, part: Any) -> Part:
        return part
