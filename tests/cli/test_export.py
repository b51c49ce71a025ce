"""``rankwise export --to gguf``; the other targets are in test_cli.py and tests/adapters."""

import sys
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model

from rankwise.adapters import DeepLoraConfig
from rankwise.cli.main import main
from rankwise.testing.adapter_contract import disturbed
from tests.cli.complaints import Captured, complaint
from tests.tiny_models import tiny_bert, tiny_llama


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Deep LoRA adapter and its base model, in folders beside each other."""
    folder = tmp_path_factory.mktemp("saved")
    base = tiny_llama()
    base.save_pretrained(folder / "base")
    config = DeepLoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    disturbed(get_peft_model(base, config)).save_pretrained(folder / "adapter")
    return folder


def export(saved: Path, out: Path, *more: Any) -> int:
    arguments = [saved / "adapter", "--to", "gguf", "--out", out, *more]
    return main(["export", *map(str, arguments)])


def test_a_gguf_file_is_written(saved: Path, tmp_path: Path, capsys: Captured) -> None:
    gguf = pytest.importorskip("gguf")
    assert export(saved, tmp_path / "adapter.gguf", "--base", saved / "base", "--rank", 2) == 0
    assert "4 of 4 layers, rank 2 to 2" in " ".join(capsys.readouterr().out.split())
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    tensors = {tensor.name: list(tensor.shape) for tensor in reader.tensors}  # the last axis first
    assert tensors["blk.0.attn_q.weight.lora_a"] == [32, 2]
    assert tensors["blk.1.ffn_down.weight.lora_b"] == [2, 32]
    assert len(tensors) == 8


def test_mistakes_are_named_and_nothing_is_written(
    saved: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    tiny_bert().save_pretrained(tmp_path / "bert")
    (tmp_path / "there.gguf").write_text("mine")
    before = sorted(path.name for path in tmp_path.iterdir())
    for out, more, says in (
        ("new.gguf", ["--base", saved / "base", "--r", 4], "go with --to deep-lora"),
        ("new.gguf", [], "base"),
        ("new.gguf", ["--base", saved / "nowhere"], "nowhere"),
        ("new.gguf", ["--base", tmp_path / "bert"], "not of bert"),
        ("there.gguf", ["--base", saved / "base"], "exists"),
    ):
        assert export(saved, tmp_path / out, *more) == 2
        assert says in " ".join(complaint(capsys).split())
    assert main(["export", str(saved / "adapter"), "--out", str(tmp_path / "x"), "--base", "b"]) == 2
    assert "--base goes with --to gguf" in " ".join(complaint(capsys).split())
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert export(saved, tmp_path / "new.gguf", "--base", saved / "base") == 2
    assert "rankwise[gguf]" in "".join(complaint(capsys).split())
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "there.gguf").read_text() == "mine"
