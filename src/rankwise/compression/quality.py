"""How much of a model is left after it was compressed, measured on text or features."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rankwise.compression.calibration import evaluating, run_on


def perplexity(model: nn.Module, windows: Iterable[Int[Tensor, "rows tokens"]]) -> float:
    """exp of the mean −log p of every token but the first of its window, by a causal language model.

    Each window is read alone. The logits are taken in float32, whatever the model computes in.

    Args:
        model: gives ``.logits`` (rows, tokens, vocabulary) for token ids.
        windows: batches of token ids, without padding.

    Raises:
        ValueError: no token to predict.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from torch import nn
        >>> from rankwise.compression import perplexity
        >>> class Clueless(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.bias = nn.Parameter(torch.zeros(10))
        ...     def forward(self, ids):
        ...         return SimpleNamespace(logits=self.bias.expand(*ids.shape, 10))
        >>> round(perplexity(Clueless(), [torch.zeros(2, 5, dtype=torch.long)]), 4)
        10.0
    """
    total, count = 0.0, 0
    with evaluating(model):
        for ids in windows:
            if ids.shape[-1] < 2:
                continue
            logits = run_on(model, ids).logits[:, :-1].float()
            targets = ids[:, 1:].to(logits.device)
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            count += targets.numel()
    if count == 0:
        raise ValueError("the text has no window of at least two tokens; give more text")
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf


class Agreement(NamedTuple):
    """How alike two models' features are: 1 and 1 where they are the same.

    Attributes:
        cosine: mean over rows of the cosine between the two feature vectors.
        kernel_alignment: cosine between the two centred kernels XXᵀ: whether the same rows are alike, whatever the basis.
    """

    cosine: float
    kernel_alignment: float


def agreement(before: Float[Tensor, "rows d"], after: Float[Tensor, "rows d"]) -> Agreement:
    """Mean cosine and centred kernel alignment of the features of the same rows by two models.

    Args:
        before, after: a feature vector a row.

    Raises:
        ValueError: fewer than two rows, or other shapes than each other's.

    Source: centred kernel alignment as in Kornblith et al. 2019, eq. 3, linear kernel.

    Example:
        >>> import torch
        >>> from rankwise.compression import agreement
        >>> X = torch.eye(3)
        >>> found = agreement(X, X.roll(1, 1))  # other axes, same distances
        >>> round(found.cosine, 4), round(found.kernel_alignment, 4)
        (0.0, 1.0)
    """
    if before.shape != after.shape or before.ndim != 2 or len(before) < 2:
        raise ValueError(
            f"expected two tables of features with the same two or more rows, got {tuple(before.shape)} and {tuple(after.shape)}"
        )
    X, Y = before.double(), after.double()
    cosine = float(nn.functional.cosine_similarity(X, Y, dim=1).mean())
    X, Y = X - X.mean(0), Y - Y.mean(0)
    norms = float(torch.linalg.norm(X.mT @ X) * torch.linalg.norm(Y.mT @ Y))
    # features that are the same in every row have no kernel to compare
    return Agreement(cosine, float((X.mT @ Y).square().sum()) / norms if norms else math.nan)
