"""Deep LoRA on the families of models that people adapt, each with the ways its layers differ: fused, transposed, latent.

One small model of each from a config, in float64: what is computed has to agree to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rankwise.adapters import DeepLoraConfig, initialize_deeplora_weights, save_as_lora
from rankwise.testing.adapter_contract import deeplora_layers, disturbed
from tests.tiny_models import token_batch

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
EXPERTS = {**LLAMA, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "pad_token_id": 0}


def text() -> dict[str, Tensor]:
    return token_batch(labels="tokens")


def classes() -> dict[str, Tensor]:
    return token_batch()


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 16, 16).double(), "labels": torch.arange(3) % 2}


def sounds() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 8, 40).double(), "labels": text()["labels"][:2]}


def translation() -> dict[str, Tensor]:
    return {**token_batch(), "labels": text()["labels"]}


@dataclass(frozen=True)
class Family:
    """A model of a kind: class and config by their names in transformers, its settings, and layers it must adapt."""

    model: str
    config: str
    settings: dict[str, Any]
    layers: set[str]
    batch: Callable[[], dict[str, Tensor]] = text
    dropouts: dict[str, float] = field(default_factory=dict)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.settings, **self.dropouts)
        model = getattr(transformers, self.model)(config).double().eval()
        model.set_experts_implementation("eager")  # the grouped kernels know no float64
        return model

    def data(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return self.batch()


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0},
        {"c_attn", "c_proj", "c_fc"},
    ),
    "gpt-neox": Family(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {**SMALL, "intermediate_size": 48, "bos_token_id": 0, "eos_token_id": 0},
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    ),
    "phi-3": Family(
        "Phi3ForCausalLM", "Phi3Config", {**LLAMA, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
        {"qkv_proj", "gate_up_proj", "o_proj", "down_proj"},
    ),
    "bloom": Family(
        "BloomForCausalLM", "BloomConfig", {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    ),
    "falcon": Family(
        "FalconForCausalLM", "FalconConfig", {**SMALL, "bos_token_id": 0, "eos_token_id": 0},
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    ),
    "deepseek-v3": Family(
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {
            **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "kv_lora_rank": 12,
            "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
        },
        {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "mixtral": Family(
        "MixtralForCausalLM", "MixtralConfig", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
        {"q_proj", "k_proj", "v_proj", "o_proj"},
    ),
    "qwen2-moe": Family(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
        {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "olmoe": Family(
        "OlmoeForCausalLM", "OlmoeConfig", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
        {"q_proj", "k_proj", "v_proj", "o_proj"},
    ),
    "t5": Family(
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        {"q", "k", "v", "o", "wi", "wo"}, translation, {"dropout_rate": 0.0},
    ),
    "bert": Family(
        "BertForSequenceClassification", "BertConfig", {**SMALL, "intermediate_size": 48, "max_position_embeddings": 64},
        {"query", "key", "value", "dense"}, classes,
    ),
    "vit": Family(
        "ViTForImageClassification", "ViTConfig",
        {**SMALL, "intermediate_size": 48, "image_size": 16, "patch_size": 8},
        {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}, pictures,
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration", "WhisperConfig",
        {
            "vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
            "max_source_positions": 20, "max_target_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, sounds,
    ),
}  # fmt: skip


def adapted(family: Family, **settings: Any) -> PeftModel:
    config = DeepLoraConfig(**{"r": 4, "target_modules": "all-linear", "direction_dropout": 0.0, **settings})
    return get_peft_model(family.build(), config).eval()


@torch.no_grad()
def logits(model: nn.Module, family: Family) -> Tensor:
    return model(**family.data()).logits


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def test_the_fused_and_latent_layers_are_among_all_linear(family: Family) -> None:
    found = {name.split(".")[-1] for name in deeplora_layers(adapted(family))}
    assert found >= family.layers
    assert not found & {"lm_head", "embed_out", "proj_out", "classifier", "gate", "shared_expert_gate"}


def test_placing_by_the_gradient_is_a_no_op(family: Family) -> None:
    base = logits(family.build(), family)
    model = adapted(family, variant="compressed")
    assert torch.equal(logits(model, family), base)
    summary = initialize_deeplora_weights(model, [family.data()])
    assert torch.equal(logits(model, family), base)
    assert not summary.without_gradient
    assert all(0 < layer.captured <= 1 for layer in summary.layers)


def test_one_step_reaches_every_layer(family: Family) -> None:
    model = adapted(family).train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(**family.data()).loss.backward()
    optimizer.step()
    for name, layer in deeplora_layers(model).items():
        assert layer.get_delta_weight("default").any(), name


def test_merged_and_exported_it_computes_the_same(family: Family, tmp_path: Path) -> None:
    model = disturbed(adapted(family))
    wanted = logits(model, family)
    assert not torch.allclose(wanted, logits(family.build(), family))
    save_as_lora(model, tmp_path / "lora")
    exported = PeftModel.from_pretrained(family.build(), tmp_path / "lora").eval()
    for same in (exported, model.merge_and_unload()):
        torch.testing.assert_close(logits(same, family), wanted, rtol=1e-9, atol=1e-9)


# -- experts that are linear layers ---------------------------------------------------------------------------------


class Experts(nn.Module):
    """Four linear experts, of which each row goes to the one that its first entry names; ``send`` is how it gets there."""

    def __init__(self, send: str):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(12, 10) for _ in range(4))
        self.send = send

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0].long() % 4
        if self.send == "everything, weighted by zero":
            weights = nn.functional.one_hot(chosen, 4).to(x)
            return sum(weights[:, n, None] * expert(x) for n, expert in enumerate(self.experts))
        result = x.new_zeros(len(x), 10)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == number)
            if len(rows) or self.send == "rows, none too":
                result = result.index_add(0, rows, expert(x[rows]))
        return result


def rows_for(*experts: int) -> dict[str, Tensor]:
    x = torch.randn(24, 12, generator=torch.Generator().manual_seed(sum(experts))).double()
    x[:, 0] = torch.tensor(experts).repeat(24)[:24]
    return {"x": x}


@pytest.mark.parametrize("send", ["rows, if any", "rows, none too", "everything, weighted by zero"])
@pytest.mark.parametrize("variant", ["compressed", "spectral"])
def test_an_expert_without_tokens_starts_at_random_and_is_named(send: str, variant: str) -> None:
    torch.manual_seed(0)
    base = Experts(send).double()
    config = DeepLoraConfig(r=4, variant=variant, target_modules=r"experts\.\d", direction_dropout=0.0)
    model = get_peft_model(base, config)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).square().mean()

    summary = initialize_deeplora_weights(model, [rows_for(0, 1, 2)], loss_fn=loss)
    assert summary.without_gradient == ["experts.3"]
    assert [line.split()[0] for line in str(summary).splitlines() if line.endswith("random")] == ["experts.3"]
    assert 0 < summary.captured <= 1
    assert [row.gradient_norm > 0 and 0 < row.captured <= 1 for row in summary.layers] == [True, True, True, False]
    for layer in deeplora_layers(model).values():
        left = layer.deeplora_left["default"].weight
        torch.testing.assert_close(left.mT @ left, torch.eye(4).double(), atol=1e-6, rtol=0)
    batch = rows_for(0, 1, 2, 3)
    assert torch.equal(model(batch["x"]), base(batch["x"]))

    later = initialize_deeplora_weights(model, [rows_for(0, 1, 2), rows_for(3)], loss_fn=loss, num_batches=2)
    assert not later.without_gradient
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    for name, layer in deeplora_layers(model).items():
        assert layer.get_delta_weight("default").any(), name


def test_a_trained_head_of_several_layers_comes_back_when_merged() -> None:
    """RoBERTa's: PEFT's own way back looks for its one weight."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        **SMALL, intermediate_size=48, max_position_embeddings=64, hidden_dropout_prob=0.0, pad_token_id=0
    )
    model = transformers.RobertaForSequenceClassification(config).double().eval()
    adapted = get_peft_model(model, DeepLoraConfig(r=4, task_type="SEQ_CLS")).eval()
    with torch.no_grad():
        disturbed(adapted)
        for name, parameter in adapted.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = adapted(**classes()).logits
        merged = adapted.merge_and_unload()
        assert not deeplora_layers(merged)
        torch.testing.assert_close(merged(**classes()).logits, expected, rtol=1e-9, atol=1e-9)
