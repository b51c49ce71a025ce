"""Token ids as a model is calibrated and measured on them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rankwise.compression.calibration import evaluating, run_on


def token_windows(ids: Int[Tensor, " tokens"], length: int, rows: int) -> list[Int[Tensor, "rows length"]]:
    """A text's tokens cut into windows of this length, this many a batch; the tokens that fill no window are left out.

    Raises:
        ValueError: fewer tokens than one window.

    Example:
        >>> import torch
        >>> from rankwise.compression import token_windows
        >>> [batch.tolist() for batch in token_windows(torch.arange(7), length=2, rows=2)]
        [[[0, 1], [2, 3]], [[4, 5]]]
    """
    count = len(ids) // length
    if count == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than a window of {length}; give more text or a shorter window"
        )
    return list(ids[: count * length].reshape(count, length).split(rows))


def mean_features(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> Float[Tensor, "rows d"]:
    """An encoder's last hidden states, averaged over the tokens that are not padding; one row a text.

    Args:
        model: gives ``.hidden_states``, each (B, tokens, d), when asked for them, as encoders of transformers do.
        batches: of a tokenizer, with "input_ids" and "attention_mask".

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> from rankwise.compression import mean_features
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48))
        >>> ids = torch.ones(3, 5, dtype=torch.long)
        >>> mean_features(model, [{"input_ids": ids, "attention_mask": ids}]).shape
        torch.Size([3, 32])
    """
    rows = []
    with evaluating(model):
        for batch in batches:
            output = run_on(model, {**batch, "output_hidden_states": True})
            hidden = output.hidden_states[-1].float()
            mask = batch["attention_mask"].to(hidden).unsqueeze(-1)
            rows.append(((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu())
    return torch.cat(rows)
