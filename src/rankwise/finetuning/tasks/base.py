"""What every task has: rows in, losses, predictions and scores out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.finetuning.batching import Array, Batch
from rankwise.finetuning.named_metrics import Metric, WantedMetric, chosen_metrics
from rankwise.finetuning.table import IMAGES, TEXTS, WORDS, Table

_KINDS = {TEXTS: "rows of text", WORDS: "lists of words with a tag each", IMAGES: "images"}
_LOWER_IS_BETTER = ("rmse",)


class Task(ABC):
    """One kind of label. ``__init__`` has read the labels; the rest turns rows into losses, predictions and scores.

    Args:
        table: the rows.
        tokenizer: of the model; an image processor for images.
        max_length: tokens kept of a text.
        metrics: more to report: names out of ``known_metrics``, functions ``(predictions, targets) -> float`` with a
            name, or :class:`~rankwise.finetuning.named_metrics.Metric`.
        primary_metric: which of the reported ones decides, the task's own unless given.

    Raises:
        UserError: a table of another kind, labels that do not fit, an unknown metric.
    """

    name: str
    primary_metric: str
    peft_task_type: str | None
    has_head: bool = False
    """Whether the model carries a head of this task's own on top of the pretrained body."""
    ridge_fits: bool = False
    """Whether ``predict`` gives one differentiable number a row that the pretrained model has already learned to give:
    what a closed-form fit needs. A head at its random start has not."""
    table_kind: ClassVar[str] = TEXTS
    options: ClassVar[tuple[str, ...]] = ()
    """What its constructor takes besides."""
    known_metrics: ClassVar[Mapping[str, Metric]] = {}

    def __init__(
        self,
        table: Table,
        tokenizer: Any,
        max_length: int,
        *,
        metrics: Sequence[WantedMetric] = (),
        primary_metric: str | None = None,
    ):
        if table.kind != self.table_kind:
            raise UserError(
                f"{self.name} needs {_KINDS[self.table_kind]}; {table.source} has {_KINDS[table.kind]} "
                f"(column {table.columns.text!r})"
            )
        self.table, self.tokenizer, self.max_length = table, tokenizer, max_length
        self.targets = self._targets()
        self.extra_metrics = chosen_metrics(metrics, self.known_metrics, self._own_metrics(), self.name)
        if primary_metric is not None:
            reported = [*self._own_metrics(), *(metric.name for metric in self.extra_metrics)]
            if primary_metric not in reported:
                raise UserError(
                    f"{self.name} does not report {primary_metric!r}; it reports {', '.join(reported)} "
                    "(ask for more metrics by name)"
                )
            self.primary_metric = primary_metric

    @property
    def greater_is_better(self) -> bool:
        """Whether a larger primary metric is a better one."""
        extra = {metric.name: metric.greater_is_better for metric in self.extra_metrics}
        return extra.get(self.primary_metric, self.primary_metric not in _LOWER_IS_BETTER)

    @abstractmethod
    def _targets(self) -> Array:
        """One target per row of the table."""

    @abstractmethod
    def _own_metrics(self) -> tuple[str, ...]:
        """Names of what :meth:`_scores` gives."""

    @abstractmethod
    def _scores(self, predictions: Array, targets: Array) -> dict[str, float | None]:
        """The task's own metrics."""

    @abstractmethod
    def collate(self, positions: Sequence[int]) -> Batch:
        """Input tensors and targets of these rows of the table."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch, over its :meth:`items`."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> Tensor | list[str]:
        """One prediction per row: (B,) scores or class numbers, or B texts."""

    @abstractmethod
    def load_model(self, source: str, revision: str | None) -> nn.Module:
        """The pretrained model this task trains, in float32."""

    def score(self, predictions: Array, targets: Array) -> dict[str, float | None]:
        """Metrics by name; None where one is undefined (a constant prediction has no correlation)."""
        found = self._scores(predictions, targets)
        if self.extra_metrics:
            inputs = self._metric_inputs(predictions, targets)
            found |= {metric.name: metric(*inputs) for metric in self.extra_metrics}
        return found

    def items(self, positions: Sequence[int]) -> int:
        """How many things the mean loss over these rows is the mean of."""
        return len(positions)

    def token_count(self, position: int) -> int:
        """Tokens of a row before any cut; 0 where rows have none."""
        row = self.table.rows[position]
        return len(self.tokenizer(row["text"], row["text_pair"])["input_ids"])

    def require_training_labels(self, positions: Sequence[int]) -> None:
        """Refuse training rows that leave nothing to learn.

        Raises:
            UserError: all have the same label.
        """
        if len(np.unique(self.targets[list(positions)])) < 2:
            raise UserError(
                f"all {len(positions)} training rows have the same label; take more --shots or another --seed"
            )

    def learn_scale(self, positions: Sequence[int]) -> None:  # noqa: B027  # most tasks have no scale
        """Take whatever the loss is scaled or weighted by from the training rows alone."""

    def in_words(self, values: Sequence[Any]) -> list[Any]:
        """Predictions or targets as a person reads them, for ``predictions.csv``."""
        return list(values)

    def notes(self, positions: Sequence[int]) -> list[str]:
        """What a person should know of these rows before the run, a sentence each."""
        return []

    def describe(self) -> dict[str, Any]:
        """What a reader of the run's config.json wants to know about the labels."""
        return {}

    def modules_left_out(self, model: nn.Module) -> list[str]:
        """Linear layers that the loss never reaches."""
        return []

    def _metric_inputs(self, predictions: Array, targets: Array) -> tuple[Array, Array]:
        return predictions, targets

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
