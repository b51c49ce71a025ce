"""Text from text: what a batch holds, what is learnt, and metrics against numbers worked out by hand."""

import json
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rankwise.errors import UserError
from rankwise.finetuning import TASKS, Table, make_task, read_table, text_metrics
from rankwise.finetuning.data import Columns
from rankwise.finetuning.models import load_model, load_tokenizer
from rankwise.finetuning.tasks import Classification, Generation
from tests.finetuning.tiny_checkpoint import save_tiny_checkpoint, word_tokenizer

PAIRS = [("red cat", "good dog bird"), ("blue house river", "sad cloud")]


def save_tiny_t5(folder: Path) -> Path:
    """A random one-layer T5 and a tokenizer of whole words that ends every text with </s>, as T5's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import T5Config, T5ForConditionalGeneration

    ends = TemplateProcessing("$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    tokenizer = word_tokenizer(
        ["<pad>", "</s>", "<unk>"], ends, pad_token="<pad>", eos_token="</s>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_t5(tmp_path_factory.mktemp("t5") / "model"))


def table(labels: list[Any], texts: list[str] | None = None, pair: str | None = None) -> Table:
    texts = texts or ["red cat"] * len(labels)
    rows = [
        {"row": 10 + i, "text": text, "text_pair": pair, "label": label}
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    return Table(rows, Columns("mr", "more" if pair else None, "ref"), "d.csv", "0", 0)


def make(labels: list[Any], tokenizer: Any = None, **more: Any) -> Generation:
    return Generation(table(labels, **more), tokenizer, 8)


# --- two-class scores


@pytest.mark.parametrize(
    ("truth", "guess", "f1", "accuracy"),
    [
        # 2 true positives, 1 false positive, 1 false negative of 6: F1 = 4 / 6
        ([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], 2 / 3, 4 / 6),
        ([1, 1, 1, 0], [1, 1, 1, 1], 6 / 7, 3 / 4),
        ([0, 0, 0, 1], [0, 0, 0, 0], 0.0, 3 / 4),
    ],
)
def test_f1_is_of_the_last_class(truth: list[int], guess: list[int], f1: float, accuracy: float) -> None:
    found = Classification(table(["0", "1"]), None, 8).score(np.array(guess), np.array(truth))
    assert found["f1"] == pytest.approx(f1)
    assert found["accuracy_f1"] == pytest.approx((accuracy + f1) / 2)
    assert found["accuracy"] == pytest.approx(accuracy)
    assert {"f1_macro", "matthews"} <= set(found)


def test_three_classes_have_no_positive_one() -> None:
    found = Classification(table(["a", "b", "c"] * 3), None, 8).score(np.array([0, 1, 2]), np.array([0, 1, 2]))
    assert set(found) == {"accuracy", "f1_macro", "matthews"}


# --- which tables are generation


def test_generation_is_a_task_that_auto_never_guesses(tiny: SimpleNamespace) -> None:
    assert TASKS["generation"] is Generation
    labels = [f"sentence {i}" for i in range(4)] * 3
    assert make_task("generation", table(labels), None, source="", max_length=8).name == "generation"
    assert make_task("auto", table(labels), None, source=tiny.model, max_length=8).name != "generation"


def test_targets_are_one_or_several_texts() -> None:
    task = make(["one", ["two", "three"], ("four",), np.array(["five", "six"], dtype=object), 7, 8.0])
    assert list(task.targets) == [("one",), ("two", "three"), ("four",), ("five", "six"), ("7",), ("8",)]
    assert task.describe() == {"references": 8, "beams": 1}
    # the runner counts and picks labels with numpy
    assert len(np.unique(task.targets[[0, 1, 0]])) == 2
    assert list(task.targets[[1]]) == [("two", "three")]


def test_lists_of_equal_length_stay_one_label_a_row() -> None:
    assert make([["a", "b"], ["c", "d"]]).targets.shape == (2,)


@pytest.mark.parametrize("label", [[], "", "  ", ["good", ""], ["good", None]])
def test_a_label_without_text_names_the_row(label: Any) -> None:
    with pytest.raises(UserError, match=r"'ref' of d\.csv must hold the text to generate.*row 11 has"):
        make(["good", label])


def test_several_references_come_from_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [{"text": "a b", "target": ["one", "two"]}, {"text": "c d", "target": ["three"]}]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    task = make_task("generation", read_table(str(path)), None, source="", max_length=8)
    assert list(task.targets) == [("one", "two"), ("three",)]


@pytest.mark.parametrize("package", ["sacrebleu", "rouge_score.rouge_scorer"])
def test_missing_packages_are_named_before_training(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'rankwise\[generation\]'"):
        make(["good"])


def test_beams() -> None:
    assert Generation(table(["a"]), None, 8, beams=3).describe()["beams"] == 3
    with pytest.raises(UserError, match="beams must be at least 1, got 0"):
        Generation(table(["a"]), None, 8, beams=0)


# --- batches


def test_labels_are_the_first_reference_padded_with_minus_100(t5: str) -> None:
    tokenizer = load_tokenizer(t5)[0]
    task = make([["good dog bird", "sad"], "sad cloud", "bad"], tokenizer, texts=["red", "blue house", "cat"])
    batch = task.collate([2, 0])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert all(isinstance(value, torch.Tensor) for value in batch.values())
    word = tokenizer.convert_tokens_to_ids
    assert batch["labels"].tolist() == [
        [word("bad"), word("</s>"), -100, -100],
        [word("good"), word("dog"), word("bird"), word("</s>")],
    ]
    assert batch["input_ids"].tolist() == [[word("cat"), 1], [word("red"), 1]]


def test_a_tokenizer_that_pads_with_its_end_token_still_teaches_the_end(t5: str) -> None:
    tokenizer = load_tokenizer(t5)[0]
    tokenizer.pad_token = tokenizer.eos_token
    labels = make(["good dog", "sad"], tokenizer).collate([0, 1])["labels"]
    assert labels[1].tolist() == [tokenizer.convert_tokens_to_ids("sad"), 1, -100]


def test_texts_and_targets_are_cut_at_max_length(t5: str) -> None:
    batch = make(["red " * 20], load_tokenizer(t5)[0], texts=["cat " * 20]).collate([0])
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 8)


def test_a_pair_is_one_input(t5: str) -> None:
    tokenizer = load_tokenizer(t5)[0]
    batch = make(["good"], tokenizer, pair="blue").collate([0])
    assert tokenizer.decode(batch["input_ids"][0]).split() == ["red", "cat", "</s>", "blue", "</s>"]


# --- the model


def test_loss_is_cross_entropy_over_the_targets_tokens(t5: str) -> None:
    task = make(["good dog bird", "sad"], load_tokenizer(t5)[0], texts=["red cat", "blue"])
    model = load_model(task, t5, None).eval()
    assert next(model.parameters()).dtype == torch.float32
    batch = task.collate([0, 1])
    with torch.no_grad():
        loss = task.loss(model, batch)
        logits = model(**batch).logits
    kept = batch["labels"] != -100
    assert int(kept.sum()) == 6
    by_hand = -logits.log_softmax(-1)[kept].gather(-1, batch["labels"][kept].unsqueeze(-1)).mean()
    torch.testing.assert_close(loss, by_hand)


def overfit(task: Generation, model: nn.Module, lr: float, steps: int) -> float:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    batch = task.collate([0, 1])
    model.train()
    for _ in range(steps):
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return float(loss.detach())


@pytest.mark.parametrize("beams", [1, 3])
def test_two_pairs_learnt_by_heart_are_generated(t5: str, beams: int) -> None:
    sources, targets = zip(*PAIRS, strict=True)
    tokenizer = load_tokenizer(t5)[0]
    task = Generation(table([targets[0], [targets[1], "dark"]], list(sources)), tokenizer, 8, beams=beams)
    model = load_model(task, t5, None)
    assert overfit(task, model, 1e-2, 60) < 0.05
    with torch.no_grad():
        # together (the shorter padded), alone, and the other way round
        assert task.predict(model, task.collate([0, 1])) == list(targets)
        assert task.predict(model, task.collate([1, 0])) == list(targets[::-1])
        found = task.predict(model, task.collate([1]))
    assert found == ["sad cloud"]
    assert isinstance(found[0], str)
    perfect = task.score(list(targets), task.targets)
    assert perfect["rouge1"] == 1.0


@pytest.mark.parametrize("method", ["lora", "deep-lora"])
def test_adapters_train_and_generate(t5: str, method: str) -> None:
    from peft import LoraConfig, PeftModelForSeq2SeqLM, get_peft_model

    from rankwise.adapters import DeepLoraConfig, initialize_deeplora_weights

    sources, targets = zip(*PAIRS, strict=True)
    task = make(list(targets), load_tokenizer(t5)[0], texts=list(sources))
    common: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": task.peft_task_type}
    config = LoraConfig(lora_alpha=4, **common) if method == "lora" else DeepLoraConfig(**common)
    model = get_peft_model(load_model(task, t5, None), config)
    assert isinstance(model, PeftModelForSeq2SeqLM)
    batch = task.collate([0, 1])
    before = float(task.loss(model, batch).detach())
    if method == "deep-lora":
        summary = initialize_deeplora_weights(model, [batch], loss_fn=task.loss, num_batches=1)
        # three attentions of four, two feed-forwards of two; the output layer stays as it is
        assert len(summary.layers) == 3 * 4 + 2 * 2
        assert float(task.loss(model, batch).detach()) == pytest.approx(before, rel=1e-5)
    assert overfit(task, model, 1e-2, 20) < before - 0.1
    with torch.no_grad():
        assert all(isinstance(text, str) for text in task.predict(model, batch))


def test_an_untrained_model_stops_at_max_length(t5: str) -> None:
    task = make(["good"], load_tokenizer(t5)[0])
    model = load_model(task, t5, None).eval()
    with torch.no_grad():
        (text,) = task.predict(model, task.collate([0]))
    assert len(text.split()) <= 8


def test_an_encoder_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"generation needs an encoder-decoder model such as T5 or BART, this is bert"):
        load_model(make(["good"]), str(save_tiny_checkpoint(tmp_path / "bert")), None)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_t5(tmp_path / "t5")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_model(make(["good"]), str(folder), None)


# --- scores


def test_bleu_by_hand() -> None:
    """Precisions 4/5, 3/4, 2/3, 1/2 of equal lengths: (4·3·2·1 / 5·4·3·2)^¼ = (1/5)^¼."""
    found = make(["x"]).score(["a b c d e"], ["a b c d f"])
    assert found["bleu"] == pytest.approx(0.2**0.25)


def test_bleu_punishes_what_is_too_short_and_is_of_the_whole_corpus() -> None:
    assert make(["x"]).score(["a b c d"], ["a b c d e f"])["bleu"] == pytest.approx(math.exp(1 - 6 / 4))
    # 9 of 10 words, 7 of 8, 5 of 6 and 3 of 4 in both rows together
    both = make(["x"]).score(["a b c d e", "g h i j k"], ["a b c d f", "g h i j k"])
    assert both["bleu"] == pytest.approx((9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25)


def test_bleu_takes_every_reference_of_its_own_row_only() -> None:
    task = make(["x"])
    many = task.score(["a b c d", "e f g h"], [["k l m n", "a b c d"], "e f g h"])
    assert many["bleu"] == pytest.approx(1.0)
    crossed = task.score(["a b c d", "e f g h"], [["e f g h", "e f g h"], "a b c d"])
    assert crossed["bleu"] is not None
    assert crossed["bleu"] < 0.1


def test_rouge_by_hand() -> None:
    """Text a b c d against a c b: words 3 of 4 and of 3, pairs none, longest common subsequence 2."""
    found = make(["x"]).score(["a b c d"], ["a c b"])
    assert found["rouge1"] == pytest.approx(2 * 0.75 * 1 / 1.75)
    assert found["rouge2"] == 0.0
    assert found["rougeL"] == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert found["rougeLsum"] == pytest.approx(found["rougeL"])


def test_rouge_is_of_the_best_reference_and_the_mean_over_rows() -> None:
    found = make(["x"]).score(["a b", "c d"], [["z z", "a b"], ["c e", "q"]])
    assert found["rouge1"] == pytest.approx((1 + 0.5) / 2)
    assert found["rouge2"] == pytest.approx((1 + 0) / 2)


def test_rouge_lsum_takes_a_line_for_a_sentence() -> None:
    found = make(["x"]).score(["a b\nc d"], ["c d\na b"])
    assert found["rougeL"] == pytest.approx(0.5)
    assert found["rougeLsum"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "texts", [["good dog bird in the sun", "sad cloud over a hill"], ["žluťoučký kůň", "日本語 🐈"], ["", ""]]
)
def test_every_metric_lies_between_0_and_1(texts: list[str]) -> None:
    for references in (texts, ["other words here altogether", "and more"], [["a", "b", texts[0] or "c"], ["d"]]):
        found = make(["x"]).score(texts, references)
        assert {"bleu", "rouge1", "rouge2", "rougeL", "rougeLsum"} <= set(found)
        assert all(value is not None and 0 <= value <= 1 for value in found.values())


def test_predictions_may_be_an_array_and_targets_those_of_the_task() -> None:
    task = make(["a b c d", ["k", "e f g h"]])
    found = task.score(np.array(["a b c d", "e f g h"]), task.targets[[0, 1]])
    assert found["bleu"] == found["rougeL"] == pytest.approx(1.0)


def test_no_rows_have_no_score_and_rows_must_match() -> None:
    assert set(make(["x"]).score([], []).values()) == {None}
    with pytest.raises(ValueError, match="2 predictions for 1 targets"):
        make(["x"]).score(["a", "b"], ["a"])


def test_scoring_says_nothing(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make(["x"]).score(["that 's it ."] * 200, ["that is it ."] * 200)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


# --- METEOR


class NoSynonyms:
    """WordNet as far as METEOR asks: on this machine, without a synonym for anything."""

    def ensure_loaded(self) -> None: ...

    def synsets(self, _word: str, **_: Any) -> list[Any]:
        return []


def test_meteor_is_left_out_without_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        def ensure_loaded(self) -> None:
            raise LookupError("Resource wordnet not found.")

    monkeypatch.setattr("nltk.corpus.wordnet", Absent())
    assert "meteor" not in make(["x"]).score(["a b"], ["a b"])


def test_meteor_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Precision 2/3, recall 2/4, one chunk of two: F = PR / (0.9 P + 0.1 R), penalty 0.5 · (1/2)³."""
    monkeypatch.setattr("nltk.corpus.wordnet", NoSynonyms())
    precision, recall = 2 / 3, 2 / 4
    first = (1 - 0.5 * 0.5**3) * precision * recall / (0.9 * precision + 0.1 * recall)
    found = make(["x"]).score(["red cat sings", "q"], [["z", "a red cat ran"], "r"])
    assert found["meteor"] == pytest.approx(first / 2)
    assert make(["x"]).score([], [])["meteor"] is None


def test_meteor_is_left_out_without_nltk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    assert text_metrics.meteor(["a"], [("a",)]) == {}
