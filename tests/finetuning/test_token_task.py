"""A tag for every word: what is read, which sub-token carries the tag, what counts as found, what a head starts from."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

from rankwise.errors import UserError
from rankwise.finetuning import make_task, read_table
from rankwise.finetuning.entities import are_bio_tags, entities, entity_scores
from rankwise.finetuning.head_start import PENALTY, fit_head
from rankwise.finetuning.models import load_model, load_tokenizer
from rankwise.finetuning.table import WORDS, Columns, Table
from rankwise.finetuning.tasks import TokenClassification
from tests.finetuning.tiny_checkpoint import word_tokenizer, write_conll

SENTENCES = [(["red", "cat"], ["B-X", "O"]), (["old", "blue", "river"], ["O", "B-X", "I-X"]), (["warm"], ["O"])]


def table(sentences: list[tuple[list[str], list[Any]]]) -> Table:
    rows = [
        {"row": 10 + i, "text": " ".join(words), "text_pair": None, "label": tuple(tags), "words": tuple(words)}
        for i, (words, tags) in enumerate(sentences)
    ]
    return Table(rows, Columns("tokens", None, "tags"), "d.jsonl", "0", 0, WORDS)


@pytest.fixture(scope="module")
def tokenizer(tiny: SimpleNamespace) -> Any:
    return load_tokenizer(tiny.model)[0]


def make(sentences: list[tuple[list[str], list[Any]]], tokenizer: Any = None, length: int = 32, **options: Any) -> Any:
    return TokenClassification(table(sentences), tokenizer, length, **options)


# --- files


def written(path: Path, sentences: list[tuple[list[str], list[Any]]], names: tuple[str, str]) -> str:
    records = [dict(zip(names, row, strict=True)) for row in sentences]
    if path.suffix == ".parquet":
        pd.DataFrame(records).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    else:
        separator = "\t" if path.suffix == ".iob2" else "  "
        blocks = ("\n".join(f"{w}{separator}-{separator}{t}" for w, t in zip(*row, strict=True)) for row in sentences)
        path.write_text("-DOCSTART- - O\n\n" * (separator != "\t") + "\n\n\n".join(blocks) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "conll", "bio", "iob2"])
def test_every_format_reads_alike(tmp_path: Path, ending: str) -> None:
    found = read_table(written(tmp_path / f"d.{ending}", SENTENCES, ("tokens", "ner_tags")))
    assert [(list(row["words"]), list(row["label"])) for row in found.rows] == SENTENCES
    assert [row["row"] for row in found.rows] == [0, 1, 2]
    assert [row["text"] for row in found.rows] == ["red cat", "old blue river", "warm"]
    assert found.kind == WORDS
    assert len(found.revision) == 64


@pytest.mark.parametrize("names", [("words", "labels"), ("Tokens", "POS_tags"), ("text", "label")])
def test_usual_names_are_guessed_where_they_hold_lists(tmp_path: Path, names: tuple[str, str]) -> None:
    columns = read_table(written(tmp_path / "d.jsonl", SENTENCES, names)).columns
    assert (columns.text, columns.text_pair, columns.label) == (names[0], None, names[1])


def test_texts_beside_words_stay_texts_unless_the_words_are_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [{"text": "red cat", "tokens": ["red", "cat"], "tags": ["O", "O"], "label": k} for k in (0, 1)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_table(str(path)).kind == "texts"
    assert read_table(str(path), text="tokens", label="tags").kind == WORDS


def test_rows_without_words_are_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"tokens": ["a"], "tags": ["O"]}\n{"tokens": [], "tags": []}\n{"tokens": ["b"], "tags": ["X"]}\n')
    found = read_table(str(path))
    assert ([row["row"] for row in found.rows], found.dropped) == ([0, 2], 1)


@pytest.mark.parametrize(
    ("ending", "text", "message"),
    [
        ("conll", "red O\ncat\n", r"line 2 of .* has 1 columns \('cat'\), expected 2"),
        ("conll", "word\n", "expected 2: a word first"),
        ("conll", "# text = red cat\nred O\n", r"line 2 .*has 2 columns"),
        ("bio", "\n\n", "has no words"),
        ("jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', r"row 0 .* has 2 words \(tokens\) and 1 tags \(tags\)"),
        ("jsonl", '{"tokens": ["a"]}', "no column of tags was found among tokens"),
        ("jsonl", '{"tokens": ["a"], "tags": ["O"]}\n{"tokens": ["a"], "tags": null}', "row 1 .* has the tags"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, ending: str, text: str, message: str) -> None:
    (tmp_path / f"d.{ending}").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_table(str(tmp_path / f"d.{ending}"))


def test_a_conll_file_has_no_column_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="have no names"):
        read_table(written(tmp_path / "d.conll", SENTENCES, ("", "")), text="tokens")
    assert read_table(str(tmp_path / "d.conll"), text="words", label="tags").kind == WORDS


def test_wrong_encoding(tmp_path: Path) -> None:
    (tmp_path / "d.conll").write_bytes("café O\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_table(str(tmp_path / "d.conll"))


# --- which task


def test_auto_takes_words_for_token_classification(tiny: SimpleNamespace, tokenizer: Any) -> None:
    task = make_task("auto", table(SENTENCES), tokenizer, source=tiny.model, max_length=16)
    assert (task.name, task.peft_task_type, task.has_head) == ("token-classification", "TOKEN_CLS", True)


def test_tasks_refuse_tables_of_another_kind(tiny: SimpleNamespace) -> None:
    with pytest.raises(UserError, match=r"classification needs rows of text; .* has lists of words"):
        make_task("classification", table(SENTENCES), None, source=tiny.model, max_length=16)
    with pytest.raises(UserError, match="token-classification needs lists of words"):
        make_task("token-classification", read_table(tiny.classes), None, source=tiny.model, max_length=16)


def test_classes_come_from_all_rows_and_entities_from_their_names() -> None:
    task = make(SENTENCES)
    assert (task.classes, task.primary_metric) == (["B-X", "I-X", "O"], "entity_f1")
    task = make([(["a", "b"], ["NOUN", "VERB"])])
    assert (task.classes, task.primary_metric) == (["NOUN", "VERB"], "accuracy")
    assert make([(["a"] * 3, np.array([10, 2, 2]))]).classes == ["2", "10"]


@pytest.mark.parametrize(
    ("tags", "message"), [(["O", "O"], "one class only"), (["O", "B X"], "tag 'B X'"), (["O", ""], "tag ''")]
)
def test_tags_that_cannot_be(tags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make([(["a", "b"], tags)])


def test_training_rows_of_one_tag_are_refused_and_one_row_of_two_is_not() -> None:
    task = make(SENTENCES)
    with pytest.raises(UserError, match="all words of the 1 training rows have the same tag"):
        task.require_training_labels([2])
    task.require_training_labels([0])


# --- batches


def test_the_first_sub_token_carries_the_tag(tokenizer: Any) -> None:
    task = make([(["good", "zebra", "cat"], ["A", "B", "C"]), (["xy"], ["C"])], tokenizer)
    batch = task.collate([0, 1])
    pieces = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert pieces == ["[CLS]", "good", "z", "##e", "##b", "##r", "##a", "cat", "[SEP]"]
    assert batch["targets"][0].tolist() == [-100, 0, 1, -100, -100, -100, -100, 2, -100]
    assert batch["targets"][1].tolist() == [-100, 2] + [-100] * 7
    assert batch["word_places"][0].tolist() == [-1, 0, 1, -1, -1, -1, -1, 2, -1]
    assert batch["word_counts"].tolist() == [3, 1]
    assert task.items([0, 1]) == 4
    assert task.token_count(0) == 9


class Says(torch.nn.Module):
    """A model whose logits name the class that the targets do: it knows everything that it is shown."""

    def __init__(self, task: Any, rows: list[int]):
        super().__init__()
        self.targets = {tuple(row["input_ids"].tolist()): row["targets"] for row in self._rows(task, rows)}
        self.classes = len(task.classes)

    @staticmethod
    def _rows(task: Any, rows: list[int]) -> list[dict[str, torch.Tensor]]:
        return [{key: value[0] for key, value in task.collate([row]).items()} for row in rows]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, self.classes)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            known = self.targets[tuple(ids[mask == 1].tolist())]
            logits[row, torch.arange(len(known)), known.clamp(min=0)] = 1.0
        return SimpleNamespace(logits=logits)


def test_what_is_known_is_said_and_right(tokenizer: Any) -> None:
    task = make([*SENTENCES, (["zebra", "red"] * 12, ["I-X", "O"] * 12)], tokenizer, length=200)
    rows = [3, 0, 2, 1]
    said = task.predict(Says(task, rows), task.collate(rows))
    assert said == list(task.targets[rows])
    scores = task.score(said, task.targets[rows])
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0))
    assert next(iter(scores)) == "entity_f1"


@pytest.mark.parametrize(("outside", "said"), [("O", "O"), ("N", "<unseen>")])
def test_words_cut_off_are_outside_or_wrong(tokenizer: Any, outside: str, said: str) -> None:
    task = make([(["red", "cat", "blue", "dog"], ["B-X", outside, "B-X", outside])], tokenizer, length=4)
    found = task.predict(Says(task, [0]), task.collate([0]))
    assert found == [f"B-X {outside} {said} {said}"]
    scores = task.score(found, task.targets)
    if outside == "O":  # one of two entities, and three of four words
        assert scores["entity_recall"] == pytest.approx(1 / 2)
        assert scores["accuracy"] == pytest.approx(3 / 4)
    else:
        assert scores["accuracy"] == pytest.approx(2 / 4)
        # both classes have one of two right: the tag of the unseen is no class of its own
        assert scores["f1_macro"] == pytest.approx(2 / 3)


def test_a_word_without_a_token_is_not_lost(tokenizer: Any) -> None:
    task = make([(["red", "\u200b", "cat"], ["B-X", "O", "O"])], tokenizer)
    batch = task.collate([0])
    assert batch["word_places"][0].tolist() == [-1, 0, 2, -1]
    assert task.predict(Says(task, [0]), batch) == ["B-X O O"]


def test_a_tokenizer_that_tells_words_by_blanks_gets_them() -> None:
    """Byte-level: without a blank before it a word within a text is another token than the same word on its own."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from transformers import PreTrainedTokenizerFast

    for several in (False, True):
        words = Tokenizer(WordLevel({"<unk>": 0, "red": 1, "Ġred": 2, "Ġcat": 3}, unk_token="<unk>"))
        bytes_ = ByteLevel(add_prefix_space=False, use_regex=False)
        words.pre_tokenizer = Sequence([Split("@", "isolated"), bytes_]) if several else bytes_
        given = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")
        task = make([(["red", "cat"], ["A", "B"])], given)
        assert task.collate([0])["input_ids"].tolist() == [[2, 3]]
        assert given("red")["input_ids"] == [1]  # the caller's own is as it was


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(UserError, match="says which word a token is of"):
        make(SENTENCES, SimpleNamespace(is_fast=False))


# --- loss


@pytest.mark.parametrize("weights", [None, "balanced", {"B-X": 3.0, "O": 0.5}])
def test_loss_is_the_weighted_mean_over_words(tiny: SimpleNamespace, tokenizer: Any, weights: Any) -> None:
    """Rows of unequal length, so that the batch runs in parts; log_loss of scikit-learn is the oracle."""
    long = [*SENTENCES, (["red", "cat"] * 20, ["B-X", "O"] * 20)]
    task = make(long, tokenizer, 64, class_weights=weights)
    model = load_model(task, tiny.model, None).eval()
    batch = task.collate([0, 1, 2, 3])
    probabilities, classes = [], []
    with torch.no_grad():
        for row in range(4):
            alone = task.collate([row])
            inputs = {key: alone[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
            labelled = alone["targets"][0] != -100
            probabilities.append(model(**inputs).logits[0][labelled].double().softmax(-1).numpy())
            classes.append(alone["targets"][0][labelled].numpy())
        loss = float(task.loss(model, batch))
    truth = np.concatenate(classes)
    n, counts = len(truth), np.bincount(truth, minlength=3)
    if weights is None:
        each = np.ones(3)
    elif weights == "balanced":
        each = n / (3 * counts)
    else:
        each = np.array([3.0, 1.0, 0.5])  # B-X, I-X, O
        each = each / (each @ counts / n)
    expected = metrics.log_loss(
        truth, np.concatenate(probabilities), sample_weight=each[truth], labels=[0, 1, 2],
        normalize=False,
    )  # fmt: skip
    assert loss == pytest.approx(expected / n, rel=1e-5)


# --- the head's start


def test_a_head_starts_where_logistic_regression_on_words_ends(tiny: SimpleNamespace, tmp_path: Path) -> None:
    source = str(write_conll(tmp_path / "d.conll"))
    task: Any = make_task("auto", read_table(source), load_tokenizer(tiny.model)[0], source=tiny.model, max_length=32)
    rows = list(range(24))
    model: Any = load_model(task, tiny.model, None).eval()
    fit_head(model, task, rows)
    features, labels = [], []
    with torch.no_grad():
        for row in rows:
            batch = task.collate([row])
            kept = batch["targets"][0] != -100
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
            features.append(model.bert(**inputs).last_hidden_state[0][kept].numpy())
            labels.append(batch["targets"][0][kept].numpy())
        logits = model.classifier(torch.from_numpy(np.concatenate(features)))
    x, y = np.concatenate(features).astype(np.float64), np.concatenate(labels)
    x = (x - x.mean(0)) / np.sqrt(np.mean((x - x.mean(0)) ** 2))
    fit = LogisticRegression(C=1 / (PENALTY * len(y)), max_iter=1000).fit(x, y)
    assert np.allclose(logits.softmax(-1).numpy(), fit.predict_proba(x), atol=3e-3)


def test_the_head_is_fitted_to_some_words_of_rows_from_everywhere(tiny: SimpleNamespace, tokenizer: Any) -> None:
    """A file sorted by tag: the first words alone would show one class."""
    task = make([(["red"] * 4, ["A"] * 4)] * 100 + [(["blue"] * 4, ["B"] * 4)] * 100, tokenizer)
    task.fitted_items = 100
    seen: list[Any] = []
    original = task.fit_linear
    task.fit_linear = lambda features, targets, *a, **k: (seen.append(targets), original(features, targets, *a, **k))[1]
    fit_head(load_model(task, tiny.model, None), task, list(range(200)))
    assert len(seen[0]) == 100
    assert 20 < seen[0].sum() < 80


def test_words_are_learnt(tiny: SimpleNamespace, tmp_path: Path) -> None:
    table_ = read_table(str(write_conll(tmp_path / "d.conll", rows=60)))
    task: Any = make_task("auto", table_, load_tokenizer(tiny.model)[0], source=tiny.model, max_length=32)
    train, held_out = list(range(40)), list(range(40, 60))
    model = load_model(task, tiny.model, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        optimizer.zero_grad()
        task.loss(model, task.collate(train[step % 4 :: 4])).backward()
        optimizer.step()
    said = task.predict(model.eval(), task.collate(held_out))
    assert task.score(said, task.targets[held_out])["entity_f1"] > 0.9


def test_a_diverged_model_is_not_taken_for_a_class(tiny: SimpleNamespace, tokenizer: Any) -> None:
    task = make(SENTENCES, tokenizer)
    model: Any = load_model(task, tiny.model, None).eval()
    model.classifier.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="diverged"):
        task.predict(model, task.collate([0]))


# --- entities

TAGS = st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"])


def brute_force(tags: list[str]) -> set[tuple[str, int, int]]:
    """Every stretch of words that is an entity by the definition, tried one by one."""
    found = set()
    for start, end in itertools.combinations(range(len(tags) + 1), 2):
        for kind in ("X", "Y"):
            inside = tags[start] == f"B-{kind}" or (
                tags[start] == f"I-{kind}" and (start == 0 or tags[start - 1] not in (f"B-{kind}", f"I-{kind}"))
            )
            goes_on = all(tag == f"I-{kind}" for tag in tags[start + 1 : end])
            ends = end == len(tags) or tags[end] != f"I-{kind}"
            if inside and goes_on and ends:
                found.add((kind, start, end))
    return found


@given(st.lists(TAGS, max_size=9))
def test_entities_are_those_of_the_definition(tags: list[str]) -> None:
    assert entities(tags) == brute_force(tags)


@given(st.lists(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=7), min_size=1, max_size=5))
def test_entity_scores_count_whole_entities(rows: list[list[tuple[str, str]]]) -> None:
    guessed, true = ([[pair[side] for pair in row] for row in rows] for side in (0, 1))
    a = {(i, *entity) for i, row in enumerate(guessed) for entity in brute_force(row)}
    b = {(i, *entity) for i, row in enumerate(true) for entity in brute_force(row)}
    found = entity_scores(guessed, true)
    assert found["entity_precision"] == (pytest.approx(len(a & b) / len(a)) if a else None)
    assert found["entity_recall"] == (pytest.approx(len(a & b) / len(b)) if b else None)
    if len(a) and len(b) and a & b:
        p, r = len(a & b) / len(a), len(a & b) / len(b)
        assert found["entity_f1"] == pytest.approx(2 * p * r / (p + r))
    else:
        assert found["entity_f1"] == (0.0 if a or b else None)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [(["O", "B-X"], True), (["I-X"], True), (["O"], False), (["O", "B-"], False), (["O", "S-X"], False), ([], False)],
)
def test_bio_is_told_from_other_tags(tags: list[str], expected: bool) -> None:
    assert are_bio_tags(tags) == expected


def test_more_metrics_see_a_tag_a_word() -> None:
    task = make(
        [(["a", "b"], ["N", "V"]), (["c"], ["N"])], metrics=["balanced_accuracy"], primary_metric="balanced_accuracy"
    )
    found = task.score(["N N", "N"], task.targets)
    assert found["balanced_accuracy"] == pytest.approx(1 / 2)
    assert task.greater_is_better
    with pytest.raises(ValueError, match="the same words"):
        task.score(["N", "N"], task.targets)


def test_word_level_tokenizer_without_special_tokens() -> None:
    given = word_tokenizer(["<pad>", "<unk>"], pad_token="<pad>")
    assert make(SENTENCES, given).collate([0])["targets"].tolist() == [[0, 2]]
