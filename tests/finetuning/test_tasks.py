"""What labels become, how tasks are told apart and how they are scored."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from rankwise.errors import UserError
from rankwise.finetuning import Table, make_task
from rankwise.finetuning.data import Columns
from rankwise.finetuning.models import load_model, load_tokenizer
from rankwise.finetuning.tasks import Classification, PairSimilarity, Regression
from tests.finetuning.tiny_checkpoint import save_tiny_checkpoint


@pytest.fixture(scope="session")
def tokenizer(tiny: SimpleNamespace) -> Any:
    return load_tokenizer(tiny.model)[0]


def table(labels: list[Any], *, pair: bool = False) -> Table:
    rows = [
        {"row": 10 + i, "text": f"good cat {'red ' * (i % 4)}", "text_pair": "a bird" if pair else None, "label": label}
        for i, label in enumerate(labels)
    ]
    return Table(rows, Columns("t", "u" if pair else None, "score"), "d.csv", "0", 0)


def make(kind: type, labels: list[Any], *, pair: bool = False, tokenizer: Any = None) -> Any:
    return kind(table(labels, pair=pair), tokenizer, 16)


# --- guessing


@pytest.mark.parametrize(
    ("labels", "pair", "embedding", "expected"),
    [
        (["yes", "no"] * 4, False, True, "classification"),
        ([0, 1] * 4, False, True, "classification"),
        ([0.0, 1.0] * 4, True, True, "classification"),
        ([True, False] * 4, True, True, "classification"),
        (["1.5", "x"] * 4, True, True, "classification"),
        ([0.5, 1.5, 2.5, 3.0], True, True, "pair-similarity"),
        (list(range(30)), True, True, "pair-similarity"),
        ([0.5, 1.5, 2.5, 3.0], False, True, "regression"),
        (list(range(30)), False, True, "regression"),
        ([0.5, 1.5, 2.5, 3.0], True, False, "regression"),
        (np.array([0.5, 1.5]).tolist(), True, True, "pair-similarity"),
    ],
)
def test_auto_follows_columns_and_model(
    tiny: SimpleNamespace, tmp_path: Path, tokenizer: Any, labels: list[Any], pair: bool, embedding: bool, expected: str
) -> None:
    source = tiny.model if embedding else str(save_tiny_checkpoint(tmp_path / "classifier", embedding=False))
    assert make_task("auto", table(labels, pair=pair), tokenizer, source=source, max_length=16).name == expected


def test_a_bare_encoder_without_modules_json_is_an_embedding_model(tiny: SimpleNamespace, tmp_path: Path) -> None:
    bare = save_tiny_checkpoint(tmp_path / "bare")
    (bare / "modules.json").unlink()
    assert (
        make_task("auto", table([0.5, 1.5], pair=True), None, source=str(bare), max_length=16).name == "pair-similarity"
    )


def test_unknown_task_names_those_there_are() -> None:
    with pytest.raises(
        UserError, match="unknown task 'ranking'; expected auto, pair-similarity, classification, regression"
    ):
        make_task("ranking", table([1, 2]), None, source="", max_length=16)


# --- labels


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.0, 0.5, 1.0], [0.0, 0.5, 1.0]),
        ([-1.0, 0.5], [-1.0, 0.5]),
        ([0.0, 2.5, 5.0], [0.0, 0.5, 1.0]),
        ([1.0, 4.0], [0.2, 0.8]),
        ([10.0, 15.0, 20.0], [0.0, 0.5, 1.0]),
        ([-2.0, 2.0], [0.0, 1.0]),
        ([0.0, 5.5], [0.0, 1.0]),
    ],
)
def test_pair_scores_are_mapped_by_their_usual_range(scores: list[float], expected: list[float]) -> None:
    task = make(PairSimilarity, scores, pair=True)
    assert task.targets == pytest.approx(expected)
    low, high = task.describe()["score_range"]
    assert task.targets * (high - low) + low == pytest.approx(scores)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20).filter(lambda scores: np.ptp(scores) > 1e-3))
def test_pair_targets_lie_between_minus_one_and_one_in_the_order_of_the_scores(scores: list[float]) -> None:
    targets = make(PairSimilarity, scores, pair=True).targets
    assert targets.min() >= -1
    assert targets.max() <= 1
    assert (np.diff(targets[np.argsort(scores)]) >= 0).all()


def test_pair_similarity_wants_two_texts() -> None:
    with pytest.raises(UserError, match=r"two text columns, found only 't' in d\.csv.*--text-pair"):
        make(PairSimilarity, [0.5, 1.0])


@pytest.mark.parametrize("kind", [PairSimilarity, Regression])
def test_scores_that_are_no_numbers_name_the_row(kind: type) -> None:
    with pytest.raises(
        UserError, match=r"'score' of d\.csv must hold numbers.*row 11 has 'high'.*--task classification"
    ):
        make(kind, [0.5, "high", 1.0], pair=True)


@pytest.mark.parametrize("kind", [PairSimilarity, Regression])
def test_constant_scores(kind: type) -> None:
    with pytest.raises(UserError, match=r"every score in column 'score' is 2\.5"):
        make(kind, [2.5] * 7, pair=True)


def test_constant_scores_that_have_no_exact_mean() -> None:
    """The mean of three 0.1 rounds, so their standard deviation is 1e-17 and not 0."""
    with pytest.raises(UserError, match=r"every score in column 'score' is 0\.1"):
        make(Regression, [0.1] * 3)


def test_one_class() -> None:
    with pytest.raises(UserError, match=r"one class only \('yes'\)"):
        make(Classification, ["yes"] * 5)


def test_too_many_classes_hint_at_regression() -> None:
    with pytest.raises(UserError, match=r"7 classes in 8 rows.*--task regression"):
        make(Classification, [1, 2, 3, 4, 5, 6, 7, 7])


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 2, 10, 2], ["2", "10"]),
        ([1.0, 0.0, 1.0], ["0", "1"]),
        ([np.float64(1.0), np.int64(0)], ["0", "1"]),
        ([True, False, True], ["False", "True"]),
        (["²", "1", "²", "1"], ["1", "²"]),
    ],
)
def test_classes_are_ordered_and_counted_once(labels: list[Any], classes: list[str]) -> None:
    task = make(Classification, labels)
    assert task.describe() == {"classes": classes}
    names = [classes[number] for number in task.targets]
    assert names == [str(int(label)) if isinstance(label, float) else str(label) for label in labels]


# --- scores


@given(st.integers(2, 5), st.integers(2, 60), st.integers(0, 10**6))
def test_classification_scores_are_sklearns(classes: int, rows: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    truth, guess = generator.integers(classes, size=(2, rows))
    found = make(Classification, ["a", "b"]).score(guess, truth)
    assert found["accuracy"] == pytest.approx(np.mean(truth == guess))
    assert found["f1_macro"] == pytest.approx(metrics.f1_score(truth, guess, average="macro", zero_division=0))
    assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(truth, guess))


@pytest.mark.parametrize("kind", [PairSimilarity, Regression])
@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_scipys(kind: type, ties: bool) -> None:
    generator = np.random.default_rng(0)
    truth, guess = generator.normal(size=(2, 50))
    if ties:
        truth, guess = truth.round(), guess.round()
    found = make(kind, [0.5, 1.0], pair=True).score(guess, truth)
    assert found["spearman"] == pytest.approx(stats.spearmanr(guess, truth).statistic)
    # Pearson and Spearman by hand: scipy on both sides alone would not notice swapped names
    assert found["pearson"] == pytest.approx(np.corrcoef(guess, truth)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef(stats.rankdata(guess), stats.rankdata(truth))[0, 1])
    if kind is Regression:
        assert found["rmse"] == pytest.approx(metrics.mean_squared_error(truth, guess) ** 0.5)


@pytest.mark.parametrize("kind", [PairSimilarity, Regression])
@pytest.mark.parametrize(
    ("guess", "truth"),
    [
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]),
        ([1.0], [2.0]),
        ([0.1] * 3, [1.0, 2.0, 3.0]),
    ],
)
def test_undefined_correlations_are_none(kind: type, guess: list[float], truth: list[float]) -> None:
    found = make(kind, [0.5, 1.0], pair=True).score(np.array(guess), np.array(truth))
    assert found["spearman"] is None
    assert found["pearson"] is None


# --- batches


def test_pair_similarity_puts_both_sides_in_one_batch(tokenizer: Any) -> None:
    batch = make(PairSimilarity, [0.5, 1.0, 0.0], pair=True, tokenizer=tokenizer).collate([2, 0])
    assert batch["input_ids"].shape[0] == 4
    assert batch["targets"].tolist() == [0.0, 0.5]
    first, second = batch["input_ids"][:2], batch["input_ids"][2:]
    assert torch.equal(second[0], second[1])  # the same pair text
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(("kind", "dtype"), [(Classification, torch.int64), (Regression, torch.float32)])
@pytest.mark.parametrize("pair", [False, True])
def test_head_batches(tokenizer: Any, kind: type, dtype: torch.dtype, pair: bool) -> None:
    batch = make(kind, [1, 0, 1], pair=pair, tokenizer=tokenizer).collate([0, 1, 2])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape[0] == 3
    assert batch["targets"].shape == (3,)
    assert batch["targets"].dtype == dtype
    assert bool(batch["token_type_ids"].any()) == pair


def test_texts_are_cut_at_max_length(tokenizer: Any) -> None:
    assert make(Classification, [1, 0, 1, 0], tokenizer=tokenizer).collate([3])["input_ids"].shape[1] == 7
    task = Classification(table([1, 0, 1, 0]), tokenizer, 5)
    assert task.collate([3])["input_ids"].shape[1] == 5


def test_padding_does_not_change_a_prediction(tiny: SimpleNamespace, tokenizer: Any) -> None:
    task = make(PairSimilarity, [0.5, 1.0, 0.0, 0.2], pair=True, tokenizer=tokenizer)
    model = load_model(task, tiny.model, None).eval()
    with torch.no_grad():
        together = task.predict(model, task.collate([0, 1, 2, 3]))
        alone = torch.cat([task.predict(model, task.collate([position])) for position in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert bool((together.abs() <= 1 + 1e-6).all())


def test_regression_predicts_in_the_units_of_the_labels(tiny: SimpleNamespace, tokenizer: Any) -> None:
    task = make(Regression, [100.0, 200.0, 300.0], tokenizer=tokenizer)
    model = load_model(task, tiny.model, None).eval()
    batch = task.collate([0, 1, 2])
    with torch.no_grad():
        raw = model(**{k: v for k, v in batch.items() if k != "targets"}).logits.squeeze(-1)
        assert task.predict(model, batch).tolist() == pytest.approx(
            (raw * np.std([100, 200, 300]) + 200).tolist(), rel=1e-5
        )
        standard = torch.tensor([-1.0, 0.0, 1.0]) * 1.5**0.5
        assert float(task.loss(model, batch)) == pytest.approx(float((raw - standard).square().mean()), rel=1e-5)


def test_a_checkpoint_with_another_head_is_explained(tmp_path: Path, tokenizer: Any) -> None:
    """transformers' own message says "look at the above report", which the command line never shows."""
    source = str(save_tiny_checkpoint(tmp_path / "two-classes", embedding=False))
    task = make(Classification, ["a", "b", "c"] * 3, tokenizer=tokenizer)
    # a fresh head would do as well as an error that says what is in the way
    try:
        load_model(task, source, None)
    except UserError as error:
        message = str(error)
    else:
        message = "labels"
    assert "look at the above report" not in message
    assert re.search("head|labels|classes", message)


def test_regression_is_scaled_by_the_training_rows_alone(tokenizer: Any) -> None:
    task = make(Regression, [1.0, 3.0, 100.0, -50.0], tokenizer=tokenizer)
    task.learn_scale([0, 1])
    assert (task.mean, task.spread) == (2.0, 1.0)
    task.learn_scale([2])  # one label has no spread: the scale stays
    assert (task.mean, task.spread) == (2.0, 1.0)
