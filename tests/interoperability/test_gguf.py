"""A GGUF file read back with llama.cpp's own reader, against what each adapted layer does to its input."""

import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D

from rankwise.adapters import DeepLoraConfig
from rankwise.adapters.gguf import save_as_gguf
from rankwise.testing.adapter_contract import deeplora_layers, disturbed
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Setting `save_embedding_layers`")

_SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_FEED_FORWARD = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_SEPARATE = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", **_FEED_FORWARD,
}  # fmt: skip
_FUSED = {
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
_GPT2 = {
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
# class → what general.architecture says, and llama.cpp's names of the layers of a block
FAMILIES: dict[str, tuple[str, dict[str, str]]] = {
    "LlamaForCausalLM": ("llama", _SEPARATE),
    "MistralForCausalLM": ("llama", _SEPARATE),
    "Qwen2ForCausalLM": ("qwen2", _SEPARATE),
    "Qwen3ForCausalLM": ("qwen3", _SEPARATE),
    "GemmaForCausalLM": ("gemma", _SEPARATE),
    "Gemma2ForCausalLM": ("gemma2", _SEPARATE),
    "Gemma3ForCausalLM": ("gemma3", _SEPARATE),
    "Phi3ForCausalLM": ("phi3", _FUSED),
    "GPT2LMHeadModel": ("gpt2", _GPT2),
}


def causal_lm(family: str) -> nn.Module:
    if family == "GPT2LMHeadModel":
        return tiny_gpt2().eval()
    torch.manual_seed(0)
    model = getattr(transformers, family)
    return model(model.config_class(**_SIZES)).eval()


def trained(model: nn.Module, **settings: Any) -> nn.Module:
    """Adapted and away from its start, in float64, so that the oracle's rounding does not count."""
    config = DeepLoraConfig(**{"r": 4, "init_scale": 0.5, **settings})
    return disturbed(get_peft_model(model.double(), config)).eval()


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], set[str]]:
    """Metadata, tensors in torch's order of axes, and the types they are stored in."""
    reader = gguf.GGUFReader(path)
    tensors = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    return (
        {key: field.contents() for key, field in reader.fields.items()},
        tensors,
        {tensor.tensor_type.name for tensor in reader.tensors},
    )


def updates(path: Path) -> dict[str, Tensor]:
    """What the loader adds to each tensor: α over the pair's own rank, times B·A."""
    metadata, tensors, _ = read(path)
    names = {name.rpartition(".")[0] for name in tensors}
    found = {}
    for name in names:
        A, B = tensors[f"{name}.lora_a"].double(), tensors[f"{name}.lora_b"].double()
        if name == "token_embd.weight":
            A = A.mT
        found[name] = metadata["adapter.lora.alpha"] / B.shape[1] * B @ A
    return found


@torch.no_grad()
def effect(layer: nn.Module) -> Tensor:
    """ΔW (outputs × inputs) of an adapted linear layer, from what it adds to the unit vectors."""
    base = layer.get_base_layer()
    inputs = base.weight.shape[0] if isinstance(base, Conv1D) else base.weight.shape[1]
    unit = torch.eye(inputs, dtype=base.weight.dtype)
    return (layer(unit) - base(unit)).mT


def interleaved(update: Tensor, heads: int) -> Tensor:
    """Each head's first half of rows on the even places, its second half on the odd ones."""
    half = update.shape[0] // heads // 2
    rows = torch.empty_like(update)
    for head in range(heads):
        for i in range(half):
            rows[2 * (head * half + i)] = update[2 * head * half + i]
            rows[2 * (head * half + i) + 1] = update[2 * head * half + half + i]
    return rows


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= 8 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_every_known_family(tmp_path: Path, family: str) -> None:
    architecture, names = FAMILIES[family]
    model = trained(causal_lm(family))
    layers = deeplora_layers(model)
    save_as_gguf(model, tmp_path / "adapter.gguf")
    found = updates(tmp_path / "adapter.gguf")
    assert read(tmp_path / "adapter.gguf")[0]["general.architecture"] == architecture
    assert len(found) == len(layers) == 2 * len(names)
    for name, layer in layers.items():
        block = 1 if ".1." in name else 0
        (leaf,) = [leaf for leaf in names if name.endswith(leaf)]
        wanted = effect(layer)
        if architecture == "llama" and names[leaf] in ("attn_q", "attn_k"):
            wanted = interleaved(wanted, heads=4 if names[leaf] == "attn_q" else 2)
        close(found[f"blk.{block}.{names[leaf]}.weight"], wanted)


def test_llamas_rotation_of_neighbours_makes_of_the_file_what_transformers_makes_of_the_layer(tmp_path: Path) -> None:
    """The reason for the order of the rows: scores of queries and keys at other positions stay the same."""
    model = trained(tiny_llama())
    attention = model.base_model.model.model.layers[1].self_attn
    save_as_gguf(model, tmp_path / "adapter.gguf")
    found = updates(tmp_path / "adapter.gguf")
    tokens, d = 5, 8
    x = torch.randn(tokens, 32, dtype=torch.float64)
    q, k = (
        (x @ effect(layer).mT).view(1, tokens, -1, d).transpose(1, 2) for layer in (attention.q_proj, attention.k_proj)
    )
    angles = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    halves = torch.cat((angles, angles), -1).double()[None]
    q, k = apply_rotary_pos_emb(q, k, halves.cos(), halves.sin())
    wanted = q @ k.repeat_interleave(2, 1).mT

    def turned(name: str) -> Tensor:
        rows = (x @ found[f"blk.1.{name}.weight"].mT).view(tokens, -1, d).transpose(0, 1)
        return torch.view_as_real(torch.view_as_complex(rows.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(2)

    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)
    scores = turned("attn_q") @ turned("attn_k").repeat_interleave(2, 0).mT
    torch.testing.assert_close(scores[None], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_metadata_is_what_the_loader_asks_for(tmp_path: Path) -> None:
    model = trained(tiny_llama(), rank_pattern={"q_proj": 1, "down_proj": 3})
    summary = save_as_gguf(model, tmp_path / "adapter.gguf")
    metadata, tensors, types = read(tmp_path / "adapter.gguf")
    assert metadata["general.type"] == "adapter"
    assert metadata["adapter.type"] == "lora"
    assert metadata["adapter.lora.alpha"] == 4.0
    assert metadata["rankwise.format_version"] == "1"
    assert types == {"F32"}
    assert tensors["blk.0.attn_q.weight.lora_a"].shape == (1, 32)
    assert tensors["blk.0.attn_q.weight.lora_b"].shape == (32, 1)
    assert tensors["blk.1.ffn_down.weight.lora_a"].shape == (3, 48)
    assert summary.path == tmp_path / "adapter.gguf"
    assert summary.bytes_after == sum(value.nbytes for value in tensors.values())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.gguf"]


def test_one_alpha_serves_layers_of_different_rank(tmp_path: Path) -> None:
    model = trained(tiny_llama(), rank_pattern={"v_proj": 1, "down_proj": 3})
    save_as_gguf(model, tmp_path / "adapter.gguf")
    found, block = updates(tmp_path / "adapter.gguf"), model.base_model.model.model.layers[0]
    close(found["blk.0.attn_v.weight"], effect(block.self_attn.v_proj))
    close(found["blk.0.ffn_down.weight"], effect(block.mlp.down_proj))
    close(found["blk.0.ffn_up.weight"], effect(block.mlp.up_proj))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 3}}], ids=str)
def test_a_plain_lora_folder_needs_only_the_configuration_of_its_base(tmp_path: Path, options: dict[str, Any]) -> None:
    base = tiny_llama().double()
    base.config.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=6, lora_alpha=11, target_modules=["v_proj", "up_proj"], rank_pattern={"up_proj": 2}, init_lora_weights=False,
        **options,
    )  # fmt: skip
    lora = get_peft_model(base, config)
    lora.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    lora.save_pretrained(tmp_path / "lora")
    save_as_gguf(tmp_path / "lora", tmp_path / "adapter.gguf")
    found = updates(tmp_path / "adapter.gguf")
    for block, layer in enumerate(lora.base_model.model.model.layers):
        close(found[f"blk.{block}.attn_v.weight"], effect(layer.self_attn.v_proj))
        close(found[f"blk.{block}.ffn_up.weight"], effect(layer.mlp.up_proj))


def test_a_saved_deep_lora_gives_the_file_that_the_model_gives(tmp_path: Path) -> None:
    model = trained(tiny_llama())
    model.save_pretrained(tmp_path / "deep")
    save_as_gguf(model, tmp_path / "one.gguf")
    save_as_gguf(tmp_path / "deep", tmp_path / "two.gguf", base=model.config)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_embedding_and_output_layer_of_an_untied_model(tmp_path: Path) -> None:
    model = trained(tiny_llama(), target_modules=["embed_tokens", "lm_head"])
    save_as_gguf(model, tmp_path / "adapter.gguf")
    found, (_, tensors, _) = updates(tmp_path / "adapter.gguf"), read(tmp_path / "adapter.gguf")
    close(found["output.weight"], effect(model.base_model.model.lm_head))
    words = model.base_model.model.model.embed_tokens
    ids = torch.arange(99)
    with torch.no_grad():
        close(found["token_embd.weight"], (words(ids) - words.get_base_layer()(ids)).mT)
    # rows of A are looked up by token, so its first axis is the vocabulary: (tokens, r) and not (r, tokens)
    assert tensors["token_embd.weight.lora_a"].shape == (99, 4)
    assert tensors["token_embd.weight.lora_b"].shape == (32, 4)


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_a_shared_embedding_is_refused(tmp_path: Path, layer: str) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = trained(base, target_modules=[layer])
    with pytest.raises(ValueError, match=rf"{layer} shares its weight.*exclude_modules"):
        save_as_gguf(model, tmp_path / "adapter.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")], ids=str)
def test_half_precision(tmp_path: Path, dtype: torch.dtype, stored: str) -> None:
    model = trained(tiny_gpt2())
    full, half = (save_as_gguf(model, tmp_path / f"{d}.gguf", dtype=d) for d in (torch.float32, dtype))
    assert read(tmp_path / f"{dtype}.gguf")[2] == {stored}
    assert 2 * half.bytes_after == full.bytes_after
    wanted = updates(tmp_path / "torch.float32.gguf")
    for name, update in updates(tmp_path / f"{dtype}.gguf").items():
        close(update, wanted[name], dtype)


def test_ranks_are_cut_to_the_best_approximation(tmp_path: Path) -> None:
    model = trained(tiny_gpt2(), target_modules=["c_fc"])
    save_as_gguf(model, tmp_path / "adapter.gguf", rank=2)
    found = updates(tmp_path / "adapter.gguf")
    for block, name in enumerate(sorted(deeplora_layers(model))):
        U, S, Vh = torch.linalg.svd(effect(deeplora_layers(model)[name]), full_matrices=False)
        close(found[f"blk.{block}.ffn_up.weight"], (U[:, :2] * S[:2]) @ Vh[:2])


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    model = trained(tiny_bert(), target_modules=["query"])
    with pytest.raises(ValueError, match=r"gemma, .*not of bert.*convert_lora_to_gguf\.py"):
        save_as_gguf(model, tmp_path / "adapter.gguf")


def test_trained_parts_beside_the_update_are_refused(tmp_path: Path) -> None:
    model = trained(tiny_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"also holds base_model\.model\.lm_head\.weight.*merge"):
        save_as_gguf(model, tmp_path / "adapter.gguf")


class WithAdapterHead(nn.Module):
    """A layer that the base architecture has not."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama()
        self.config = self.model.config
        self.value_head = nn.Linear(32, 16)

    def forward(self, **batch: Any) -> Tensor:
        return self.value_head(self.model(**batch).logits)


@pytest.mark.parametrize(
    ("base", "layer"), [(WithAdapterHead, "value_head"), (tiny_gpt2, "wpe")], ids=["head", "positions"]
)
def test_a_layer_that_llama_cpp_would_not_adapt_is_refused(tmp_path: Path, base: Any, layer: str) -> None:
    model = trained(base(), target_modules=[layer])
    with pytest.raises(ValueError, match=rf"adds no update to .*{layer}; leave.*exclude_modules"):
        save_as_gguf(model, tmp_path / "adapter.gguf")
    assert not list(tmp_path.iterdir())


def test_one_of_several_adapters_is_saved_by_its_name(tmp_path: Path) -> None:
    model = trained(tiny_llama(), target_modules=["v_proj"])
    model.add_adapter("other", DeepLoraConfig(r=2, init_scale=0.5, target_modules=["v_proj"]))
    disturbed(model, "other", seed=2)
    save_as_gguf(model, tmp_path / "adapter.gguf", adapter_name="other")
    model.set_adapter("other")
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    close(updates(tmp_path / "adapter.gguf")["blk.0.attn_v.weight"], effect(layer))


def test_another_models_configuration_is_refused(tmp_path: Path) -> None:
    model = trained(tiny_llama())
    other = transformers.LlamaConfig(
        **{**_SIZES, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
    )
    with pytest.raises(ValueError, match=r"_proj has \d+ outputs, which are no 3 heads.*base="):
        save_as_gguf(model, tmp_path / "adapter.gguf", base=other)
    assert not list(tmp_path.iterdir())


def test_what_the_user_must_give(tmp_path: Path) -> None:
    model = trained(tiny_llama(), target_modules=["v_proj"])
    model.save_pretrained(tmp_path / "deep")
    target = tmp_path / "adapter.gguf"
    with pytest.raises(ValueError, match=r"does not say what its base model is.*base="):
        save_as_gguf(tmp_path / "deep", target)
    with pytest.raises(ValueError, match="cannot read the configuration of the base model"):
        save_as_gguf(tmp_path / "deep", target, base=tmp_path)
    with pytest.raises(ValueError, match=r"torch\.float16.*got torch\.float64"):
        save_as_gguf(model, target, dtype=torch.float64)
    with pytest.raises(ValueError, match="at most one of rank, energy and tol"):
        save_as_gguf(model, target, rank=2, tol=0.1)
    assert not target.exists()
    target.write_text("somebody's")
    with pytest.raises(ValueError, match="exists; choose another name"):
        save_as_gguf(model, target)
    assert target.read_text() == "somebody's"


def test_without_the_package_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'rankwise\[gguf\]'"):
        save_as_gguf(trained(tiny_llama()), tmp_path / "adapter.gguf")
