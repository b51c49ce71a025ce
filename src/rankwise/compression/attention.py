"""Queries through a narrow waist, keys and values through one that they share: latent attention, after training.

DeepSeek-V3 makes queries as W^{UQ}·c^Q with c^Q = W^{DQ}x, and keys and values as W^{UK}·c and W^{UV}·c with one latent c = W^{DKV}x.
Here a trained model's own projections are brought into that form: a truncated SVD of W_q, and one of the two stacked,
[W_k; W_v] ≈ [left_k; left_v]·right. The projections keep their names and their calls, so that attention code does not notice.

What DeepSeek-V3 saves by caching c instead of keys and values is not saved by this alone: transformers' caches hold what k_proj
and v_proj give (and the keys after rotation, which DeepSeek-V3 keeps out of the latent). A model class that caches
``k_proj.right``'s output and applies ``left`` of both afterwards would save it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.compression.calibration import MEMORY, Batches, SecondMoments
from rankwise.compression.factorize import Factorization, FactorizedLayer, factorize_model, parameter_bytes
from rankwise.compression.factors import DAMPING, balanced_factors, output_directions, require_damping
from rankwise.compression.layer_list import record_layers, share_right
from rankwise.compression.low_rank_layers import LowRankLinear, require_rank
from rankwise.compression.model_layers import MatrixLayer, layers_of, replace_layer, require_values
from rankwise.compression.rank_profile import LayerProfile, Progress, errors_about

# (query, key, value) as the families of transformers call them
_NAMES = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, OPT, BART, CLIP, …
    ("query", "key", "value"),  # BERT, RoBERTa, ViT, …
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("q", "k", "v"),  # T5
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa
)
_FUSED = ("c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv", "in_proj_weight")


@dataclass(frozen=True)
class Attention:
    """Names of the three projections of one attention module."""

    query: str
    key: str
    value: str


def factorize_query(
    model: nn.Module,
    rank: int,
    *,
    calibration: Batches | None = None,
    damping: float = DAMPING,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Factorization:
    """Every attention module's query projection as a pair of this rank, in place: W_q ≈ left·right.

    Args:
        model: with projections of its own for queries, keys and values, as BERT, Llama, T5 and their kin have.
        rank: k, with k(m + n) < mn.
        calibration, damping, memory, progress: as in :func:`factorize_model`.

    Raises:
        ValueError: no such projections (GPT-2 and others fuse them into one), a rank that makes nothing smaller, and as
            :func:`factorize_model`.

    Source: DeepSeek-V3 (2024, §2.1.1, eq. 6–7), overview §3.3.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from rankwise.compression import factorize_query
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48))
        >>> factorize_query(model, rank=8).ranks
        {'encoder.layer.0.attention.self.query': 8}
    """
    names = [attention.query for attention in _attentions(model)]
    for layer in layers_of(model, include=names).layers:
        _require_paying(rank, *layer.shape, layer.name)
    return factorize_model(
        model, ranks=rank, include=names, calibration=calibration, damping=damping, memory=memory, progress=progress
    )


def factorize_key_value(
    model: nn.Module,
    rank: int,
    *,
    calibration: Batches | None = None,
    damping: float = DAMPING,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Factorization:
    """Keys and values of every attention module from one latent of this rank, in place: [W_k; W_v] ≈ [left_k; left_v]·right.

    The two projections become :class:`LowRankLinear` with one ``right`` parameter between them, stored once. See the head of
    this module for what that saves and what it does not.

    Args:
        model: as for :func:`factorize_query`; grouped heads (fewer keys than queries) as they are.
        rank: k, with k(m_k + m_v + n) < (m_k + m_v)n.
        calibration, damping, memory, progress: as in :func:`factorize_model`.

    Returns:
        One layer for each pair, under the names "…k_proj + …v_proj".

    Raises:
        ValueError: as :func:`factorize_query`.

    Source: DeepSeek-V3 (2024, §2.1.1, eq. 1–5), where the latent has no part in the rotary keys.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from rankwise.compression import factorize_key_value
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48))
        >>> _ = factorize_key_value(model, rank=8)
        >>> attention = model.encoder.layer[0].attention.self
        >>> attention.key.right is attention.value.right, attention.key.right.shape
        (True, torch.Size([8, 32]))
    """
    require_damping(damping)
    attentions = _attentions(model)
    layers = layers_of(model, include=[name for one in attentions for name in (one.key, one.value)])
    require_values(layers.layers)
    by_name = {layer.name: layer for layer in layers.layers}
    pairs = [(by_name[one.key], by_name[one.value]) for one in attentions if {one.key, one.value} <= by_name.keys()]
    if len(pairs) < len(attentions):
        missing = next(name for one in attentions for name in (one.key, one.value) if name not in by_name)
        raise ValueError(f"{missing} cannot be factorized: {layers.skipped.get(missing, 'it is no linear layer')}")
    for key, value in pairs:
        if key.shape[1] != value.shape[1]:
            raise ValueError(
                f"{key.name} and {value.name} take inputs of different sizes, so that they share no latent"
            )
        _require_paying(rank, key.shape[0] + value.shape[0], key.shape[1], f"{key.name} and {value.name} together")
    before = parameter_bytes(model)
    moments = None if calibration is None else SecondMoments(model, [key for key, _ in pairs], calibration, memory)
    outcomes, new, unseen = [], [], []
    for done, (key, value) in enumerate(pairs, 1):
        C = None if moments is None else moments.of(key)
        name = f"{key.name} + {value.name}"
        if moments is not None and C is None:
            unseen.append(name)
        W = torch.cat([key.matrix(), value.matrix()])
        with errors_about(name):
            U, S = output_directions(W, C, damping)
        new.append((key, value, *_sharing_pair(key, value, *balanced_factors(W, U[:, :rank]))))
        shape = (int(W.shape[0]), int(W.shape[1]))
        profile = LayerProfile(name, "linear", shape, S.cpu(), C is not None)
        outcomes.append(FactorizedLayer(name, "linear", shape, rank, profile.relative_error(rank)))
        if progress is not None:
            progress(done, len(pairs))
    for key, value, low_rank_key, low_rank_value in new:
        replace_layer(model, key.places, low_rank_key)
        replace_layer(model, value.places, low_rank_value)
    record_layers(model)
    return Factorization(tuple(outcomes), layers.skipped, tuple(unseen), before, parameter_bytes(model))


def _sharing_pair(key: MatrixLayer, value: MatrixLayer, left: Tensor, right: Tensor) -> tuple[nn.Module, nn.Module]:
    split = key.shape[0]
    low_rank_key = key.from_factors(left[:split], right)
    low_rank_value = value.from_factors(left[split:], right)
    assert isinstance(low_rank_key, LowRankLinear)  # noqa: S101  # for the type checker: projections are linear
    assert isinstance(low_rank_value, LowRankLinear)  # noqa: S101
    share_right(low_rank_value, low_rank_key)
    return low_rank_key, low_rank_value


def _attentions(model: nn.Module) -> list[Attention]:
    """Every module with three linear children of one of the families' names, some of them low-rank already perhaps."""
    found = []
    for place, module in model.named_modules():
        children = dict(module.named_children())
        for names in _NAMES:
            if all(isinstance(children.get(name), nn.Linear | LowRankLinear) for name in names):
                found.append(Attention(*(f"{place}.{name}" if place else name for name in names)))
    if not found:
        fused = sorted(
            {name.rpartition(".")[2] for name, _ in _named_parts(model) if name.rpartition(".")[2] in _FUSED}
        )
        raise ValueError(
            f"this model makes queries, keys and values in one matrix ({', '.join(fused)}), of which no part can be factorized "
            f"alone; factorize_model(model, ranks={{{fused[0]!r}: …}}) takes it as a whole"
            if fused
            else "the model has no attention with linear projections of its own for queries, keys and values "
            f"({'; '.join(', '.join(names) for names in _NAMES)})"
        )
    return found


def _named_parts(model: nn.Module) -> Sequence[tuple[str, object]]:
    return [*model.named_modules(), *model.named_parameters()]


def _require_paying(rank: int, m: int, n: int, name: str) -> None:
    with errors_about(name):
        require_rank(rank, m, n)
    highest = (m * n - 1) // (m + n)
    if rank > highest:
        raise ValueError(f"{name}: rank {rank} makes a {m} × {n} matrix no smaller; the highest that does is {highest}")
