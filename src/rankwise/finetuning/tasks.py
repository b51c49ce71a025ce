"""What is trained on and how it is scored: pair similarity on an embedding model, or a head on a classifier."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn import metrics
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.finetuning.batching import Array, Batch, in_parts_of_equal_length
from rankwise.finetuning.data import Table, numeric_labels


class Task(ABC):
    """One kind of label. ``prepare`` has read the labels; the rest turns rows into losses, predictions and scores."""

    name: str
    primary_metric: str
    peft_task_type: str | None
    has_head: bool = False
    """Whether the model carries a head of this task's own on top of the pretrained body."""
    ridge_fits: bool = False
    """Whether ``predict`` gives one differentiable number a row that the pretrained model has already learned to give:
    what a closed-form fit needs. A head at its random start has not."""

    def __init__(self, table: Table, tokenizer: Any, max_length: int):
        self.table, self.tokenizer, self.max_length = table, tokenizer, max_length
        self.targets = self._targets()

    @abstractmethod
    def _targets(self) -> Array:
        """One target per row of the table."""

    @abstractmethod
    def collate(self, positions: Sequence[int]) -> Batch:
        """Token tensors and targets of these rows of the table."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> Tensor | list[str]:
        """One prediction per row: (B,) scores or class numbers, or B texts."""

    @abstractmethod
    def score(self, predictions: Array, targets: Array) -> dict[str, float | None]:
        """Metrics by name; None where one is undefined (a constant prediction has no correlation)."""

    @abstractmethod
    def load_model(self, source: str, revision: str | None) -> nn.Module:
        """The pretrained model this task trains, in float32."""

    def learn_scale(self, positions: Sequence[int]) -> None:  # noqa: B027  # most tasks have no scale
        """Take whatever the targets are scaled by from the training rows alone."""

    def describe(self) -> dict[str, Any]:
        """What a reader of the run's config.json wants to know about the labels."""
        return {}

    def modules_left_out(self, model: nn.Module) -> list[str]:
        """Linear layers that the loss never reaches."""
        return []

    def _tokens(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Batch:
        encoded = self.tokenizer(
            list(texts),
            list(pairs) if pairs is not None else None,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return dict(encoded)


class PairSimilarity(Task):
    """A bi-encoder: both texts through one embedding model, cosine of the pooled vectors, squared loss on the score.

    Scores are mapped to [0, 1] (or [−1, 1]) by their usual ranges: within [−1, 1] as they are, within [0, 5] divided
    by 5, anything else by the range seen.
    """

    name = "pair-similarity"
    primary_metric = "spearman"
    peft_task_type = "FEATURE_EXTRACTION"
    ridge_fits = True

    def _targets(self) -> Array:
        if self.table.columns.text_pair is None:
            raise UserError(
                f"pair similarity needs two text columns, found only {self.table.columns.text!r} in {self.table.source}; "
                "name the second with --text-pair"
            )
        values = numeric_labels(self.table.rows, self.table.source, self.table.columns.label)
        low, high = float(values.min()), float(values.max())
        if low == high:
            raise UserError(f"every score in column {self.table.columns.label!r} is {low:g}: there is nothing to learn")
        if low >= -1 and high <= 1:
            self.range = (0.0, 1.0)
        else:
            self.range = (0.0, 5.0) if low >= 0 and high <= 5 else (low, high)
        return (values - self.range[0]) / (self.range[1] - self.range[0])

    def describe(self) -> dict[str, Any]:
        return {"score_range": list(self.range)}

    def load_model(self, source: str, revision: str | None) -> nn.Module:
        from transformers import AutoModel

        self.pooling = _pooling_of(source)
        return AutoModel.from_pretrained(source, revision=revision, use_safetensors=True, dtype=torch.float32)

    def modules_left_out(self, model: nn.Module) -> list[str]:
        return [n for n, m in model.named_modules() if "pooler" in n.split(".") and isinstance(m, nn.Linear)]

    def collate(self, positions: Sequence[int]) -> Batch:
        rows = [self.table.rows[position] for position in positions]
        # one padded batch for both sides: one forward pass, twice the rows
        batch = self._tokens([row["text"] for row in rows] + [row["text_pair"] for row in rows])
        batch["targets"] = torch.as_tensor(self.targets[list(positions)], dtype=torch.float32)
        return batch

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        pooled = in_parts_of_equal_length(batch, lambda inputs: self._pooled(model, inputs))
        first, second = nn.functional.normalize(pooled, dim=-1).chunk(2)
        return (first * second).sum(-1)

    def _pooled(self, model: nn.Module, inputs: Batch) -> Tensor:
        hidden = model(**inputs).last_hidden_state.float()
        if self.pooling == "cls":
            return hidden[:, 0]
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return (self.predict(model, batch) - batch["targets"]).square().mean()

    def score(self, predictions: Array, targets: Array) -> dict[str, float | None]:
        return _correlations(predictions, targets)


class HeadTask(Task):
    """A sequence classifier of transformers with its own head."""

    peft_task_type = "SEQ_CLS"
    has_head = True

    def collate(self, positions: Sequence[int]) -> Batch:
        rows = [self.table.rows[position] for position in positions]
        pairs = [row["text_pair"] for row in rows] if self.table.columns.text_pair else None
        batch = self._tokens([row["text"] for row in rows], pairs)
        batch["targets"] = torch.as_tensor(self.targets[list(positions)])
        return batch

    @abstractmethod
    def fit_linear(
        self, features: Array, positions: Sequence[int], penalty: float, *, intercept: bool
    ) -> tuple[Array, Array]:
        """Weight (outputs, d) and bias (outputs,) that minimize this task's mean loss on these rows + penalty·‖W‖²/2.

        ``features`` are (n, d); without ``intercept`` the bias counts for nothing.
        """

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return in_parts_of_equal_length(batch, lambda inputs: model(**inputs).logits.float())

    def _load(self, source: str, revision: str | None, **head: Any) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(
            source,
            revision=revision,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a head trained for other labels starts anew
            **head,
        )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model


class Classification(HeadTask):
    """Cross-entropy on the classes found in the label column.

    Of two classes the last in the order of ``classes`` is the positive one of ``f1`` ("1" of "0" and "1");
    ``accuracy_f1`` is the mean of accuracy and ``f1``, GLUE's official figure for MRPC and QQP.
    """

    name = "classification"
    primary_metric = "accuracy"

    def _targets(self) -> Array:
        labels = [str(plain(row["label"])) for row in self.table.rows]
        self.classes = sorted(set(labels), key=lambda label: (len(label), label) if label.isdigit() else (99, label))
        if len(self.classes) < 2:
            raise UserError(
                f"column {self.table.columns.label!r} of {self.table.source} has one class only ({self.classes[0]!r}); "
                "classification needs at least two"
            )
        if len(self.classes) > max(2, len(labels) // 2):
            raise UserError(
                f"column {self.table.columns.label!r} has {len(self.classes)} classes in {len(labels)} rows; "
                "if these are scores, use --task regression"
            )
        numbers = {label: number for number, label in enumerate(self.classes)}
        return np.array([numbers[label] for label in labels], dtype=np.int64)

    def describe(self) -> dict[str, Any]:
        return {"classes": self.classes}

    def load_model(self, source: str, revision: str | None) -> nn.Module:
        names = dict(enumerate(self.classes))
        return self._load(
            source, revision, num_labels=len(names), id2label=names, label2id={v: k for k, v in names.items()}
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self._logits(model, batch), batch["targets"])

    def fit_linear(
        self, features: Array, positions: Sequence[int], penalty: float, *, intercept: bool
    ) -> tuple[Array, Array]:
        from sklearn.linear_model import LogisticRegression

        targets = self.targets[list(positions)]
        seen = np.unique(targets)
        # a class without a row gets the bias of half a row
        weight, bias = (
            np.zeros((len(self.classes), features.shape[1])),
            np.full(len(self.classes), -np.log(2 * len(targets))),
        )
        bias[seen] = -np.log(len(seen))
        if len(seen) > 1:
            fit = LogisticRegression(C=1 / (penalty * len(targets)), max_iter=1000, fit_intercept=intercept)
            fit.fit(features, targets)
            two = len(seen) == 2  # scikit-learn then gives the log-odds of the second
            weight[seen] = np.vstack([-fit.coef_, fit.coef_]) / 2 if two else fit.coef_
            slopes = np.concatenate([-fit.intercept_, fit.intercept_]) / 2 if two else fit.intercept_
            bias[seen] += slopes - slopes.mean()
        return weight, bias

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = self._logits(model, batch)
        if not bool(torch.isfinite(logits).all()):  # argmax would make a class of them
            raise UserError("training diverged: the model's outputs are NaN or infinite numbers; lower --lr")
        return logits.argmax(-1)

    def score(self, predictions: Array, targets: Array) -> dict[str, float | None]:
        found: dict[str, float | None] = {
            "accuracy": (accuracy := float(metrics.accuracy_score(targets, predictions))),
            "f1_macro": float(metrics.f1_score(targets, predictions, average="macro", zero_division=0)),
            "matthews": float(metrics.matthews_corrcoef(targets, predictions)),
        }
        if len(self.classes) == 2:
            f1 = float(metrics.f1_score(np.asarray(targets) == 1, np.asarray(predictions) == 1, zero_division=0))
            found |= {"f1": f1, "accuracy_f1": (accuracy + f1) / 2}
        return found


class Regression(HeadTask):
    """Squared error on the standardized score; predictions come back in the label's units."""

    name = "regression"
    primary_metric = "spearman"

    def _targets(self) -> Array:
        values = numeric_labels(self.table.rows, self.table.source, self.table.columns.label)
        self.mean, self.spread = float(values.mean()), float(values.std())
        if np.ptp(values) == 0:  # not the spread: rounding leaves it at 1e-17
            raise UserError(f"every score in column {self.table.columns.label!r} is {self.mean:g}: nothing to learn")
        return values.astype(np.float32)

    def learn_scale(self, positions: Sequence[int]) -> None:
        values = self.targets[list(positions)].astype(np.float64)
        if np.ptp(values) > 0:
            self.mean, self.spread = float(values.mean()), float(values.std())

    def describe(self) -> dict[str, Any]:
        return {"score_mean": self.mean, "score_spread": self.spread}

    def load_model(self, source: str, revision: str | None) -> nn.Module:
        return self._load(source, revision, num_labels=1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        standardized = (batch["targets"] - self.mean) / self.spread
        return (self._logits(model, batch).squeeze(-1) - standardized).square().mean()

    def fit_linear(
        self, features: Array, positions: Sequence[int], penalty: float, *, intercept: bool
    ) -> tuple[Array, Array]:
        from sklearn.linear_model import Ridge

        targets = (self.targets[list(positions)].astype(np.float64) - self.mean) / self.spread
        # the loss is the mean square, without a half
        fit = Ridge(alpha=penalty * len(targets) / 2, fit_intercept=intercept).fit(features, targets)
        return np.reshape(fit.coef_, (1, -1)), np.array([fit.intercept_])

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._logits(model, batch).squeeze(-1) * self.spread + self.mean

    def score(self, predictions: Array, targets: Array) -> dict[str, float | None]:
        error = float(np.sqrt(np.mean((predictions - targets) ** 2)))
        return {**_correlations(predictions, targets), "rmse": error}


def _pooling_of(source: str) -> str:
    file = Path(source) / "1_Pooling" / "config.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("pooling_mode_cls_token"):
        return "cls"
    return "mean"


def plain(value: Any) -> Any:
    """numpy scalars as Python's, and 1.0 as 1: CSV readers turn integer labels into floats when one is missing."""
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _correlations(predictions: Array, targets: Array) -> dict[str, float | None]:
    if len(targets) < 2 or np.ptp(predictions) == 0 or np.ptp(targets) == 0:
        return {"spearman": None, "pearson": None}
    found = {
        "spearman": float(stats.spearmanr(predictions, targets).statistic),
        "pearson": float(stats.pearsonr(predictions, targets).statistic),
    }
    return {name: value if math.isfinite(value) else None for name, value in found.items()}
