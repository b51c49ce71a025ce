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
from sklearn.linear_model import LogisticRegression
from sklearn.utils.class_weight import compute_class_weight

from rankwise.errors import UserError
from rankwise.finetuning import TASKS, Table, make_task
from rankwise.finetuning.class_weights import class_weights
from rankwise.finetuning.data import Columns
from rankwise.finetuning.head_start import PENALTY, fit_head
from rankwise.finetuning.models import load_model, load_tokenizer
from rankwise.finetuning.named_metrics import CLASS_METRICS, NUMBER_METRICS, Metric
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


def make(kind: type, labels: list[Any], *, pair: bool = False, tokenizer: Any = None, **options: Any) -> Any:
    return kind(table(labels, pair=pair), tokenizer, 16, **options)


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


# --- class weights

LABELS = ["a", "b", "a", "a", "c", "a", "b", "a", "a", "c", "b", "a"]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_balanced_weights_are_sklearns_and_one_on_average(targets: list[int]) -> None:
    found = class_weights("balanced", ["a", "b", "c", "d"], targets)
    seen = np.unique(targets)
    assert found[seen] == pytest.approx(compute_class_weight("balanced", classes=seen, y=targets))
    assert found[targets].mean() == pytest.approx(1)


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=3), st.lists(st.integers(0, 2), min_size=1, max_size=20))
def test_given_weights_keep_their_ratios_and_are_one_on_average(weights: list[float], targets: list[int]) -> None:
    found = class_weights(dict(zip("abc", weights, strict=True)), ["a", "b", "c"], targets)
    assert found[targets].mean() == pytest.approx(1)
    assert found / found[0] == pytest.approx(np.array(weights) / weights[0])


def test_a_class_that_is_not_named_counts_one() -> None:
    found = class_weights({"b": 3.0}, ["a", "b"], [0, 1])
    assert found.tolist() == [0.5, 1.5]


def test_weights_come_from_the_training_rows() -> None:
    task = make(Classification, LABELS, class_weights="balanced")
    task.learn_scale([0, 1, 2, 4, 5])  # a b a c a
    assert task.weights == pytest.approx([5 / 9, 5 / 3, 5 / 3])
    found = task.describe()
    assert found["class_weights"] == "balanced"
    assert found["class_weights_used"] == pytest.approx({"a": 5 / 9, "b": 5 / 3, "c": 5 / 3})


@pytest.mark.parametrize("weights", [None, "balanced", {"a": 1, "b": 0.25, "c": 5.0}])
def test_a_weighted_loss_is_sklearns_and_right_on_average(tiny: SimpleNamespace, tokenizer: Any, weights: Any) -> None:
    task = make(Classification, LABELS, tokenizer=tokenizer, class_weights=weights)
    model = load_model(task, tiny.model, None).eval()
    with torch.no_grad():
        loss = float(task.loss(model, task.collate(range(12))))
        parts = [float(task.loss(model, task.collate(rows))) for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11])]
        batch = {key: value for key, value in task.collate(range(12)).items() if key != "targets"}
        probabilities = model(**batch).logits.double().softmax(-1).numpy()
    if weights is None:
        each = np.ones(3)
    else:
        each = compute_class_weight("balanced" if weights == "balanced" else {0: 1, 1: 0.25, 2: 5.0},
                                    classes=np.arange(3), y=task.targets)  # fmt: skip
        each = each / each[task.targets].mean()
    expected = metrics.log_loss(task.targets, probabilities, sample_weight=each[task.targets])  # their sum is n
    assert loss == pytest.approx(expected, rel=1e-5)
    assert np.mean(parts) == pytest.approx(loss, rel=1e-5)  # torch's division by the weights of a batch would not be


@pytest.mark.parametrize("weights", ["balanced", {"neg": 9.0}])
def test_a_weighted_head_starts_at_sklearns_weighted_fit(tiny: SimpleNamespace, tokenizer: Any, weights: Any) -> None:
    from rankwise.finetuning import read_table

    task: Any = Classification(read_table(tiny.classes), tokenizer, 32, class_weights=weights)
    rows = [row for row in range(40) if row % 2 or row % 8 == 0]  # 20 of "pos", 5 of "neg"
    task.learn_scale(rows)
    model: Any = load_model(task, tiny.model, None).eval()
    fit_head(model, task, rows)
    with torch.no_grad():
        batch = {key: value for key, value in task.collate(rows).items() if key != "targets"}
        features = model.bert(**batch).pooler_output.numpy().astype(np.float64)
        probabilities = model(**batch).logits.softmax(-1).numpy()
    x = (features - features.mean(0)) / np.sqrt(np.mean((features - features.mean(0)) ** 2))
    known = "balanced" if weights == "balanced" else {0: 9 * 25 / 65, 1: 25 / 65}
    fit = LogisticRegression(C=1 / (PENALTY * 25), max_iter=1000, class_weight=known).fit(x, task.targets[rows])
    assert np.allclose(probabilities, fit.predict_proba(x), atol=2e-3)
    plain = LogisticRegression(C=1 / (PENALTY * 25), max_iter=1000).fit(x, task.targets[rows])
    assert np.abs(plain.predict_proba(x) - probabilities).max() > 0.05


def test_a_class_of_no_weight_counts_for_nothing() -> None:
    task = make(Classification, LABELS, class_weights={"c": 0})
    features = np.random.default_rng(0).normal(size=(12, 5))
    kept = task.targets != 2
    weight, bias = task.fit_linear(features, task.targets, 0.1, intercept=True)
    fit = LogisticRegression(C=1 / (0.1 * 10), max_iter=1000, tol=1e-8).fit(features[kept], task.targets[kept])
    logits = features @ weight.T + bias
    odds = logits[:, 1] - logits[:, 0]
    assert odds == pytest.approx(fit.decision_function(features), abs=2e-3)
    assert np.isfinite(bias).all()
    assert not weight[2].any()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"d": 1.0}, "name the class 'd'; the classes are a, b, c"),
        ({"a": -1.0}, "weight of class 'a' must be a finite number of at least 0, got -1"),
        ({"a": float("nan")}, "got nan"),
        ({"a": float("inf")}, "got inf"),
        ({"a": "2"}, "got '2'"),
        ({"a": True}, "got True"),
        ("uniform", "must be 'balanced' or a weight for each class, got 'uniform'"),
        (dict.fromkeys("abc", 0.0), "leave every training row out"),
    ],
)
def test_weights_that_cannot_be(weights: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(Classification, LABELS, class_weights=weights)


def test_weights_are_for_classes() -> None:
    with pytest.raises(
        UserError,
        match="--class-weights is for classification, token-classification, image-classification; this task is regression",
    ):
        make_task("regression", table([1.5, 2.5]), None, source="", max_length=8, class_weights="balanced")
    assert make_task("classification", table(LABELS), None, source="", max_length=8, class_weights={"a": 2}).describe()


# --- metrics


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("balanced_accuracy", metrics.balanced_accuracy_score),
        ("cohen_kappa", metrics.cohen_kappa_score),
        ("f1_weighted", lambda t, p: metrics.f1_score(t, p, average="weighted")),
        ("precision_macro", lambda t, p: metrics.precision_score(t, p, average="macro")),
        ("recall_weighted", lambda t, p: metrics.recall_score(t, p, average="weighted")),
        ("jaccard_macro", lambda t, p: metrics.jaccard_score(t, p, average="macro")),
    ],
)
def test_named_class_metrics_are_sklearns(name: str, oracle: Any) -> None:
    guess, truth = np.random.default_rng(0).integers(3, size=(2, 60))
    task = make(Classification, LABELS, metrics=[name], primary_metric=name)
    assert task.score(guess, truth)[name] == pytest.approx(oracle(truth, guess))
    if name not in ("cohen_kappa", "jaccard_macro", "recall_weighted"):  # which are symmetric, or the accuracy
        assert oracle(truth, guess) != pytest.approx(oracle(guess, truth))
    assert (task.primary_metric, task.greater_is_better) == (name, True)


@pytest.mark.parametrize("kind", [Regression, PairSimilarity])
@pytest.mark.parametrize(
    ("name", "oracle", "greater"),
    [
        ("mean_absolute_error", lambda t, p: np.abs(t - p).mean(), False),
        ("median_absolute_error", lambda t, p: np.median(np.abs(t - p)), False),
        ("mean_squared_error", lambda t, p: np.square(t - p).mean(), False),
        ("max_error", lambda t, p: np.abs(t - p).max(), False),
        ("r2", lambda t, p: 1 - np.square(t - p).sum() / np.square(t - t.mean()).sum(), True),
        ("explained_variance", lambda t, p: 1 - (t - p).var() / t.var(), True),
        ("kendall", lambda t, p: stats.kendalltau(t, p).statistic, True),
    ],
)
def test_named_number_metrics_by_hand(kind: type, name: str, oracle: Any, greater: bool) -> None:
    guess, truth = np.random.default_rng(0).normal(size=(2, 40))
    task = make(kind, [0.5, 1.0], pair=True, metrics=[name], primary_metric=name)
    assert task.score(guess, truth)[name] == pytest.approx(oracle(truth, guess))
    assert task.greater_is_better == greater


def test_undefined_named_metrics_are_none() -> None:
    task = make(Regression, [0.5, 1.0], metrics=list(NUMBER_METRICS))
    found = task.score(np.array([1.0]), np.array([2.0]))
    assert found["r2"] is None
    assert found["kendall"] is None
    assert found["mean_absolute_error"] == 1.0
    assert all(metric(np.array([1.0, np.inf]), np.array([2.0, 1.0])) is None for metric in NUMBER_METRICS.values())
    assert make(Classification, ["a", "b"], metrics=["cohen_kappa"]).score([1, 1], [1, 1])["cohen_kappa"] is None


def test_the_tasks_own_metrics_may_decide() -> None:
    task = make(Regression, [0.5, 1.0], metrics=["spearman"], primary_metric="rmse")
    assert (task.primary_metric, task.greater_is_better) == ("rmse", False)
    assert list(task.score(np.array([1.0, 2.0]), np.array([2.0, 1.0]))) == ["spearman", "pearson", "rmse"]
    assert make(Regression, [0.5, 1.0]).primary_metric == Regression.primary_metric == "spearman"


def within_half(predictions: Any, targets: Any) -> float:
    return float(np.mean(np.abs(predictions - targets) < 0.5))


def test_a_function_is_a_metric() -> None:
    cost = Metric(
        "cost", lambda predictions, targets: float(np.abs(predictions - targets).sum()), greater_is_better=False
    )
    task = make(Regression, [0.5, 1.0], metrics=[within_half, cost], primary_metric="cost")
    found = task.score(np.array([1.0, 2.0, 3.0]), np.array([1.2, 3.0, 3.0]))
    assert found["within_half"] == pytest.approx(2 / 3)
    assert found["cost"] == pytest.approx(1.2)
    assert not task.greater_is_better


@pytest.mark.parametrize(
    ("chosen", "primary", "message"),
    [
        (["r2"], None, "classification has no metric 'r2'; it reports accuracy, f1_macro, matthews and knows balanced"),
        (["os.system"], None, "has no metric 'os.system'"),
        ([], "balanced_accuracy", r"does not report 'balanced_accuracy'; it reports accuracy.*ask for more metrics"),
        ([lambda p, t: 1.0], None, r"a metric without a name: pass Metric\(\"name\", function\)"),
        ([Metric("accuracy", within_half)], None, "there is a metric 'accuracy' already"),
        ([within_half, within_half], None, "there is a metric 'within_half' already"),
        ([], "f1", "does not report 'f1'"),  # three classes
    ],
)
def test_metrics_that_cannot_be(chosen: list[Any], primary: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(Classification, LABELS, metrics=chosen, primary_metric=primary)


def test_a_metric_must_give_a_number() -> None:
    task = make(Classification, LABELS, metrics=[Metric("odd", lambda p, t: "high")])  # type: ignore[arg-type,return-value]
    with pytest.raises(UserError, match="metric 'odd' must give one number, it gave 'high'"):
        task.score([0], [0])


def test_exact_match_is_of_any_reference() -> None:
    rows = table(["red cat", "dog"])
    task = make_task(
        "generation", rows, None, source="", max_length=8, metrics=["exact_match"], primary_metric="exact_match"
    )
    assert task.score(["a", " b ", "c"], [("x", "a"), ("b",), ("d",)])["exact_match"] == pytest.approx(2 / 3)


def test_every_task_reports_what_it_says(tokenizer: Any) -> None:
    """A primary metric that was accepted must be among the scores."""
    assert set(CLASS_METRICS) & set(NUMBER_METRICS) == set()
    for task, guess, truth in (
        (make(Classification, ["a", "b"] * 3), np.array([0, 1]), np.array([0, 1])),
        (make(Regression, [0.5, 1.0]), np.array([0.0, 1.0]), np.array([0.0, 2.0])),
        (make(PairSimilarity, [0.5, 1.0], pair=True), np.array([0.0, 1.0]), np.array([0.0, 2.0])),
        (make(TASKS["generation"], ["red cat"]), ["red"], [("red cat",)]),
    ):
        assert tuple(task.score(guess, truth)) == task._own_metrics()
        assert task.primary_metric in task._own_metrics()


# --- how rows count


def test_a_steps_mean_is_over_rows(tokenizer: Any) -> None:
    task = make(Classification, LABELS, tokenizer=tokenizer)
    assert task.items([3, 1, 2]) == 3
    assert task.token_count(1) == len(task.collate([1])["input_ids"][0])


def test_training_rows_of_one_class_are_refused() -> None:
    task = make(Classification, LABELS)
    with pytest.raises(UserError, match="all 3 training rows have the same label"):
        task.require_training_labels([0, 2, 3])
    task.require_training_labels([0, 1])
