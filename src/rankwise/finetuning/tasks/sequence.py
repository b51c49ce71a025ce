"""A class or a number for one or two texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.finetuning.batching import Array, Batch
from rankwise.finetuning.data import numeric_labels
from rankwise.finetuning.named_metrics import NUMBER_METRICS
from rankwise.finetuning.tasks.heads import ClassOfRow, HeadTask
from rankwise.finetuning.tasks.scores import CORRELATIONS, correlations


class SequenceHead(HeadTask):
    """A sequence classifier of transformers."""

    peft_task_type = "SEQ_CLS"

    def collate(self, positions: Sequence[int]) -> Batch:
        rows = [self.table.rows[position] for position in positions]
        pairs = [row["text_pair"] for row in rows] if self.table.columns.text_pair else None
        batch = self._tokens([row["text"] for row in rows], pairs)
        batch["targets"] = torch.as_tensor(self.targets[list(positions)])
        return batch

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


class Classification(SequenceHead, ClassOfRow):
    """Cross-entropy on the classes found in the label column.

    Of two classes the last in the order of ``classes`` is the positive one of ``f1`` ("1" of "0" and "1");
    ``accuracy_f1`` is the mean of accuracy and ``f1``, GLUE's official figure for MRPC and QQP.
    """

    name = "classification"

    def load_model(self, source: str, revision: str | None) -> nn.Module:
        return self._load(source, revision, **self._label_names())


class Regression(SequenceHead):
    """Squared error on the standardized score; predictions come back in the label's units."""

    name = "regression"
    primary_metric = "spearman"
    known_metrics = NUMBER_METRICS

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

    def fit_linear(self, features: Array, targets: Array, penalty: float, *, intercept: bool) -> tuple[Array, Array]:
        from sklearn.linear_model import Ridge

        targets = (targets.astype(np.float64) - self.mean) / self.spread
        # the loss is the mean square, without a half
        fit = Ridge(alpha=penalty * len(targets) / 2, fit_intercept=intercept).fit(features, targets)
        return np.reshape(fit.coef_, (1, -1)), np.array([fit.intercept_])

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._logits(model, batch).squeeze(-1) * self.spread + self.mean

    def _own_metrics(self) -> tuple[str, ...]:
        return (*CORRELATIONS, "rmse")

    def _scores(self, predictions: Array, targets: Array) -> dict[str, float | None]:
        error = float(np.sqrt(np.mean((predictions - targets) ** 2)))
        return {**correlations(predictions, targets), "rmse": error}
