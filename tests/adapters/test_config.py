"""What the settings accept, what they refuse, and which layers they choose."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from rankwise.adapters import DeepLoraConfig, DeepLoraPeftType
from rankwise.testing.adapter_contract import deeplora_layers, disturbed
from tests.tiny_models import Mlp, tiny_bert, tiny_gpt2, token_batch


def layer_names(model: nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name in deeplora_layers(model)}


def adapted(model: nn.Module, **settings: Any) -> PeftModel:
    return get_peft_model(model, DeepLoraConfig(**{"r": 4, **settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be"),
        ({"r": -1}, "r must be"),
        ({"r": 2.5}, "r must be"),
        ({"rank_pattern": {"lin0": 0}}, "lin0 must be"),
        ({"inner_depth": 0}, "inner_depth"),
        ({"inner_depth": 1.5}, "inner_depth"),
        ({"init_scale": 0.0}, "init_scale"),
        ({"init_scale": -1e-3}, "init_scale"),
        ({"init_scale": float("nan")}, "init_scale"),
        ({"init_scale": float("inf")}, "init_scale"),
        ({"variant": "pissa"}, "compressed, spectral, random"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"direction_dropout": 1.0}, "direction_dropout"),
        ({"direction_dropout": float("nan")}, "direction_dropout"),
        ({"bias": "lora_only"}, "deeplora_only"),
        ({"format_version": 3}, "upgrade rankwise"),
        ({"target_modules": "lin.*", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": ["lin0"], "layers_pattern": "layer"}, "layers_to_transform"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepLoraConfig(**settings)


def test_round_trip_through_json(tmp_path: Path) -> None:
    config = DeepLoraConfig(
        r=6, inner_depth=2, init_scale=0.01, variant="spectral", target_modules=["lin1", "lin0"],
        exclude_modules=["head"], rank_pattern={"lin1": 3}, modules_to_save=["head"], bias="deeplora_only",
        dropout=0.1, direction_dropout=0.2, task_type="SEQ_CLS",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is DeepLoraConfig
    assert loaded.peft_type == DeepLoraPeftType.DEEPLORA
    assert loaded.to_dict() | {"inference_mode": False} == config.to_dict() | {"inference_mode": False}


def test_a_newer_format_is_refused_on_loading(tmp_path: Path) -> None:
    DeepLoraConfig(target_modules=["lin0"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 99}))
    with pytest.raises(ValueError, match="format 99"):
        PeftConfig.from_pretrained(tmp_path)


def test_an_adapter_of_the_first_format_trains_on_without_direction_dropout(tmp_path: Path) -> None:
    DeepLoraConfig(variant="compressed", target_modules=["lin0"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    old = json.loads(file.read_text()) | {"format_version": 1}
    del old["direction_dropout"]
    file.write_text(json.dumps(old))
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, DeepLoraConfig)
    assert loaded.direction_dropout == 0
    assert loaded.variant == "compressed"


@pytest.mark.parametrize("pattern", [{"lin1": 2}, {"^lin1": 2}, {".*1": 2}], ids=str)
def test_rank_pattern_sets_single_widths(pattern: dict[str, int]) -> None:
    model = adapted(Mlp(), target_modules=["lin0", "lin1"], rank_pattern=pattern)
    widths = {name: layer.r["default"] for name, layer in deeplora_layers(model).items()}
    assert widths == {"base_model.model.lin0": 4, "base_model.model.lin1": 2}


def test_layers_to_transform() -> None:
    names = layer_names(adapted(tiny_bert(), target_modules=["query", "value"], layers_to_transform=[1]))
    assert names == {f"bert.encoder.layer.1.attention.self.{x}" for x in ("query", "value")}


@pytest.mark.parametrize("excluded", [["lin1"], r"lin1", r".*1"], ids=str)
@pytest.mark.parametrize("targets", ["all-linear", None, "lin.*", ["lin0", "lin1"]], ids=str)
def test_exclude_modules(targets: Any, excluded: Any) -> None:
    assert "lin1" not in layer_names(adapted(Mlp(d_out=24), target_modules=targets, exclude_modules=excluded))


@pytest.mark.parametrize("targets", ["all-linear", None], ids=str)
def test_all_linear_leaves_out_the_narrow_layers(targets: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """lin0 is 20 → 24, lin1 24 → 24, the head 24 → 4: at r = 4 the head's smaller side is not above r."""
    with caplog.at_level(logging.INFO, logger="rankwise"):
        model = adapted(Mlp(), target_modules=targets)
    assert layer_names(model) == {"lin0", "lin1"}
    assert any("head" in record.getMessage() for record in caplog.records)
    assert layer_names(adapted(Mlp(), r=3, target_modules=targets)) == {"lin0", "lin1", "head"}


def test_all_linear_goes_by_the_width_of_each_layer() -> None:
    assert layer_names(adapted(Mlp(), rank_pattern={"lin1": 24})) == {"lin0"}
    assert layer_names(adapted(Mlp(), rank_pattern={"head": 2})) == {"lin0", "lin1", "head"}


def test_all_linear_leaves_out_only_the_narrow_layer_itself() -> None:
    """A narrow ``head`` must not take the wide ``decoder.head`` with it, whose name ends the same way."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(16, 16)
            self.decoder = nn.ModuleDict({"head": nn.Linear(16, 16)})
            self.head = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.decoder["head"](self.body(x)))

    assert layer_names(adapted(Two(), target_modules="all-linear")) == {"body", "decoder.head"}


def test_all_linear_twice_on_one_model() -> None:
    model = adapted(Mlp(), target_modules="all-linear")
    model.add_adapter("second", DeepLoraConfig(r=2, target_modules="all-linear"))
    assert {n for n, layer in deeplora_layers(model).items() if "second" in layer.r} >= {
        "base_model.model.lin0", "base_model.model.lin1",
    }  # fmt: skip


def test_too_large_a_width_is_clamped_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rankwise"):
        model = adapted(Mlp(), r=8, target_modules=["lin0", "head"])
    widths = {name: layer.r["default"] for name, layer in deeplora_layers(model).items()}
    assert widths == {"base_model.model.lin0": 8, "base_model.model.head": 4}
    (record,) = (r for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith("rankwise"))
    assert "head" in record.getMessage()
    assert "clamped to 4" in record.getMessage()


def test_a_clamped_adapter_loads_again(tmp_path: Path) -> None:
    model = adapted(Mlp(), r=8, target_modules=["lin0", "head"], init_weights=False)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    base = Mlp()
    base.load_state_dict({k.replace(".base_layer", ""): v for k, v in model.get_base_model().state_dict().items()
                          if "deeplora" not in k})  # fmt: skip
    x = torch.randn(3, 20)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), model.eval()(x))


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (nn.LayerNorm(8), r"linear layers, embeddings and convolutions; layer is a LayerNorm.*exclude_modules"),
        (nn.Embedding(9, 8, max_norm=1.0), "max_norm.*would not be shortened"),
        (nn.Conv2d(8, 8, 3, groups=8), "convolution of 8 groups.*exclude_modules"),
        (nn.LazyConv2d(8, 3), "LazyConv2d, which may do more than convolve"),
        (nn.ConvTranspose2d(8, 8, 3), "ConvTranspose2d"),
    ],
    ids=["norm", "max-norm", "groups", "subclass", "transposed"],
)
def test_other_kinds_of_layer_are_refused(layer: nn.Module, says: str) -> None:
    model = nn.Module()
    model.layer = layer
    with pytest.raises(TypeError, match=says):
        adapted(model, target_modules=["layer"], r=2)


def test_layers_that_work_like_linear_ones_are_in_all_linear() -> None:
    model = adapted(tiny_gpt2(bos_token_id=0, eos_token_id=0), task_type="CAUSAL_LM", r=4)
    assert {name.split(".")[-1] for name in layer_names(model)} == {"c_attn", "c_proj", "c_fc"}
    assert model.peft_config["default"].fan_in_fan_out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attention(x, x, x)[0])


def test_out_proj_of_multihead_attention() -> None:
    with pytest.raises(TypeError, match="MultiheadAttention"):
        adapted(Attention(), target_modules=["out_proj"])
    assert layer_names(adapted(Attention(), target_modules="all-linear")) == {"out"}


def test_quantized_weights_are_refused() -> None:
    model = Mlp()
    model.lin0.weight = nn.Parameter(torch.zeros(24, 20, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="quantized"):
        adapted(model, target_modules=["lin0"])


@pytest.mark.parametrize("modules", [["head"], None], ids=str)
def test_modules_to_save_are_trained_and_saved(tmp_path: Path, modules: list[str] | None) -> None:
    torch.manual_seed(0)
    model = adapted(Mlp(), target_modules=["lin0"], modules_to_save=modules)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "deeplora" not in name}
    assert {name.rsplit(".", 1)[-1] for name in trainable} == ({"weight", "bias"} if modules else set())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trainable:
                parameter.add_(1.0)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    x = torch.randn(3, 20)
    torch.manual_seed(0)
    assert torch.equal(PeftModel.from_pretrained(Mlp(), tmp_path)(x), model.eval()(x))


@pytest.mark.parametrize(("bias", "trained"), [("none", set()), ("deeplora_only", {"lin0"}), ("all", {"lin0", "head"})])
def test_trained_biases_are_saved_and_loaded(tmp_path: Path, bias: str, trained: set[str]) -> None:
    torch.manual_seed(0)
    model = adapted(Mlp(), target_modules=["lin0", "lin1"], bias=bias)
    biases = {name: p for name, p in model.named_parameters() if name.endswith(".bias") and p.requires_grad}
    assert {name.removeprefix("base_model.model.").split(".")[0] for name in biases} == trained
    with torch.no_grad():
        for parameter in biases.values():
            parameter.add_(torch.randn(parameter.shape))
    x = torch.randn(3, 20)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    assert torch.equal(PeftModel.from_pretrained(Mlp(), tmp_path)(x), model.eval()(x))


def test_fan_in_fan_out_does_not_corrupt_an_ordinary_layer() -> None:
    """nn.Linear stores (out, in): the layer decides; PEFT's LoRA falls back to False here."""
    torch.manual_seed(0)
    model = adapted(Mlp(24, 24), target_modules=["lin1"], fan_in_fan_out=True, init_weights=False).eval()
    x = torch.randn(3, 24)
    unmerged = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), unmerged)


def two_adapters() -> Any:
    model = adapted(tiny_bert(), task_type="SEQ_CLS")
    model.add_adapter("second", DeepLoraConfig(r=2, task_type="SEQ_CLS"))
    for seed, name in enumerate(("default", "second")):
        disturbed(model, name, seed=seed)
    return model.eval()


@torch.no_grad()
def test_a_batch_may_mix_adapters_row_by_row() -> None:
    model = two_adapters()
    batch = token_batch()
    alone = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = model(**batch).logits
    with model.disable_adapter():
        alone["__base__"] = model(**batch).logits
    names = ["second", "__base__", "default", "second"]
    mixed = model(**batch, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row])
    torch.testing.assert_close(model(**batch).logits, alone["second"])  # the hooks are gone


@torch.no_grad()
def test_generation_may_mix_adapters_with_beams() -> None:
    model = adapted(tiny_gpt2(bos_token_id=0, eos_token_id=0, pad_token_id=0), task_type="CAUSAL_LM")
    model.add_adapter("second", DeepLoraConfig(r=2, task_type="CAUSAL_LM"))
    for seed, name in enumerate(("default", "second")):
        disturbed(model, name, seed=seed, scale=1.0)
    model.eval()
    ids = torch.randint(1, 99, (3, 5), generator=torch.Generator().manual_seed(0))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    alone = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = model.generate(input_ids=ids, **options)
    names = ["second", "default", "second"]
    mixed = model.generate(input_ids=ids, adapter_names=names, **options)
    for row, name in enumerate(names):
        assert mixed[row].tolist() == alone[name][row].tolist()


def test_mixing_mistakes_are_named() -> None:
    model = two_adapters()
    with pytest.raises(ValueError, match="no adapter named 'third'; this model has default, second"):
        model(**token_batch(), adapter_names=["default", "third", "second", "default"])
    with pytest.raises(ValueError, match="one name for each of the 4 rows"):
        model(**token_batch(), adapter_names=["default"])
    with pytest.raises(ValueError, match=r"call model\.eval"):
        model.train()(**token_batch(), adapter_names=["default"] * 4)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(**token_batch(), adapter_names=["default"] * 4)
