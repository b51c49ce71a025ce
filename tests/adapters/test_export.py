"""Deep LoRA → LoRA: the same update, in a folder that anybody's PEFT loads."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.adapters import DeepLoraConfig, ExportSummary, export_adapter_folder, save_as_lora
from rankwise.testing.adapter_contract import deeplora_layers, disturbed
from tests.tiny_models import Mlp, tiny_bert, token_batch

TARGETS = ["lin0", "lin1"]


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Mlp().to(dtype)


def adapted(model: nn.Module | None = None, **settings: Any) -> PeftModel:
    # frames that are orthonormal on both sides: singular values can be planted
    config = DeepLoraConfig(**{"r": 4, "variant": "random", "target_modules": TARGETS, **settings})
    return get_peft_model(model if model is not None else mlp(), config).eval()


def trained(model: nn.Module | None = None, **settings: Any) -> PeftModel:
    return disturbed(adapted(model, **settings))


@torch.no_grad()
def plant(model: PeftModel, singular_values: dict[str, list[float]]) -> PeftModel:
    """Set each layer's core to diag(s) + ε^L·I, so that its ΔW has exactly these singular values."""
    for name, layer in deeplora_layers(model).items():
        values = torch.zeros(layer.r["default"], dtype=torch.float64)
        wanted = singular_values[name.removeprefix("base_model.model.")]
        values[: len(wanted)] = torch.tensor(wanted, dtype=torch.float64)
        inner = layer.deeplora_inner["default"].weight
        depth, start = inner.shape[0], layer.init_scale["default"] ** inner.shape[0]
        inner.copy_(torch.eye(inner.shape[-1]).expand(depth, -1, -1))
        inner[0].copy_(torch.diag(values + start))
    return model


def deltas(model: nn.Module) -> dict[str, Tensor]:
    """ΔW by layer, of Deep LoRA and LoRA models alike."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "r", {})
    }


def load(path: Path, model: nn.Module | None = None) -> PeftModel:
    return PeftModel.from_pretrained(model if model is not None else mlp(), path)


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("settings", [{}, {"inner_depth": 1}, {"rank_pattern": {"lin1": 3}}], ids=str)
def test_the_update_is_kept(tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    model = trained(mlp(dtype), **settings)
    summary = save_as_lora(model, tmp_path / "lora")
    lora = load(tmp_path / "lora", mlp(dtype))
    assert lora.peft_config["default"].peft_type == peft.PeftType.LORA
    wanted, found = deltas(model), deltas(lora)
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        assert relative_difference(found[name], update) < tolerance, name
    singular_values = {layer.name: torch.tensor(layer.singular_values) for layer in summary.layers}
    for name, update in wanted.items():
        torch.testing.assert_close(
            singular_values[name], torch.linalg.svdvals(update)[: len(singular_values[name])].float()
        )


def test_planted_ranks_are_found(tmp_path: Path) -> None:
    model = plant(adapted(r=6), {"lin0": [3.0, 1.0], "lin1": [2.0, 1.5, 1.0, 0.5]})
    summary = save_as_lora(model, tmp_path / "lora")
    assert {layer.name: (layer.width, layer.rank) for layer in summary.layers} == {"lin0": (6, 2), "lin1": (6, 4)}
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert list(config["rank_pattern"].values()) == list(config["alpha_pattern"].values()) == [2]
    lora = load(tmp_path / "lora")
    for name, update in deltas(model).items():
        assert relative_difference(deltas(lora)[name], update) < 1e-5
    assert {n.rsplit(".", 1)[-1]: m.r["default"] for n, m in lora.named_modules() if hasattr(m, "lora_A")} == {
        "lin0": 2, "lin1": 4,
    }  # fmt: skip
    assert set(lora.base_model.model.lin0.scaling.values()) == {1.0}
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert summary.bytes_after == sum(t.numel() * t.element_size() for t in tensors.values())
    assert summary.bytes_after < summary.bytes_before
    assert "rank 2 to 4" in str(summary)


def test_layers_of_rank_zero_are_left_out(tmp_path: Path) -> None:
    model = plant(adapted(), {"lin0": [1.0], "lin1": []})
    for name, layer in deeplora_layers(model).items():  # exactly zero, not up to rounding
        if name.endswith("lin1"):
            layer.reset_adapter("default")
    summary = save_as_lora(model, tmp_path / "lora")
    assert [layer.rank for layer in summary.layers] == [1, 0]
    keys = load_file(tmp_path / "lora" / "adapter_model.safetensors").keys()
    assert {key.split(".")[2] for key in keys} == {"lin0"}
    x = torch.randn(3, 20)
    torch.testing.assert_close(load(tmp_path / "lora")(x), model(x))


@pytest.mark.parametrize("variant", ["zero-left", "random"])
def test_an_untrained_adapter_exports_as_a_no_op(tmp_path: Path, variant: str) -> None:
    summary = save_as_lora(adapted(variant=variant), tmp_path / "lora")
    assert [layer.rank for layer in summary.layers] == [0, 0]
    x = torch.randn(3, 20)
    assert torch.equal(load(tmp_path / "lora")(x), mlp()(x))
    str(summary)


@pytest.mark.parametrize(
    ("option", "ranks"),
    [
        ({"rank": 1}, {"lin0": 1, "lin1": 1}),
        ({"rank": 3}, {"lin0": 2, "lin1": 3}),
        ({"rank": 99}, {"lin0": 2, "lin1": 4}),
        ({"energy": 0.89}, {"lin0": 1, "lin1": 3}),  # shares 9/10 | 4, 6.25, 7.25 of 7.5
        ({"energy": 1.0}, {"lin0": 2, "lin1": 4}),
        ({"tol": 0.4}, {"lin0": 1, "lin1": 3}),  # 1/3; 2, 1.5, 1 | 0.5
        ({"tol": 0.2}, {"lin0": 2, "lin1": 4}),
    ],
    ids=str,
)
def test_cutoffs(tmp_path: Path, option: dict[str, Any], ranks: dict[str, int]) -> None:
    model = plant(adapted(r=6), {"lin0": [3.0, 1.0], "lin1": [2.0, 1.5, 1.0, 0.5]})
    summary = save_as_lora(model, tmp_path / "lora", **option)
    assert {layer.name: layer.rank for layer in summary.layers} == ranks
    for name, update in deltas(load(tmp_path / "lora")).items():  # Eckart–Young: the best of that rank
        U, S, Vh = torch.linalg.svd(deltas(model)[name])
        k = ranks[name]
        torch.testing.assert_close(update, U[:, :k] * S[:k] @ Vh[:k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2, "energy": 0.9}, {"rank": 2, "tol": 0.1}, {"energy": 0.9, "tol": 0.1}, {"rank": 0},
        {"energy": 0.0}, {"energy": 1.5}, {"tol": 1.0}, {"tol": -0.1}, {"energy": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_bad_cutoffs_are_refused_and_nothing_is_written(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        save_as_lora(trained(), tmp_path / "lora", **options)
    assert not list(tmp_path.iterdir())


def test_half_precision_export(tmp_path: Path) -> None:
    model = trained()
    save_as_lora(model, tmp_path / "lora", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    for name, update in deltas(load(tmp_path / "lora")).items():
        assert relative_difference(update, deltas(model)[name]) < 2 * torch.finfo(torch.bfloat16).eps


def trained_bert(**settings: Any) -> PeftModel:
    model = trained(tiny_bert(), target_modules="all-linear", task_type="SEQ_CLS", **settings)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**token_batch()).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("bias", ["none", "all", "deeplora_only"])
def test_head_task_and_biases_go_along(tmp_path: Path, bias: str) -> None:
    model = trained_bert(bias=bias)
    save_as_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert "classifier" in config["modules_to_save"]
    assert config["bias"] == {"deeplora_only": "lora_only"}.get(bias, bias)
    lora = load(tmp_path / "lora", tiny_bert()).eval()
    head = lora.base_model.model.classifier.modules_to_save["default"]
    wanted = model.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(head.weight, wanted.weight)
    assert torch.equal(head.bias, wanted.bias)
    assert not torch.equal(head.weight, tiny_bert().classifier.weight)
    assert (not torch.equal(
        lora.base_model.model.bert.pooler.dense.base_layer.bias, tiny_bert().bert.pooler.dense.bias
    )) == (bias != "none")  # fmt: skip
    torch.testing.assert_close(lora(**token_batch()).logits, model(**token_batch()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("export", [save_as_lora, lambda model, path: _by_folder(model, path)])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_an_existing_target_is_refused_and_untouched(tmp_path: Path, export: Callable[..., Any], what: str) -> None:
    target = tmp_path / "lora"
    if what == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export(trained(), target)
    assert (target if what == "file" else target / "mine.txt").read_text() == "mine"
    assert not [p for p in tmp_path.iterdir() if p.name not in ("lora", "deep")]


def _by_folder(model: PeftModel, path: Path) -> ExportSummary:
    model.save_pretrained(path.parent / "deep")
    return export_adapter_folder(path.parent / "deep", path)


def test_an_empty_target_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    save_as_lora(trained(), tmp_path / "lora")
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("adapter_name", ["default", "other"])
@pytest.mark.parametrize("build", ["mlp", "bert"])
def test_exporting_the_saved_folder_gives_the_same_files(tmp_path: Path, build: str, adapter_name: str) -> None:
    model = trained_bert() if build == "bert" else trained(modules_to_save=["head"], bias="deeplora_only")
    folder = tmp_path / "deep"
    if adapter_name != "default":
        model.add_adapter("other", DeepLoraConfig(r=2, target_modules=["lin1" if build == "mlp" else "query"]))
        disturbed(model, "other")
        folder = tmp_path / "deep" / "other"  # PEFT gives adapters with other names a folder of their own
    model.save_pretrained(tmp_path / "deep")
    direct = save_as_lora(model, tmp_path / "direct", adapter_name=adapter_name)
    by_folder = export_adapter_folder(folder, tmp_path / "folder")
    assert {layer.name: layer for layer in direct.layers} == {layer.name: layer for layer in by_folder.layers}
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("direct", "folder"))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    one, two = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("direct", "folder"))
    # PEFT fills in auto_mapping while it saves, so only the saved folder has it
    assert {key: value for key, value in one.items() if key != "auto_mapping"} == {
        key: value for key, value in two.items() if key != "auto_mapping"
    }


def _cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _cut_header(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def _no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _bad_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": ')


def _change(**entries: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return change


def _lose_a_factor(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if "lin1.deeplora_inner" not in k}
    save_file(tensors, file)


def _nan(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(v for k, v in tensors.items() if "inner" in k).fill_(float("nan"))
    save_file(tensors, file)


def _wrong_shape(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "inner" in k)
    save_file(tensors | {key: torch.zeros(3, 2, 2)}, file)


def _list_for_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[1, 2]")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (_cut, "cut short"),
    "cut in the header": (_cut_header, "cut short"),
    "no weights": (_no_weights, r"adapter_model\.safetensors"),
    "no config": (_no_config, r"adapter_config\.json"),
    "bad json": (_bad_json, "JSON"),
    "config is a list": (_list_for_config, "only Deep LoRA"),
    "another method": (_change(peft_type="IA3"), "IA3 adapter; only Deep LoRA and LoRA"),
    "said to be lora": (_change(peft_type="LORA"), "holds no LoRA factors"),
    "no method": (_change(peft_type=None), "only Deep LoRA"),
    "newer format": (_change(format_version=9), "upgrade rankwise"),
    "bad init_scale": (_change(init_scale=-1.0), "init_scale"),
    "text for a number": (_change(init_scale="small"), "init_scale must be a number, got 'small'"),
    "factor missing": (_lose_a_factor, "lin1 lacks"),
    "nan": (_nan, "lin0"),
    "shapes do not fit": (_wrong_shape, "lin0|lin1"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_are_refused_with_a_value_error(tmp_path: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    trained().save_pretrained(tmp_path / "deep")
    damage(tmp_path / "deep")
    with pytest.raises(ValueError, match=message):
        export_adapter_folder(tmp_path / "deep", tmp_path / "lora")
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no saved adapter"):
        export_adapter_folder(tmp_path / "nowhere", tmp_path / "lora")


def test_unknown_other_and_merged_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'other'.*default"):
        save_as_lora(trained(), tmp_path / "lora", adapter_name="other")
    with pytest.raises(ValueError, match="no Deep LoRA adapter"):
        save_as_lora(mlp(), tmp_path / "lora")
    with pytest.raises(ValueError, match="no Deep LoRA adapter"):
        save_as_lora(get_peft_model(mlp(), LoraConfig(target_modules=TARGETS)), tmp_path / "lora")
    model = trained()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        save_as_lora(model, tmp_path / "lora")
    assert not list(tmp_path.iterdir())


def test_non_finite_factors_are_refused(tmp_path: Path) -> None:
    for factor in ("deeplora_left", "deeplora_right", "deeplora_inner"):
        model = trained()
        with torch.no_grad():
            getattr(model.base_model.model.lin1, factor)["default"].weight.flatten()[0] = float("nan")
        with pytest.raises(ValueError, match="lin1"):
            save_as_lora(model, tmp_path / "lora")
    assert not list(tmp_path.iterdir())


class Nested(nn.Module):
    """Module paths that end like others: lin ⊂ sub.lin ⊂ deep.sub.lin, and a name with a letter before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(20, 20)
        self.mylin = nn.Linear(20, 20)
        self.sub = nn.ModuleDict({"lin": nn.Linear(20, 20)})
        self.deep = nn.ModuleDict({"sub": nn.ModuleDict({"lin": nn.Linear(20, 20)})})

    def forward(self, x: Tensor) -> Tensor:
        return self.deep["sub"]["lin"](self.sub["lin"](self.mylin(self.lin(x))))


def ranks_of(model: nn.Module) -> dict[str, int]:
    return {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in getattr(module, "r", {})
    }


@pytest.mark.parametrize(
    "ranks",
    [
        {"lin": 1, "mylin": 2, "sub.lin": 3, "deep.sub.lin": 4},
        {"lin": 4, "mylin": 3, "sub.lin": 2, "deep.sub.lin": 1},
        {"lin": 2, "mylin": 4, "sub.lin": 1, "deep.sub.lin": 4},
    ],
    ids=str,
)
def test_names_that_end_alike_keep_their_own_ranks(tmp_path: Path, ranks: dict[str, int]) -> None:
    model = adapted(Nested(), target_modules="all-linear", r=6)
    plant(model, {name: [1.0] * rank for name, rank in ranks.items()})
    save_as_lora(model, tmp_path / "lora")
    lora = load(tmp_path / "lora", Nested())
    assert ranks_of(lora) == ranks
    x = torch.randn(3, 20)
    torch.testing.assert_close(lora(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_layer_left_out_stays_out_though_its_name_ends_like_another(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = adapted(Nested(), target_modules="all-linear")
    plant(model, {"lin": [1.0], "mylin": [1.0], "sub.lin": [1.0], "deep.sub.lin": [1.0]})
    model.base_model.model.deep["sub"]["lin"].reset_adapter("default")
    model.base_model.model.sub["lin"].reset_adapter("default")
    save_as_lora(model, tmp_path / "lora")
    recwarn.clear()
    lora = load(tmp_path / "lora", Nested())
    assert not [str(w.message) for w in recwarn if "missing adapter keys" in str(w.message)]
    assert ranks_of(lora) == {"lin": 1, "mylin": 1}
    x = torch.randn(3, 20)
    torch.testing.assert_close(lora(x), model(x), rtol=1e-4, atol=1e-5)


def test_peft_converts_to_the_same_update(tmp_path: Path) -> None:
    """PEFT's own conversion takes a dense SVD a layer; at full width both must hold the same update."""
    model = trained()
    config, tensors = peft.convert_to_lora(model, rank=4)
    save_as_lora(model, tmp_path / "lora")
    ours = deltas(load(tmp_path / "lora"))
    for name, update in ours.items():
        A, B = (
            next(v for k, v in tensors.items() if f"{name}.lora_{side}" in k and k.endswith("weight")) for side in "AB"
        )
        scale = config.lora_alpha / config.r
        assert relative_difference(update, scale * B @ A) < 1e-5


_LOADER = """
import sys
sys.modules["rankwise"] = None
try:
    import rankwise
except ImportError:
    pass
else:
    raise SystemExit("rankwise can be imported")
import torch
from peft import PeftModel
from transformers import BertForSequenceClassification
folder = sys.argv[1]
saved = torch.load(folder + "/saved.pt")
torch.set_num_threads(1)
for how in ("peft", "transformers"):
    model = BertForSequenceClassification.from_pretrained(folder + "/base").eval()
    if how == "peft":
        model = PeftModel.from_pretrained(model, folder + "/lora").eval()
    else:
        model.load_adapter(folder + "/lora")
    with torch.no_grad():
        logits = model(**saved["batch"]).logits
    worst = (logits - saved["logits"]).abs().max() / saved["logits"].abs().max()
    print(how, float(worst))
    assert worst <= 1e-5, (how, float(worst))
    assert any("lora_A" in name for name, _ in model.named_parameters())
    assert not any("rankwise" in name and module for name, module in sys.modules.items())
"""


@pytest.mark.slow
def test_loads_where_rankwise_is_not_installed(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    model = trained_bert().eval()
    with torch.no_grad():
        torch.save({"batch": token_batch(), "logits": model(**token_batch()).logits}, tmp_path / "saved.pt")
    save_as_lora(model, tmp_path / "lora")
    result = subprocess.run(
        [sys.executable, "-c", _LOADER, str(tmp_path)], capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_transformers_loads_the_export(tmp_path: Path) -> None:
    model = trained_bert().eval()
    save_as_lora(model, tmp_path / "lora")
    plain = tiny_bert().eval()
    plain.load_adapter(str(tmp_path / "lora"))
    with torch.no_grad():
        torch.testing.assert_close(plain(**token_batch()).logits, model(**token_batch()).logits, rtol=1e-5, atol=1e-5)


class Mixed(nn.Module):
    """One layer of every kind that an adapter can stand beside."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 12, padding_idx=3)
        self.lines = nn.Conv1d(12, 10, 3, padding=1, stride=2)
        self.square = nn.Conv2d(1, 6, 3, padding=1)
        self.transposed = Conv1D(8, 6)
        self.head = nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.lines(self.words(ids).mT))
        x = torch.tanh(self.square(x.unsqueeze(1))).mean((2, 3))
        return self.head(torch.tanh(self.transposed(x)))


def mixed(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Mixed().to(dtype)


@pytest.mark.parametrize("from_folder", [False, True])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # of PEFT's LoRA, whose layers differ
def test_every_kind_of_layer_keeps_its_update(tmp_path: Path, from_folder: bool) -> None:
    model = trained(mixed(), target_modules=["words", "lines", "square", "transposed"])
    if from_folder:
        model.save_pretrained(tmp_path / "deep")
        export_adapter_folder(tmp_path / "deep", tmp_path / "lora")
    else:
        save_as_lora(model, tmp_path / "lora")
    lora = load(tmp_path / "lora", mixed()).eval()
    wanted, found = deltas(model), deltas(lora)
    assert wanted.keys() == found.keys() == {"words", "lines", "square", "transposed"}
    for name, delta in wanted.items():
        assert relative_difference(found[name].reshape(delta.shape), delta) < 1e-10, name
    ids = torch.randint(0, 40, (5, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(lora(ids), model(ids))


def test_a_convolution_that_lora_would_get_wrong_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, dilation=2, padding_mode="circular", padding=2))
    deep = trained(model, target_modules=["0"])
    with pytest.raises(ValueError, match=r"0 is a convolution with dilation \(2, 2\) and padding 'circular'.*merge"):
        save_as_lora(deep, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
    ids=["dora", "bias", "tokens"],
)
def test_a_lora_that_is_more_than_two_factors_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    tokens = "trainable_token_indices" in settings
    model = mixed() if tokens else mlp()
    if tokens:
        settings = {"trainable_token_indices": {"words": [1]}}
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["head"], **settings))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=message):
        export_adapter_folder(tmp_path / "lora", tmp_path / "small")


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"lin1": 3}}], ids=str)
def test_a_lora_folder_is_resized(tmp_path: Path, options: dict[str, Any]) -> None:
    config = LoraConfig(
        r=6, lora_alpha=11, target_modules=TARGETS, init_lora_weights=False, rank_pattern={"lin1": 5}, **options
    )
    lora = get_peft_model(mlp(torch.float64), config)
    lora.save_pretrained(tmp_path / "lora")
    wanted = deltas(lora)
    same = export_adapter_folder(tmp_path / "lora", tmp_path / "same")
    assert {layer.name: layer.rank for layer in same.layers} == {"lin0": 6, "lin1": 5}
    for name, delta in deltas(load(tmp_path / "same", mlp(torch.float64))).items():
        assert relative_difference(delta, wanted[name]) < 1e-10
    export_adapter_folder(tmp_path / "lora", tmp_path / "small", rank=2)
    for name, delta in deltas(load(tmp_path / "small", mlp(torch.float64))).items():
        U, S, Vh = torch.linalg.svd(wanted[name])
        assert relative_difference(delta, (U[:, :2] * S[:2]) @ Vh[:2]) < 1e-10
