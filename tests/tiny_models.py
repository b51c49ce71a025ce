"""Transformers built from a config in milliseconds: real architectures, no download."""

from typing import Any

import torch
from torch import nn


def tiny_bert(num_labels: int = 2, **changes: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, num_labels=num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        **changes,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def tiny_llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tiny_gpt2(**changes: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=2, **changes))


class Mlp(nn.Module):
    """Two linear layers and a head, for everything that needs no transformer."""

    def __init__(self, d_in: int = 20, hidden: int = 24, d_out: int = 4):
        super().__init__()
        self.lin0 = nn.Linear(d_in, hidden)
        self.lin1 = nn.Linear(hidden, hidden, bias=False)
        self.head = nn.Linear(hidden, d_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.lin1(torch.tanh(self.lin0(x)))))


def token_batch(rows: int = 4, tokens: int = 7, *, labels: str = "class") -> dict[str, torch.Tensor]:
    """Random tokens with labels for a classifier ("class") or a causal LM ("tokens")."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 99, (rows, tokens), generator=generator)
    target = ids.clone() if labels == "tokens" else torch.arange(rows) % 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": target}
