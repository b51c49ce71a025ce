"""Several rows in one sequence of a causal language model: less padding, the same loss."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rankwise.errors import UserError
from rankwise.finetuning.batching import Batch

IGNORED = -100  # what transformers' losses leave out
_LOOSE = 1e-3  # of the largest logit; rows that saw each other differ by far more, rounding by far less


def first_fit_decreasing(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which items share a bin of size ``room``: the longest first, each into the first bin where it fits.

    At most 11/9 of the fewest possible bins, and one more (Johnson, 1973).

    Example:
        >>> from rankwise.finetuning.packing import first_fit_decreasing
        >>> first_fit_decreasing([3, 7, 2, 5], room=10)
        [[1, 0], [3, 2]]
    """
    bins: list[list[int]] = []
    left: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        fits = next((number for number, free in enumerate(left) if free >= lengths[item]), None)
        if fits is None:
            fits = len(bins)
            bins.append([])
            left.append(room)
        bins[fits].append(item)
        left[fits] -= lengths[item]
    return bins


def fewest_slots(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Bins of at most ``room`` that leave the least padding: Σ over bins of the fullest bin.

    A wide bin that the last rows leave half empty costs more than two narrow ones, and attention costs its square:
    first-fit decreasing is tried at the width that each number of bins would need at least.

    Example:
        >>> from rankwise.finetuning.packing import fewest_slots
        >>> fewest_slots([5, 5, 5], room=10)
        [[0], [1], [2]]
    """
    longest, total = max(lengths), sum(lengths)
    widths = {min(room, max(longest, -(-total // count))) for count in range(1, len(lengths) + 1)}

    def slots(bins: list[list[int]]) -> int:
        return len(bins) * max(sum(lengths[item] for item in members) for members in bins)

    return min((first_fit_decreasing(lengths, width) for width in sorted(widths)), key=slots)


def pack(rows: Sequence[tuple[list[int], list[int]]], room: int, padding: int) -> Batch:
    """Prompts and completions, each at most ``room`` tokens together, in sequences of at most ``room``.

    Returns:
        ``input_ids``, ``position_ids`` (from 0 in every row), ``labels`` (−100 on prompts) and ``packed_rows`` (the row of
        each token, −1 for padding), each (S, tokens). There is no mask: transformers keeps attention inside each row where
        positions start anew.
    """
    bins = fewest_slots([len(prompt) + len(completion) for prompt, completion in rows], room)
    tokens = max(sum(len(part) for row in members for part in rows[row]) for members in bins)
    batch = {
        "input_ids": torch.full((len(bins), tokens), padding),
        "position_ids": torch.zeros(len(bins), tokens, dtype=torch.long),
        "labels": torch.full((len(bins), tokens), IGNORED),
        "packed_rows": torch.full((len(bins), tokens), -1),
    }
    for sequence, members in enumerate(bins):
        begin = 0
        for row in members:
            prompt, completion = rows[row]
            end = begin + len(prompt) + len(completion)
            batch["input_ids"][sequence, begin:end] = torch.tensor([*prompt, *completion])
            batch["position_ids"][sequence, begin:end] = torch.arange(end - begin)
            batch["labels"][sequence, begin + len(prompt) : end] = torch.tensor(completion)
            batch["packed_rows"][sequence, begin:end] = row
            begin = end
        batch["position_ids"][sequence, begin:] = torch.arange(tokens - begin)
    return batch


def packed_inputs(batch: Batch) -> dict[str, Any]:
    """What the model is given of a packed batch.

    A row's first token has no token before it that could say it, and must not be learnt from the row before. Without
    ``use_cache=False`` transformers (5) makes a cache and then takes the sequence for one row.
    """
    labels = batch["labels"].masked_fill(batch["position_ids"] == 0, IGNORED)
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "labels": labels,
        "use_cache": False,
    }


def packed_prompts(batch: Batch) -> list[list[int]]:
    """The prompt of every row, in the order of the rows."""
    rows, prompts = batch["packed_rows"], batch["labels"] == IGNORED
    count = int(rows.max()) + 1
    return [batch["input_ids"][(rows == row) & prompts].tolist() for row in range(count)]


def require_packable(model: nn.Module) -> None:
    """Try whether a packed sequence gives what its rows give one by one.

    Raises:
        UserError: this model lets packed rows see each other.
    """
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    draw = torch.Generator().manual_seed(0)
    where = next(model.parameters()).device
    rows = [torch.randint(vocabulary, (length,), generator=draw).tolist() for length in (5, 3, 4)]
    batch = {key: value.to(where) for key, value in pack([([], row) for row in rows], 12, 0).items()}
    inputs = packed_inputs(batch)
    del inputs["labels"]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            together = model(**inputs).logits
            for row, ids in enumerate(rows):
                alone = model(input_ids=torch.tensor([ids], device=where)).logits[0]
                found = together[batch["packed_rows"] == row]
                if float((found - alone).abs().max()) > _LOOSE * float(alone.abs().max()):
                    raise UserError(
                        f"packing does not work with {type(model).__name__}: rows packed into one sequence see each other "
                        "there; leave packing off"
                    )
    finally:
        model.train(was_training)
