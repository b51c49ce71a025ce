"""A head of the task's own on a pretrained body: how it is read off, fitted and trained on classes."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.finetuning.batching import Array, Batch, in_parts_of_equal_length
from rankwise.finetuning.class_weights import BALANCED, ClassWeights, class_weights, require_class_weights
from rankwise.finetuning.data import plain
from rankwise.finetuning.named_metrics import CLASS_METRICS
from rankwise.finetuning.table import TEXTS
from rankwise.finetuning.tasks.base import Task
from rankwise.finetuning.tasks.scores import CLASS_SCORES, TWO_CLASS_SCORES, class_scores

IGNORED = -100  # the target of what has none


class HeadTask(Task):
    """A model of transformers with a head whose last layer is linear."""

    has_head = True
    fitted_items: int | None = None
    """How many labelled items the head's first fit takes at most; None for all of them."""

    @abstractmethod
    def fit_linear(self, features: Array, targets: Array, penalty: float, *, intercept: bool) -> tuple[Array, Array]:
        """Weight (outputs, d) and bias (outputs,) that minimize this task's mean loss on these + penalty·‖W‖²/2.

        ``features`` are (n, d), ``targets`` (n,) as in a batch; without ``intercept`` the bias counts for nothing.
        """

    def labelled_features(
        self, features: Tensor, outputs: Tensor, logits: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Features (n, d) that carry a label, and the labels (n,), of what the head's last layer saw of a batch.

        Args:
            features, outputs: what the layer took and gave, (B, d) and (B, k), or (B, tokens, …).
            logits: what the model gave.
        """
        if features.dim() == 3:  # a head on every token, of which the model takes one: the one that is its output
            token = (outputs - logits.unsqueeze(1)).abs().sum(-1).argmin(1)
            features = features[torch.arange(len(features)), token]
        return features, batch["targets"]

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return in_parts_of_equal_length(batch, lambda inputs: model(**inputs).logits.float())


class ClassHead(HeadTask):
    """A head that tells classes apart, trained by cross-entropy.

    Args:
        class_weights: ``balanced``, or a weight by class name (:func:`~rankwise.finetuning.class_weights.class_weights`).
            The loss is Σ w(y)·cross-entropy / n with n items, not / Σ w(y) as torch divides: its gradient is then right
            on average for every batch size, and the same objective as scikit-learn's ``class_weight``.

    Raises:
        UserError: one class only, weights of unknown classes or that are no finite numbers of at least 0.
    """

    options = ("class_weights",)
    known_metrics = CLASS_METRICS
    classes: list[str]

    def __init__(self, *args: Any, class_weights: ClassWeights | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.class_weights = class_weights
        self.weights: Array = np.ones(len(self.classes))
        if class_weights is not None:
            require_class_weights(class_weights, self.classes)
            self.learn_scale(range(len(self.table.rows)))

    def learn_scale(self, positions: Sequence[int]) -> None:
        if self.class_weights is not None:
            self.weights = class_weights(self.class_weights, self.classes, self._class_numbers(positions))

    @abstractmethod
    def _class_numbers(self, positions: Sequence[int]) -> Array:
        """Class numbers of everything that has one in these rows."""

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = {"classes": self.classes}
        if self.class_weights is not None:
            kind = BALANCED if self.class_weights == BALANCED else "given"
            weights = dict(zip(self.classes, self.weights.tolist(), strict=True))
            found |= {"class_weights": kind, "class_weights_used": weights}
        return found

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = self._logits(model, batch).flatten(0, -2)
        targets = batch["targets"].flatten()
        if self.class_weights is None:
            return nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED)
        weights = torch.as_tensor(self.weights, dtype=logits.dtype, device=logits.device)
        total = nn.functional.cross_entropy(logits, targets, weights, ignore_index=IGNORED, reduction="sum")
        return total / (targets != IGNORED).sum()

    def fit_linear(self, features: Array, targets: Array, penalty: float, *, intercept: bool) -> tuple[Array, Array]:
        from sklearn.linear_model import LogisticRegression

        # what has no weight is not there: scikit-learn would count its class all the same
        kept = self.weights[targets] > 0
        features, targets, n = features[kept], targets[kept], len(targets)
        seen = np.unique(targets)
        # a class without a row gets the bias of half a row
        weight, bias = np.zeros((len(self.classes), features.shape[1])), np.full(len(self.classes), -np.log(2 * n))
        bias[seen] = -np.log(len(seen))
        if len(seen) > 1:
            fit = LogisticRegression(C=1 / (penalty * n), max_iter=1000, fit_intercept=intercept)
            fit.fit(features, targets, sample_weight=self.weights[targets])
            two = len(seen) == 2  # scikit-learn then gives the log-odds of the second
            weight[seen] = np.vstack([-fit.coef_, fit.coef_]) / 2 if two else fit.coef_
            slopes = np.concatenate([-fit.intercept_, fit.intercept_]) / 2 if two else fit.intercept_
            bias[seen] += slopes - slopes.mean()
        return weight, bias

    def _best_class(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = self._logits(model, batch)
        if not bool(torch.isfinite(logits).all()):  # argmax would make a class of them
            raise UserError("training diverged: the model's outputs are NaN or infinite numbers; lower --lr")
        return logits.argmax(-1)

    def _label_names(self) -> dict[str, Any]:
        """What transformers' configurations call the classes."""
        names = dict(enumerate(self.classes))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: k for k, name in names.items()}}

    def _read_classes(self, labels: Iterable[str]) -> dict[str, int]:
        """The classes in order, and the number of each."""
        names = set(labels)
        self.classes = sorted(names, key=lambda name: (len(name), name) if name.isdigit() else (99, name))
        if len(self.classes) < 2:
            raise UserError(
                f"column {self.table.columns.label!r} of {self.table.source} has one class only "
                f"({self.classes[0]!r}); {self.name} needs at least two"
            )
        return {name: number for number, name in enumerate(self.classes)}


class ClassOfRow(ClassHead):
    """One class a row, of a text or an image."""

    primary_metric = "accuracy"

    def _targets(self) -> Array:
        labels = [str(plain(row["label"])) for row in self.table.rows]
        numbers = self._read_classes(labels)
        if len(self.classes) > max(2, len(labels) // 2):
            raise UserError(
                f"column {self.table.columns.label!r} has {len(self.classes)} classes in {len(labels)} rows; "
                + (
                    "if these are scores, use --task regression"
                    if self.table_kind == TEXTS
                    else "expected several of each"
                )
            )
        return np.array([numbers[label] for label in labels], dtype=np.int64)

    def _class_numbers(self, positions: Sequence[int]) -> Array:
        return self.targets[list(positions)]

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._best_class(model, batch)

    def in_words(self, values: Sequence[Any]) -> list[Any]:
        return [self.classes[int(number)] for number in values]

    def _own_metrics(self) -> tuple[str, ...]:
        return (*CLASS_SCORES, *(TWO_CLASS_SCORES if len(self.classes) == 2 else ()))

    def _scores(self, predictions: Array, targets: Array) -> dict[str, float | None]:
        return class_scores(predictions, targets, self.classes)
