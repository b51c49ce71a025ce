"""Less padding on a CPU: a batch in parts of similar length."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, Any]
Array = Any  # numpy array of floats or ints

_BESIDES = ("targets", "word_places", "word_counts")  # of a batch: what the model is not given

_CALL = 48  # padding tokens that cost as much as one more call of the model on a CPU


def model_inputs(batch: Batch) -> Batch:
    """What a batch holds for the model: all but targets and what says which word a token is of."""
    return {key: value for key, value in batch.items() if key not in _BESIDES}


def in_parts_of_equal_length(batch: Batch, run: Callable[[Batch], Tensor]) -> Tensor:
    """``run`` on the batch's tokens, on a CPU in parts of similar length, the rows put back in order.

    A batch padded to its longest text is largely padding. Rows of an encoder do not see each other, so the parts give the
    same outputs and the same gradient (dropout draws differ) for less work.
    Right-padded batches only; a GPU gets the batch whole.
    """
    inputs = model_inputs(batch)
    mask = inputs.get("attention_mask")
    if mask is None or mask.device.type != "cpu" or not bool(mask[:, 0].all()):
        return run(inputs)
    lengths = mask.sum(1)
    order = lengths.argsort(stable=True)
    sizes = cheapest_parts(lengths[order].numpy())
    if len(sizes) == 1:
        return run(inputs)
    parts = [
        run({key: value[rows, : int(lengths[rows].max())] for key, value in inputs.items()})
        for rows in order.split(sizes)
    ]
    return torch.cat(parts)[order.argsort()]


def cheapest_parts(lengths: Array, call: int = _CALL) -> list[int]:
    """Sizes of consecutive parts of ascending ``lengths`` for which Σ (rows · longest + call) is smallest.

    Example:
        >>> from rankwise.finetuning.batching import cheapest_parts
        >>> cheapest_parts([10, 11, 90, 100])
        [2, 2]
    """
    lengths = np.asarray(lengths)
    count = len(lengths)
    cost, last = np.zeros(count + 1), np.zeros(count + 1, dtype=int)
    for end in range(1, count + 1):
        options = cost[:end] + (end - np.arange(end)) * lengths[end - 1] + call
        last[end] = options.argmin()
        cost[end] = options[last[end]]
    sizes: list[int] = []
    end = count
    while end:
        sizes.insert(0, int(end - last[end]))
        end = int(last[end])
    return sizes
