"""A head that starts fitted: against scikit-learn's own fit and closed forms, for heads on one token and on all."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rankwise.errors import UserError
from rankwise.finetuning import FinetuneSettings, finetune, make_task, read_table
from rankwise.finetuning.head_start import PENALTY, fit_head
from rankwise.finetuning.models import load_model, load_tokenizer
from rankwise.finetuning.tasks import HeadTask

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def task_of(tiny: SimpleNamespace, name: str, file: str) -> Any:
    return make_task(name, read_table(file), load_tokenizer(tiny.model)[0], source=tiny.model, max_length=32)


def pooled(model: Any, task: Any, rows: list[int]) -> np.ndarray:
    batch = {key: value for key, value in task.collate(rows).items() if key != "targets"}
    with torch.no_grad():
        return model.bert(**batch).pooler_output.numpy().astype(np.float64)


def test_a_classifier_starts_where_logistic_regression_ends(tiny: SimpleNamespace) -> None:
    task, rows = task_of(tiny, "classification", tiny.classes), list(range(24))
    model: Any = load_model(task, tiny.model, None).eval()
    body = {name: p.clone() for name, p in model.bert.named_parameters()}
    fit_head(model, task, rows)
    x = pooled(model, task, rows)
    scale = np.sqrt(np.mean((x - x.mean(0)) ** 2))
    fit = LogisticRegression(C=1 / (PENALTY * len(rows)), max_iter=1000).fit(
        (x - x.mean(0)) / scale, task.targets[rows]
    )
    with torch.no_grad():
        batch = {key: value for key, value in task.collate(rows).items() if key != "targets"}
        probabilities = model(**batch).logits.softmax(-1).numpy()
    assert np.allclose(probabilities, fit.predict_proba((x - x.mean(0)) / scale), atol=2e-3)
    assert all(torch.equal(p, body[name]) for name, p in model.bert.named_parameters())


def test_a_regressor_starts_at_the_ridge_solution(tiny: SimpleNamespace) -> None:
    task, rows = task_of(tiny, "regression", tiny.ratings), list(range(20))
    task.learn_scale(rows)
    model: Any = load_model(task, tiny.model, None).eval()
    fit_head(model, task, rows)
    x = pooled(model, task, rows)
    centred = (x - x.mean(0)) / np.sqrt(np.mean((x - x.mean(0)) ** 2))
    y = (task.targets[rows].astype(np.float64) - task.mean) / task.spread
    n = len(rows)
    # the minimum of mean (xw + b - y)^2 + penalty/2 |w|^2, in closed form
    w = np.linalg.solve(centred.T @ centred + n * PENALTY / 2 * np.eye(x.shape[1]), centred.T @ (y - y.mean()))
    with torch.no_grad():
        found = task.predict(model, task.collate(rows)).numpy()
    assert np.allclose(found, (centred @ w + y.mean()) * task.spread + task.mean, atol=1e-3)


def test_a_class_without_a_row_is_unlikely_but_possible(tiny: SimpleNamespace) -> None:
    task = task_of(tiny, "classification", tiny.classes)
    by_class = [np.flatnonzero(task.targets == k).tolist() for k in range(len(task.classes))]
    features = np.random.default_rng(0).normal(size=(12, 5))
    for rows, missing in (
        (by_class[0][:12], range(1, len(by_class))),
        (by_class[0][:6] + by_class[1][:6], range(2, len(by_class))),
    ):
        weight, bias = task.fit_linear(features - features.mean(0), task.targets[rows], 0.1, intercept=True)
        assert np.isfinite(weight).all() and np.isfinite(bias).all()
        assert all(not weight[k].any() and bias[k] == pytest.approx(-np.log(24)) for k in missing)
        assert bias.argmax() not in missing


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_heads_that_see_every_token(kind: str, tiny: SimpleNamespace) -> None:
    """RoBERTa's head takes the first token, GPT-2's the last that is no padding."""
    task, rows = task_of(tiny, "classification", tiny.classes), list(range(24))
    small: dict[str, Any] = {"num_labels": len(task.classes), "vocab_size": task.tokenizer.vocab_size + 10}
    model: nn.Module
    if kind == "roberta":
        config = RobertaConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, pad_token_id=0,
            type_vocab_size=2, **small,
        )  # fmt: skip
        model = RobertaForSequenceClassification(config)
    else:
        config = GPT2Config(
            n_embd=32,
            n_layer=1,
            n_head=2,
            n_positions=64,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            **small,
        )
        model = GPT2ForSequenceClassification(config)
    model.eval()

    def loss() -> float:
        with torch.no_grad():
            return float(task.loss(model, task.collate(rows)))

    before = loss()
    fit_head(model, task, rows)
    assert loss() < before
    weight = next(m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == len(task.classes)).weight
    gradient = torch.autograd.grad(task.loss(model, task.collate(rows)), weight)[0]
    # at the minimum the loss's gradient is the penalty's: -PENALTY * scale^2 * W, parallel to W
    assert torch.cosine_similarity(gradient.flatten(), -weight.flatten(), dim=0) > 0.98


def test_a_task_without_a_head_is_left_alone(tiny: SimpleNamespace) -> None:
    task = task_of(tiny, "pair-similarity", tiny.pairs)
    model = load_model(task, tiny.model, None)
    before = {name: p.clone() for name, p in model.named_parameters()}
    fit_head(model, task, [0, 1, 2])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_damaged_features_and_odd_heads_are_refused(tiny: SimpleNamespace) -> None:
    task = task_of(tiny, "classification", tiny.classes)
    assert isinstance(task, HeadTask)
    model: Any = load_model(task, tiny.model, None)
    model.bert.pooler.dense.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN or infinite features"):
        fit_head(model, task, list(range(10)))
    model.classifier = nn.Sequential(nn.Flatten())
    with pytest.raises(UserError, match="no linear output layer"):
        fit_head(model, task, list(range(10)))


def test_finetune_reports_the_fitted_head_as_where_it_started(tiny: SimpleNamespace, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "model": tiny.model,
        "data": tiny.classes,
        "shots": 24,
        "steps": 2,
        "precision": "fp32",
        "r": 4,
    }
    scores = {}
    for start in ("fitted", "random"):
        result = finetune(FinetuneSettings(out=str(tmp_path / start), method="lora", head_start=start, **values))
        scores[start] = result["scores"]["before"]["accuracy"]
    assert scores["fitted"] > scores["random"]
