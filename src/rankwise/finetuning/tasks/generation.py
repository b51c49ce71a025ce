"""Text from text with an encoder-decoder model."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.finetuning.batching import Array, Batch
from rankwise.finetuning.data import plain
from rankwise.finetuning.named_metrics import TEXT_METRICS
from rankwise.finetuning.table import Table
from rankwise.finetuning.tasks.base import Task
from rankwise.finetuning.text_metrics import ROUGE, bleu, meteor, meteor_names, require_text_metrics, rouge


class Generation(Task):
    """Text from text with an encoder-decoder model (T5, BART); the label is the text, or a list of texts that all do.

    Trained on the first text of a list, by the model's own cross-entropy over the target's tokens. Predicted greedily
    (``beams`` = 1) or by beam search, at most ``max_length`` tokens. Scored against all texts of a list:

    - ``bleu``: sacrebleu's corpus BLEU (13a tokens, exponential smoothing) **divided by 100**, so that like every
      metric here it lies in [0, 1]; the E2E challenge's own script tokenizes otherwise and gives other figures;
    - ``rouge1``, ``rouge2``, ``rougeL``, ``rougeLsum``: F-measures of the rouge-score package without stemming, of the
      best reference, mean over rows. It knows Latin letters and digits only. ``rougeLsum`` takes a line for a sentence;
    - ``meteor`` only where NLTK finds WordNet on this machine (never downloaded): NLTK's, of the best reference, mean
      over rows.

    Raises:
        UserError: sacrebleu or rouge-score is missing, or a label is no text.
    """

    name = "generation"
    primary_metric = "bleu"
    peft_task_type = "SEQ_2_SEQ_LM"

    known_metrics = TEXT_METRICS

    def __init__(self, table: Table, tokenizer: Any, max_length: int, *, beams: int = 1, **options: Any):
        if beams < 1:
            raise UserError(f"beams must be at least 1, got {beams}")
        require_text_metrics()
        super().__init__(table, tokenizer, max_length, **options)
        self.beams = beams

    def _targets(self) -> Array:
        targets = np.empty(len(self.table.rows), dtype=object)
        for index, row in enumerate(self.table.rows):
            targets[index] = references(row["label"])
            if not targets[index] or not all(text.strip() for text in targets[index]):
                raise UserError(
                    f"column {self.table.columns.label!r} of {self.table.source} must hold the text to generate, or a "
                    f"list of such texts; row {row['row']} has {row['label']!r}"
                )
        return targets

    def in_words(self, values: Sequence[Any]) -> list[Any]:
        """A text as it is; several that all do as a JSON list."""
        known = [references(value) for value in values]
        return [texts[0] if len(texts) == 1 else json.dumps(texts, ensure_ascii=False) for texts in known]

    def describe(self) -> dict[str, Any]:
        return {"references": sum(len(texts) for texts in self.targets), "beams": self.beams}

    def load_model(self, source: str, revision: str | None) -> nn.Module:
        from transformers import AutoConfig, AutoModelForSeq2SeqLM

        config = AutoConfig.from_pretrained(source, revision=revision)
        if not config.is_encoder_decoder:
            raise UserError(
                f"generation needs an encoder-decoder model such as T5 or BART, this is {config.model_type}"
            )
        return AutoModelForSeq2SeqLM.from_pretrained(
            source, revision=revision, use_safetensors=True, dtype=torch.float32
        )

    def collate(self, positions: Sequence[int]) -> Batch:
        """``input_ids``, ``attention_mask`` (B, tokens) and ``labels`` (B, target tokens), padded with −100."""
        rows = [self.table.rows[position] for position in positions]
        pairs = [row["text_pair"] for row in rows] if self.table.columns.text_pair else None
        tokens = self._tokens([row["text"] for row in rows], pairs)
        batch = {key: tokens[key] for key in ("input_ids", "attention_mask")}  # T5 takes no token types
        wanted = self.tokenizer(
            text_target=[self.targets[position][0] for position in positions],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        # by the mask: in some tokenizers padding is the end token, which must be learnt
        batch["labels"] = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, -100)
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(**batch).loss

    def predict(self, model: nn.Module, batch: Batch) -> list[str]:
        generator: Any = model
        tokens = generator.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=self.max_length,
            num_beams=self.beams,
            do_sample=False,
        )
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def items(self, positions: Sequence[int]) -> int:
        return int((self.collate(positions)["labels"] != -100).sum())

    def _own_metrics(self) -> tuple[str, ...]:
        return ("bleu", *ROUGE, *meteor_names())

    def _scores(self, predictions: Array, targets: Array) -> dict[str, float | None]:
        texts, known = self._metric_inputs(predictions, targets)
        return {"bleu": bleu(texts, known), **rouge(texts, known), **meteor(texts, known)}

    def _metric_inputs(self, predictions: Array, targets: Array) -> tuple[Array, Array]:
        """Texts, and a tuple of texts for each."""
        texts, known = [str(text) for text in predictions], [references(target) for target in targets]
        if len(texts) != len(known):
            raise ValueError(f"{len(texts)} predictions for {len(known)} targets")
        return texts, known


def references(label: Any) -> tuple[str, ...]:
    """The texts of a label: a tuple, so that labels can be compared and counted."""
    label = label.tolist() if isinstance(label, np.ndarray) else label
    texts = label if isinstance(label, list | tuple) else [label]
    return tuple("" if text is None else str(plain(text)) for text in texts)
