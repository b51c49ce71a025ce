"""LoRA → Deep LoRA: the same update at the start, and an adapter that trains on from there."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from rankwise.adapters import deeplora_from_adapter, export_adapter_folder
from rankwise.cli.main import main
from rankwise.testing.adapter_contract import deeplora_layers
from tests.adapters.test_export import deltas, mixed, mlp, relative_difference, trained

TARGETS = ["lin0", "lin1"]


def saved_lora(folder: Path, model: nn.Module | None = None, **settings: Any) -> PeftModel:
    config = LoraConfig(**{"r": 4, "lora_alpha": 7, "target_modules": TARGETS, "init_lora_weights": False, **settings})
    lora = get_peft_model(mlp(torch.float64) if model is None else model, config)
    lora.save_pretrained(folder)
    return lora


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_the_update_is_the_same_at_every_depth(tmp_path: Path, depth: int) -> None:
    lora = saved_lora(tmp_path / "lora", rank_pattern={"lin1": 3}, modules_to_save=["head"])
    summary = deeplora_from_adapter(tmp_path / "lora", tmp_path / "deep", inner_depth=depth)
    assert {layer.name: (layer.width, layer.rank) for layer in summary.layers} == {"lin0": (4, 4), "lin1": (4, 3)}
    deep = PeftModel.from_pretrained(mlp(torch.float64), tmp_path / "deep", is_trainable=True)
    for name, delta in deltas(deep).items():
        assert relative_difference(delta, deltas(lora)[name]) < 1e-9, name
    x = torch.randn(5, 20, dtype=torch.float64)
    torch.testing.assert_close(deep.eval()(x), lora.eval()(x))
    assert all(layer.deeplora_inner["default"].weight.shape[0] == depth for layer in deeplora_layers(deep).values())


def test_there_and_back_changes_nothing(tmp_path: Path) -> None:
    lora = saved_lora(tmp_path / "lora")
    deeplora_from_adapter(tmp_path / "lora", tmp_path / "deep")
    export_adapter_folder(tmp_path / "deep", tmp_path / "back")
    back = PeftModel.from_pretrained(mlp(torch.float64), tmp_path / "back")
    for name, delta in deltas(back).items():
        assert relative_difference(delta, deltas(lora)[name]) < 1e-9, name


def test_more_width_than_rank_is_free_to_learn(tmp_path: Path) -> None:
    saved_lora(tmp_path / "lora", r=2)
    deeplora_from_adapter(tmp_path / "lora", tmp_path / "deep", r=6)
    deep = PeftModel.from_pretrained(mlp(torch.float64), tmp_path / "deep", is_trainable=True).train()
    layer = next(iter(deeplora_layers(deep).values()))
    right = layer.deeplora_right["default"].weight
    torch.testing.assert_close(right @ right.mT, torch.eye(6, dtype=right.dtype))
    optimizer = torch.optim.SGD((p for p in deep.parameters() if p.requires_grad), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, n, dtype=torch.float64, generator=generator) for n in (20, 4))
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(deep(x), y).backward()
        optimizer.step()
    assert torch.linalg.matrix_rank(layer.get_delta_weight("default"), rtol=1e-8) == 6


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_every_kind_of_layer(tmp_path: Path) -> None:
    targets = ["words", "lines", "square", "transposed"]
    lora = saved_lora(tmp_path / "lora", mixed(), target_modules=targets)
    deeplora_from_adapter(tmp_path / "lora", tmp_path / "deep", r=5)
    deep = PeftModel.from_pretrained(mixed(), tmp_path / "deep").eval()
    assert {name.split(".")[-1] for name in deeplora_layers(deep)} == set(targets)
    wanted = deltas(lora)
    for name, delta in deltas(deep).items():
        expected = wanted[name].clone()
        if name == "words":
            expected[3] = 0  # PEFT starts an embedding's padding row at random here and never trains it
        assert relative_difference(delta, expected.reshape(delta.shape)) < 1e-9, name


def test_a_deep_lora_is_resized(tmp_path: Path) -> None:
    model = trained(mlp(torch.float64))
    model.save_pretrained(tmp_path / "deep")
    deeplora_from_adapter(tmp_path / "deep", tmp_path / "small", rank=2, inner_depth=2)
    small = PeftModel.from_pretrained(mlp(torch.float64), tmp_path / "small")
    for name, delta in deltas(small).items():
        U, S, Vh = torch.linalg.svd(deltas(model)[name])
        assert relative_difference(delta, (U[:, :2] * S[:2]) @ Vh[:2]) < 1e-9, name


def test_a_width_below_the_rank_is_refused(tmp_path: Path) -> None:
    saved_lora(tmp_path / "lora")
    with pytest.raises(ValueError, match="r=2 is less than the rank 4"):
        deeplora_from_adapter(tmp_path / "lora", tmp_path / "deep", r=2, rank=4)
    assert not (tmp_path / "deep").exists()


def test_seventy_two_layers_take_little_time(tmp_path: Path) -> None:
    """benchmarks/export.py measures it at real sizes; here it must only not be a matter of minutes."""
    model = nn.Sequential(*(nn.Linear(96, 96) for _ in range(72)))
    saved_lora(tmp_path / "lora", model, target_modules=r"\d+")
    start = time.perf_counter()
    summary = deeplora_from_adapter(tmp_path / "lora", tmp_path / "deep")
    assert time.perf_counter() - start < 30
    assert len(summary.layers) == 72


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = saved_lora(tmp_path / "lora")
    arguments = [
        "export",
        str(tmp_path / "lora"),
        "--out",
        str(tmp_path / "deep"),
        "--from",
        "lora",
        "--to",
        "deep-lora",
    ]
    assert main([*arguments, "--r", "5", "--inner-depth", "2"]) == 0
    assert "2 of 2 layers, rank 4 to 4" in capsys.readouterr().out
    deep = PeftModel.from_pretrained(mlp(torch.float64), tmp_path / "deep")
    for name, delta in deltas(deep).items():
        assert relative_difference(delta, deltas(lora)[name]) < 1e-9, name
    assert main(["export", str(tmp_path / "deep"), "--out", str(tmp_path / "back"), "--rank", "2"]) == 0
    for wrong, says in (
        (["--from", "deep-lora"], "holds a lora adapter, not deep-lora"),
        (["--to", "ia3"], "--to must be lora, deep-lora or gguf"),
        (["--r", "4"], "go with --to deep-lora"),
    ):
        assert main(["export", str(tmp_path / "lora"), "--out", str(tmp_path / "x"), *wrong]) == 2
        assert says in " ".join(capsys.readouterr().err.split())


def test_singular_values_of_a_start_are_the_loras(tmp_path: Path) -> None:
    lora = saved_lora(tmp_path / "lora")
    summary = deeplora_from_adapter(tmp_path / "lora", tmp_path / "deep")
    for layer in summary.layers:
        expected: Tensor = torch.linalg.svdvals(deltas(lora)[layer.name])[:4]
        torch.testing.assert_close(torch.tensor(layer.singular_values, dtype=torch.float64), expected)
