"""Two texts and how similar they are, on an embedding model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.finetuning.batching import Array, Batch, in_parts_of_equal_length
from rankwise.finetuning.data import numeric_labels
from rankwise.finetuning.named_metrics import NUMBER_METRICS
from rankwise.finetuning.tasks.base import Task
from rankwise.finetuning.tasks.scores import CORRELATIONS, correlations


class PairSimilarity(Task):
    """A bi-encoder: both texts through one embedding model, cosine of the pooled vectors, squared loss on the score.

    Scores are mapped to [0, 1] (or [−1, 1]) by their usual ranges: within [−1, 1] as they are, within [0, 5] divided
    by 5, anything else by the range seen. Predictions and metrics are on the mapped scale.
    """

    name = "pair-similarity"
    primary_metric = "spearman"
    peft_task_type = "FEATURE_EXTRACTION"
    ridge_fits = True
    known_metrics = NUMBER_METRICS

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

        self.pooling = pooling_of(source)
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

    def _own_metrics(self) -> tuple[str, ...]:
        return CORRELATIONS

    def _scores(self, predictions: Array, targets: Array) -> dict[str, float | None]:
        return correlations(predictions, targets)


def pooling_of(source: str) -> str:
    """How a sentence-transformers folder pools its tokens: "cls", or "mean" as all others do."""
    file = Path(source) / "1_Pooling" / "config.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("pooling_mode_cls_token"):
        return "cls"
    return "mean"
