"""A matrix whose rows are spread over processes, on one machine or several: what ``torchrun`` starts."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rankwise.completion.collective import Collective, this_collective
from rankwise.completion.observations import Observations, checked_coordinates
from rankwise.errors import UserError


def shard_rows(
    rows: ArrayLike, columns: ArrayLike, values: ArrayLike, shape: tuple[int, int], dtype: Any = np.float64
) -> Observations:
    """This process's consecutive rows of a matrix of which every process has some entries.

    Called by all processes of the default group of ``torch.distributed``. Each gives whatever entries it has read; they
    are sent to the process that gets their row, rows being cut so that all get about as many entries. What comes back
    goes into :meth:`DeepMatrixCompletion.fit`, again on all processes, and each ends with the whole model. Alone, it is
    :meth:`Observations.from_coordinates`. The rows should be the longer side: what a process keeps for all columns, k²
    numbers each, is not spread, and one process alone would begin from the longer side.

    Args:
        rows: (nnz,) of the entries that this process has, 0 … m − 1 of the whole matrix.
        columns: (nnz,).
        values: (nnz,).
        shape: (m, n) of the whole matrix.
        dtype: float32 or float64.

    Raises:
        UserError: on all processes, if any gave something unusable, or if fewer rows have entries than there are
            processes.

    Example:
        Started by ``torchrun --nproc-per-node 2``:

        >>> from rankwise.completion import DeepMatrixCompletion, shard_rows
        >>> seen = shard_rows([0, 1, 1, 2], [0, 0, 1, 1], [1.0, 2.0, 3.0, 4.0], (3, 2))
        >>> DeepMatrixCompletion().fit(seen).left_.shape[0]
        3
    """
    together = this_collective()
    row, column, value, shape = _checked_everywhere(together, rows, columns, values, shape, dtype)
    cuts = row_cuts(together.total(np.bincount(row, minlength=shape[0])), together.size)
    owner = np.searchsorted(cuts[1:-1], row, side="right")
    order = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=together.size)
    row, column, value = (together.exchanged(part[order], counts) for part in (row, column, value))
    first, end = int(cuts[together.rank]), int(cuts[together.rank + 1])
    mine = Observations.from_coordinates(row - first, column, value, (end - first, shape[1]), dtype)
    return mine if together.size == 1 else mine.shared(together, first)


def _checked_everywhere(
    together: Collective, rows: ArrayLike, columns: ArrayLike, values: ArrayLike, shape: tuple[int, int], dtype: Any
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.floating], tuple[int, int]]:
    """A mistake of one process is an error of all: the others would wait for it for ever."""
    try:
        checked = checked_coordinates(rows, columns, values, shape, dtype)
    except UserError as error:
        together.parts((str(error), None))
        raise
    told = together.parts((None, (checked[3], str(np.dtype(dtype)))))
    for rank, (mistake, _) in enumerate(told):
        if mistake is not None:
            raise UserError(f"process {rank}: {mistake}")
    kinds = {kind for _, kind in told}
    if len(kinds) > 1:
        raise UserError(f"every process must give the same shape and dtype, got {sorted(kinds)}")
    return checked


def row_cuts(counts: NDArray[np.integer], processes: int) -> NDArray[np.int64]:
    """(processes + 1,) where each process's rows begin; about equally many entries each."""
    upto = np.cumsum(counts)
    if not upto[-1]:
        raise UserError("no entry is observed: there is nothing to learn from")
    seen = np.flatnonzero(counts)
    if len(seen) < processes:
        raise UserError(
            f"the entries cannot be cut by rows into {processes} parts: only {len(seen)} rows have any; start fewer "
            "processes, or pass the transposed matrix"
        )
    wanted = upto[-1] * np.arange(1, processes) / processes
    # after the n-th row with entries, n from what is wanted but leaving at least one for every process
    after = np.searchsorted(upto[seen], wanted) + 1
    for process in range(1, processes):
        least = after[process - 2] + 1 if process > 1 else 1
        after[process - 1] = min(max(after[process - 1], least), len(seen) - processes + process)
    return np.concatenate([[0], seen[after - 1] + 1, [len(counts)]]).astype(np.int64)
