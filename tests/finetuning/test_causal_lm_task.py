"""Prompt and completion: what a batch holds, what the loss is on, what is learnt and said."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankwise.cli.main import main
from rankwise.errors import UserError
from rankwise.finetuning import FinetuneSettings, finetune, make_task
from rankwise.finetuning.models import load_model, load_tokenizer
from rankwise.finetuning.packing import fewest_slots, first_fit_decreasing, require_packable
from rankwise.finetuning.tasks import CausalLanguageModel
from tests.finetuning.test_generation_task import table
from tests.finetuning.tiny_checkpoint import word_tokenizer
from tests.tiny_models import tiny_gpt2, tiny_llama


def save_tiny_gpt2(folder: Path) -> Path:
    """A random GPT-2 of two layers and a tokenizer of whole words, whose end token is its padding too, as GPT-2's is."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = word_tokenizer(["<end>", "<unk>"], eos_token="<end>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_gpt2(tmp_path_factory.mktemp("gpt2") / "model"))


def make(
    labels: list[Any], source: str, *, length: int = 16, packing: bool = False, **more: Any
) -> CausalLanguageModel:
    tokenizer, _ = load_tokenizer(source)
    return CausalLanguageModel(table(labels, **more), tokenizer, length, packing=packing)


def words(task: CausalLanguageModel, ids: torch.Tensor) -> list[str]:
    return task.tokenizer.convert_ids_to_tokens(ids.tolist())


def test_a_row_is_prompt_completion_and_end_and_only_the_completion_is_learnt(gpt2: str) -> None:
    task = make(["sad cloud", "good"], gpt2, texts=["red cat", "blue house river"])
    batch = task.collate([0, 1])
    assert words(task, batch["input_ids"][0]) == ["red", "cat", "sad", "cloud", "<end>"]
    assert words(task, batch["input_ids"][1]) == ["blue", "house", "river", "good", "<end>"]
    learnt = [words(task, row[row != -100]) for row in batch["labels"]]
    assert learnt == [["sad", "cloud", "<end>"], ["good", "<end>"]]
    assert batch["attention_mask"].all()


def test_padding_is_not_learnt_though_it_is_the_end_token(gpt2: str) -> None:
    task = make(["sad", "good dog bird"], gpt2)
    batch = task.collate([0, 1])
    assert batch["attention_mask"].sum(1).tolist() == [4, 6]
    assert (batch["labels"][0] != -100).sum() == 2


def test_a_long_prompt_loses_its_beginning_and_a_long_completion_its_end(gpt2: str) -> None:
    task = make(["sad cloud", "good dog bird cat car road"], gpt2, texts=["red blue green cat dog", "red"], length=5)
    batch = task.collate([0, 1])
    assert words(task, batch["input_ids"][0]) == ["cat", "dog", "sad", "cloud", "<end>"]
    assert words(task, batch["input_ids"][1]) == ["good", "dog", "bird", "cat", "car"]


def test_a_second_column_follows_on_a_line_of_its_own(gpt2: str) -> None:
    task = make(["sad"], gpt2, pair="old new")
    assert words(task, task.collate([0])["input_ids"][0]) == ["red", "cat", "old", "new", "sad", "<end>"]


def test_loss_is_cross_entropy_over_the_completions_tokens(gpt2: str) -> None:
    task = make(["sad cloud", "good"], gpt2)
    model = load_model(task, gpt2, None).eval()
    batch = task.collate([0, 1])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total, count = torch.zeros(()), 0
    for row, labels in enumerate(batch["labels"]):
        for place in range(1, len(labels)):
            if labels[place] != -100:
                total -= logits[row, place - 1].log_softmax(-1)[labels[place]]
                count += 1
    torch.testing.assert_close(task.loss(model, batch), total / count)


def overfit(task: CausalLanguageModel, model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = task.collate([0, 1, 2])
    for _ in range(120):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()


@pytest.mark.parametrize("beams", [1, 2])
def test_what_was_learnt_by_heart_is_said_and_stops(gpt2: str, beams: int) -> None:
    texts, completions = ["red cat", "blue house river", "old"], ["good dog bird", "sad cloud", "music"]
    task = make(completions, gpt2, texts=texts)
    task.beams = beams
    model = load_model(task, gpt2, None)
    overfit(task, model)
    assert task.predict(model.eval(), task.collate([0, 1, 2])) == completions
    assert task.score(completions, task.targets)["rouge1"] == pytest.approx(1)


def test_the_completion_is_not_shown_when_predicting(gpt2: str) -> None:
    first, second = make(["sad cloud"], gpt2), make(["good dog bird"], gpt2)
    model = load_model(first, gpt2, None).eval()
    torch.manual_seed(0)
    assert first.predict(model, first.collate([0])) == second.predict(model, second.collate([0]))


def test_a_prompt_as_long_as_the_model_leaves_room_to_answer(gpt2: str) -> None:
    task = make(["sad cloud"], gpt2, texts=["red " * 40], length=32)
    model = load_model(task, gpt2, None).eval()
    (text,) = task.predict(model, task.collate([0]))
    assert len(text.split()) <= 8


def test_other_models_are_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    from tests.finetuning.test_generation_task import save_tiny_t5

    for source in (str(tiny.model), str(save_tiny_t5(tmp_path / "t5"))):
        task = make_task("causal-lm", table(["good"]), SimpleNamespace(), source=source, max_length=8)
        with pytest.raises(UserError, match="needs a causal language model"):
            load_model(task, source, None)


@pytest.mark.parametrize(("method", "lr"), [("lora", 2e-2), ("deep-lora", 6e-4)])
def test_a_whole_run(gpt2: str, tmp_path: Path, method: str, lr: float) -> None:
    rows = [("red cat", "good dog"), ("blue house", "sad cloud"), ("old", "new"), ("warm", "cold")] * 6
    data = tmp_path / "pairs.csv"
    with data.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion"), *rows])
    settings = FinetuneSettings(
        model=gpt2, data=str(data), out=str(tmp_path / "run"), task="causal-lm", text="prompt", label="completion",
        method=method, shots=16, steps=300 if method == "deep-lora" else 100, batch_size=8, lr=lr, precision="fp32",
    )  # fmt: skip
    result = finetune(settings)
    before, after = (result["scores"][when]["rouge1"] for when in ("before", "after"))
    assert after > before + 0.2
    adapter = (tmp_path / "run" / "adapter" / "adapter_config.json").read_text()
    assert '"task_type": "CAUSAL_LM"' in adapter
    assert "lm_head" not in adapter


def test_from_the_command_line(gpt2: str, tmp_path: Path) -> None:
    data = tmp_path / "pairs.csv"
    data.write_text("prompt,completion\n" + "red cat,good dog\nblue,sad cloud\n" * 6, encoding="utf-8")
    arguments = f"finetune --model {gpt2} --data {data} --task causal-lm --text prompt --label completion --steps 2"
    assert main([*arguments.split(), "--shots", "8", "--precision", "fp32", "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "predictions.csv").is_file()


# --- packing

UNEQUAL = {
    "texts": ["red cat", "blue house river stone cloud", "old", "", "warm cold dark bright music tree", "red"],
    "labels": ["sad cloud", "good", "good dog bird cat car road tree", "fine poor", "sad", "new"],
}


def unequal(source: str, *, packing: bool, length: int = 16) -> CausalLanguageModel:
    texts, labels = UNEQUAL["texts"], UNEQUAL["labels"]
    return make(labels, source, texts=texts, length=length, packing=packing)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(20, 40))
def test_first_fit_decreasing_loses_nothing_and_wastes_little(lengths: list[int], room: int) -> None:
    bins = first_fit_decreasing(lengths, room)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    filled = [sum(lengths[item] for item in members) for members in bins]
    assert max(filled) <= room
    # no two bins could be one, so all but one are more than half full
    assert all(a + b > room for i, a in enumerate(filled) for b in filled[:i])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=20), st.integers(20, 60))
def test_packing_never_takes_more_room_than_padding_or_the_fewest_bins(lengths: list[int], room: int) -> None:
    def slots(bins: list[list[int]]) -> int:
        return len(bins) * max(sum(lengths[item] for item in members) for members in bins)

    bins = fewest_slots(lengths, room)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    assert max(sum(lengths[item] for item in members) for members in bins) <= room
    assert slots(bins) <= min(
        slots([[item] for item in range(len(lengths))]), slots(first_fit_decreasing(lengths, room))
    )


@pytest.mark.parametrize(("chosen", "shape"), [([0, 1, 2, 3, 4, 5], (3, 12)), ([5, 1, 3, 2], (3, 9)), ([2], (1, 9))])
def test_a_packed_batch_holds_the_same_rows_in_fewer_sequences(
    gpt2: str, chosen: list[int], shape: tuple[int, int]
) -> None:
    plain, packed = (unequal(gpt2, packing=packing) for packing in (False, True))
    rows, batch = plain.collate(chosen), packed.collate(chosen)
    assert batch["input_ids"].shape == shape  # of 36, 22 and 9 tokens
    assert "attention_mask" not in batch
    for row in range(len(chosen)):
        mine = batch["packed_rows"] == row
        where, length = rows["attention_mask"][row] == 1, int(rows["attention_mask"][row].sum())
        assert batch["input_ids"][mine].tolist() == rows["input_ids"][row][where].tolist()
        assert batch["labels"][mine].tolist() == rows["labels"][row][where].tolist()
        assert batch["position_ids"][mine].tolist() == list(range(length))
    padding = batch["packed_rows"] == -1
    assert int(padding.sum()) == shape[0] * shape[1] - int(rows["attention_mask"].sum())
    assert (batch["labels"][padding] == -100).all()


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4, 5], [5, 1, 3, 2]])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [tiny_llama, tiny_gpt2])
def test_packed_rows_give_the_same_loss_and_gradient(gpt2: str, family: Any, attention: str, chosen: list[int]) -> None:
    """In float64, where a row that saw another one could not hide behind rounding (transformers' loss is in float32)."""
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family is tiny_gpt2 else {}
    model = family(attn_implementation=attention, **quiet).double().train()
    require_packable(model)
    rows, batch = (unequal(gpt2, packing=packing).collate(chosen) for packing in (False, True))
    with torch.no_grad():
        alone = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    rounding = 1e-13 if attention == "sdpa" else 1e-7  # eager attention takes its softmax in float32
    for row in range(len(chosen)):
        expected = alone[row][rows["attention_mask"][row] == 1]
        torch.testing.assert_close(together[batch["packed_rows"] == row], expected, atol=rounding, rtol=rounding)
    losses, gradients = [], []
    for packing in (False, True):
        task = unequal(gpt2, packing=packing)
        model.zero_grad()
        loss = task.loss(model, task.collate(chosen))
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-5, msg=name)


@pytest.mark.parametrize("packing", [False, True])
def test_items_are_the_tokens_that_the_loss_is_the_mean_of(gpt2: str, packing: bool) -> None:
    task = unequal(gpt2, packing=packing)
    model = load_model(task, gpt2, None).eval()
    with torch.no_grad():
        parts = [(task.items(rows), float(task.loss(model, task.collate(rows)))) for rows in ([0, 1, 3], [2, 4, 5])]
        whole = float(task.loss(model, task.collate(range(6))))
    # by hand: 3 + 2 + 2 (its prompt is empty, so its first word follows on nothing) and 8 + 2 + 2
    assert [count for count, _ in parts] == [7, 12]
    assert sum(count * loss for count, loss in parts) / 19 == pytest.approx(whole, rel=1e-5)


def test_packing_says_the_same(gpt2: str) -> None:
    plain, packed = (unequal(gpt2, packing=packing) for packing in (False, True))
    model = load_model(packed, gpt2, None).eval()
    assert packed.predict(model, packed.collate(range(6))) == plain.predict(model, plain.collate(range(6)))
    assert packed.describe()["packing"] is True


class Forgetful(nn.Module):
    """A model that is not told where rows begin, as one with its own masks would not be."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return self.model(input_ids=input_ids)


def test_models_in_which_packed_rows_see_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="packing does not work with Forgetful"):
        require_packable(Forgetful(tiny_llama()))


def test_packing_is_for_causal_language_models(gpt2: str) -> None:
    tokenizer, _ = load_tokenizer(gpt2)
    assert make_task("causal-lm", table(["a"]), tokenizer, source=gpt2, max_length=8, packing=True).describe()[
        "packing"
    ]
    with pytest.raises(UserError, match=r"packing is for causal-lm; this task is generation\. Leave it out"):
        make_task("generation", table(["a"]), tokenizer, source=gpt2, max_length=8, packing=True)
