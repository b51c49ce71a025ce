"""What is saved comes back as it was; what is damaged or foreign is refused in a sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rankwise.compression import factorize_key_value, factorize_model, factorize_query, load_factorized, save_factorized
from tests.tiny_models import Mlp, tiny_bert, tiny_gpt2, tiny_llama, token_batch

BUILDERS: dict[str, Any] = {
    "bert": (tiny_bert, "class"),
    "llama": (tiny_llama, "tokens"),
    "tied llama": (lambda: tiny_llama(tie_word_embeddings=True), "tokens"),
    "gpt2": (tiny_gpt2, "tokens"),
}


def same_state(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("own_save", [False, True])
def test_a_transformers_model_comes_back_through_save_pretrained(name, own_save, tmp_path):
    build, labels = BUILDERS[name]
    model, batch = build().eval(), token_batch(labels=labels)
    factorize_model(model, 0.6)
    if own_save:
        save_factorized(model, tmp_path / "model")
    else:
        model.save_pretrained(tmp_path / "model")
    loaded = load_factorized(tmp_path / "model")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert same_state(model, loaded)
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    loaded.save_pretrained(tmp_path / "again")  # and once more from what was loaded
    assert same_state(model, load_factorized(tmp_path / "again"))


def test_shared_latents_are_stored_once_and_shared_again(tmp_path):
    model = tiny_llama().eval()
    factorize_query(model, 5)
    factorize_key_value(model, 6)
    model.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == sum(p.numel() for p in model.parameters())
    loaded = load_factorized(tmp_path / "model")
    for layer in loaded.model.layers:
        assert layer.self_attn.k_proj.right is layer.self_attn.v_proj.right
    batch = token_batch(labels="tokens")
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)


def test_options_reach_from_pretrained(tmp_path):
    model = tiny_bert()
    factorize_model(model, 0.5)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    loaded = load_factorized(tmp_path / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert same_state(model.bfloat16(), loaded)


class WithBuffers(nn.Module):
    """A convolution, a normalization with buffers and one layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.first = nn.Linear(16, 16)
        self.again = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(torch.relu(self.first(self.norm(self.conv(x)).mean((2, 3)))))


def test_any_other_model_comes_back_into_a_dense_one(tmp_path):
    torch.manual_seed(0)
    model = WithBuffers()
    x = torch.randn(4, 3, 8, 8)
    model(x)  # moves the statistics
    factorize_model(model.eval(), ranks=3)
    save_factorized(model, tmp_path / "model")
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["factorization.json", "model.safetensors"]
    torch.manual_seed(1)
    loaded = load_factorized(tmp_path / "model", WithBuffers())
    assert same_state(model, loaded)
    assert loaded.first is loaded.again
    assert torch.equal(model(x), loaded(x))


class OwnAttention(nn.Module):
    """Projections of the usual names in a model that is not from transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))


def test_a_shared_latent_of_any_other_model_is_stored_once_and_shared_again(tmp_path):
    model, x = OwnAttention(), torch.randn(2, 5, 32)
    factorize_key_value(model, 6)
    save_factorized(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == sum(p.numel() for p in model.parameters())
    loaded = load_factorized(tmp_path / "model", OwnAttention())
    assert loaded.k_proj.right is loaded.v_proj.right
    assert torch.equal(model(x), loaded(x))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers model in ``bert``, another in ``mlp``."""
    folder = tmp_path_factory.mktemp("saved")
    for name, model in (("bert", tiny_bert()), ("mlp", Mlp())):
        factorize_model(model, ranks=3)
        save_factorized(model, folder / name)
    tiny_bert().save_pretrained(folder / "dense")
    return folder


# name of the folder, of the file that lists the layers, of one of these
FOLDERS = [("bert", "config.json", "bert.pooler.dense"), ("mlp", "factorization.json", "lin0")]


def load(folder: Path) -> nn.Module:
    return load_factorized(folder, Mlp() if folder.name == "mlp" else None)


def listed(content: dict[str, Any]) -> dict[str, Any]:
    return content.get("rankwise", content)


@pytest.mark.parametrize(("name", "file", "layer"), FOLDERS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda layers, layer: layers[layer].pop("rank"), "is damaged: its low_rank_layers"),
        (lambda layers, layer: layers[layer].update(rank="3"), "is damaged: its low_rank_layers"),
        (lambda layers, layer: layers[layer].update(right_of="x"), "is damaged: its low_rank_layers"),
        (lambda layers, layer: layers[layer].update(right_of=layer), "is damaged: its low_rank_layers"),
        (lambda layers, layer: layers[layer].update(right_of=[1]), "is damaged: its low_rank_layers"),
        (lambda layers, layer: layers.update({layer: []}), "is damaged: its low_rank_layers"),
        (lambda layers, layer: layers[layer].update(rank=4), r"in another shape .*\(\(\d+, 3\) instead of"),
        (lambda layers, layer: layers[layer].update(rank=10**6), "must be a whole number from 1"),
        (lambda layers, layer: layers.pop(layer), "lack"),
        (lambda layers, layer: layers.update(nowhere={"rank": 1}), "has no layer nowhere"),
    ],
)
def test_a_list_of_layers_that_does_not_fit_is_refused(name, file, layer, change, says, saved, tmp_path):
    folder = Path(shutil.copytree(saved / name, tmp_path / name))
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    change(listed(content)["low_rank_layers"], layer)
    (folder / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        load(folder)


@pytest.mark.parametrize(("name", "file", "layer"), FOLDERS)
def test_damaged_files_and_those_of_another_version_are_refused(name, file, layer, saved, tmp_path):
    folder = Path(shutil.copytree(saved / name, tmp_path / name))
    text, weights = (folder / file).read_text(encoding="utf-8"), (folder / "model.safetensors").read_bytes()
    content = json.loads(text)
    listed(content)["format_version"] = 99
    for damaged, says in (
        (json.dumps(content), "format_version 99; this rankwise reads 1"),
        (text[: len(text) // 2], "is not valid JSON"),
        ("[]", "lists no low-rank layers"),
    ):
        (folder / file).write_text(damaged, encoding="utf-8")
        with pytest.raises(ValueError, match=says):
            load(folder)
    (folder / file).write_text(text, encoding="utf-8")
    (folder / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ValueError, match=r"not a readable safetensors file|cannot load the model"):
        load(folder)
    (folder / "model.safetensors").write_bytes(weights)
    tensors = load_file(folder / "model.safetensors")
    for changed, says in (
        ({**tensors, "stray": torch.zeros(1)}, "have, unlike the model, stray"),
        ({key: value for key, value in tensors.items() if not key.startswith(f"{layer}.left")}, rf"lack {layer}.left"),
    ):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=says):
            load(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": 5}, "names the architectures 5, of which transformers has no model"),
        ({"architectures": ["BertConfig"]}, "of which transformers has no model"),
        ({"model_type": []}, "cannot load the model in"),
        ({"hidden_size": "x"}, "expected int, got str"),
        ({"num_hidden_layers": 3}, "lack bert.encoder.layer.2"),
        ({"hidden_size": 64}, r"in another shape .* instead of \(64,\)"),
    ],
)
def test_a_config_that_does_not_fit_the_tensors_is_refused(change, says, saved, tmp_path):
    folder = Path(shutil.copytree(saved / "bert", tmp_path / "bert"))
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**content, **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        load_factorized(folder)


def test_a_model_that_a_folder_does_not_fit_keeps_its_layers(saved):
    model = Mlp(hidden=30)
    before, state = list(model.modules()), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="in another shape"):
        load_factorized(saved / "mlp", model)
    assert list(model.modules()) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_an_adapter_is_not_saved_in_the_place_of_the_model(tmp_path):
    from peft import LoraConfig

    model: Any = tiny_llama()
    factorize_model(model, 0.5, include=["mlp"])
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="if it holds an adapter, merge that first"):
        save_factorized(model, tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_the_wrong_kind_of_folder_or_model_is_refused(saved, tmp_path):
    for folder, model, options, says in (
        (saved / "dense", None, {}, "lists no low-rank layers"),
        (tmp_path, None, {}, "neither config.json nor factorization.json"),
        (saved / "bert", Mlp(), {}, "leave model out"),
        (saved / "mlp", None, {}, "pass a dense one"),
        (saved / "mlp", tiny_bert(), {}, "has no layer"),
        (saved / "mlp", Mlp(), {"dtype": torch.float32}, "go with a transformers model"),
        (saved / "bert", None, {"no_such_option": 1}, "cannot load the model in .* 'no_such_option'"),
    ):
        with pytest.raises(ValueError, match=says):
            load_factorized(folder, model, **options)


def test_nothing_is_overwritten_and_a_dense_model_is_not_saved_here(saved, tmp_path):
    with pytest.raises(ValueError, match="no low-rank layer"):
        save_factorized(Mlp(), tmp_path / "new")
    model = Mlp()
    factorize_model(model, ranks=3)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"cannot make the folder .*file/x"):
        save_factorized(model, tmp_path / "file" / "x")
    before = (saved / "mlp" / "factorization.json").read_bytes()
    with pytest.raises(ValueError, match="not empty"):
        save_factorized(model, saved / "mlp")
    assert (saved / "mlp" / "factorization.json").read_bytes() == before
    assert not (tmp_path / "new").exists()
