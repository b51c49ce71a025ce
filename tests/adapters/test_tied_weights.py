"""An embedding and an output head with one weight: adapted together or alone, trained in full, exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rankwise.adapters import DeepLoraConfig, create_deeplora_optimizer, initialize_deeplora_weights, save_as_lora
from rankwise.testing.adapter_contract import deeplora_layers, dense_update, disturbed, in_weight_layout
from tests.tiny_models import tiny_gpt2, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`"
)
BUILDS = {
    "gpt2": (lambda: tiny_gpt2(bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), "wte"),
    "llama": (lambda: tiny_llama(tie_word_embeddings=True), "embed_tokens"),
}


@pytest.fixture(params=BUILDS)
def tied(request: pytest.FixtureRequest) -> tuple[Any, str]:
    return BUILDS[request.param]


def plain(build: Any) -> nn.Module:
    model = build().double().eval()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


def adapted(build: Any, targets: list[str], **settings: Any) -> PeftModel:
    config = DeepLoraConfig(**{"r": 4, "target_modules": targets, "task_type": "CAUSAL_LM", **settings})
    return get_peft_model(plain(build), config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(**token_batch(labels="tokens")).logits


@pytest.mark.parametrize("which", ["embedding", "head", "both"])
def test_each_of_the_two_has_its_own_update(tied: tuple[Any, str], which: str) -> None:
    build, embedding = tied
    targets = {"embedding": [embedding], "head": ["lm_head"], "both": [embedding, "lm_head"]}[which]
    model = disturbed(adapted(build, targets))
    oracle = plain(build)
    embed, head = oracle.get_input_embeddings(), oracle.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    assert len(deeplora_layers(model)) == len(targets)
    with torch.no_grad():
        for layer in deeplora_layers(model).values():
            changed = embed if isinstance(layer.base_layer, nn.Embedding) else head
            changed.weight += in_weight_layout(layer, dense_update(layer))
    wanted = logits(oracle)
    torch.testing.assert_close(logits(model), wanted)

    model.merge_adapter()
    torch.testing.assert_close(logits(model), wanted)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), wanted)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted)
    assert merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight
    assert not merged.config.tie_word_embeddings


def test_a_merged_model_is_saved_with_both_weights(tied: tuple[Any, str], tmp_path: Path) -> None:
    build, embedding = tied
    merged = disturbed(adapted(build, [embedding, "lm_head"])).merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(again), logits(merged))


@pytest.mark.parametrize("variant", ["zero-left", "compressed"])
def test_both_are_placed_and_trained_apart(tied: tuple[Any, str], variant: str) -> None:
    build, embedding = tied
    model = adapted(build, [embedding, "lm_head"], variant=variant, init_scale=0.3)
    base = logits(plain(build))
    summary = initialize_deeplora_weights(model, [token_batch(labels="tokens")])
    assert len(summary.layers) == 2
    assert torch.equal(logits(model), base)
    optimizer = create_deeplora_optimizer(model, torch.optim.SGD, lr=0.1, outer_lr_ratio=1.0)
    model(**token_batch(labels="tokens")).loss.backward()
    optimizer.step()
    updates = [layer.get_delta_weight("default") for layer in deeplora_layers(model).values()]
    assert all(update.any() for update in updates)
    assert not torch.allclose(*updates)
    network = model.get_base_model()
    shared = {layer.base_layer.weight.data_ptr() for layer in deeplora_layers(model).values()}
    assert len(shared) == 1, "training the adapters must not untie the base weights"
    assert torch.equal(network.get_input_embeddings().base_layer.weight, plain(build).get_input_embeddings().weight)


def test_the_adapter_of_both_is_saved_loaded_and_exported(tied: tuple[Any, str], tmp_path: Path) -> None:
    build, embedding = tied
    model = disturbed(adapted(build, [embedding, "lm_head"]))
    wanted = logits(model)
    model.save_pretrained(tmp_path / "deep", save_embedding_layers=False)
    save_as_lora(model, tmp_path / "lora")
    for folder in ("deep", "lora"):
        loaded = PeftModel.from_pretrained(plain(build), tmp_path / folder)
        torch.testing.assert_close(logits(loaded), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])  # the names that PEFT knows; either brings the other
def test_ensured_tying_keeps_a_trained_embedding_shared(module: str, tmp_path: Path) -> None:
    build, _ = BUILDS["llama"]
    model = adapted(build, ["q_proj"], modules_to_save=[module], ensure_weight_tying=True).train()
    network = model.get_base_model()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    model(**token_batch(labels="tokens")).loss.backward()
    optimizer.step()
    trained = network.get_input_embeddings().modules_to_save["default"].weight
    assert network.get_output_embeddings().modules_to_save["default"].weight is trained
    assert not torch.allclose(trained, plain(build).get_input_embeddings().weight)
    disturbed(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "deep")
    save_as_lora(model, tmp_path / "lora")
    for folder in ("deep", "lora"):
        loaded = PeftModel.from_pretrained(plain(build), tmp_path / folder)
        torch.testing.assert_close(logits(loaded), wanted, rtol=1e-9, atol=1e-9)
        base = loaded.get_base_model()
        assert (
            base.get_output_embeddings().modules_to_save["default"].weight
            is base.get_input_embeddings().modules_to_save["default"].weight
        )
