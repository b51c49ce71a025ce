"""A tag for every word: named entities, parts of speech."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn import metrics
from torch import Tensor, nn
from torch.nn import functional

from rankwise.errors import UserError
from rankwise.finetuning.batching import Array, Batch, in_parts_of_equal_length
from rankwise.finetuning.data import plain
from rankwise.finetuning.entities import OUTSIDE, are_bio_tags, entity_scores
from rankwise.finetuning.table import WORDS
from rankwise.finetuning.tasks.heads import IGNORED, ClassHead

_UNSEEN = "<unseen>"  # the tag of a word that the model was not shown, where no tag means "nothing"


class TokenClassification(ClassHead):
    """Cross-entropy on the tag of every word, read at the word's first sub-token.

    A prediction is one text a row: the tags of its words, with blanks between them, as are the targets. A word that is
    cut off at ``max_length``, or of which the tokenizer makes nothing, is predicted to be ``O`` (no entity) where the
    tags have that, and is wrong in any case where they do not.

    Scored are the share of words that are right (``accuracy``) and F1 averaged over tags (``f1_macro``); where the tags
    are ``O``, ``B-x`` and ``I-x`` also ``entity_f1``, ``entity_precision`` and ``entity_recall`` over whole entities,
    read as CoNLL's script reads them. The first of these decides then, accuracy elsewhere. More metrics are given the
    tags of all words in one row. The head's start is fitted to at most ``fitted_items`` words.

    Raises:
        UserError: one tag only, a tag with a blank in it, a tokenizer that cannot say which word a token is of.
    """

    name = "token-classification"
    primary_metric = "accuracy"
    peft_task_type = "TOKEN_CLS"
    table_kind = WORDS
    fitted_items = 10_000

    def __init__(self, table: Any, tokenizer: Any, max_length: int, **options: Any):
        super().__init__(table, _for_words(tokenizer), max_length, **options)

    def _targets(self) -> Array:
        tags = [tuple(str(plain(tag)) for tag in row["label"]) for row in self.table.rows]
        for row, names in zip(self.table.rows, tags, strict=True):
            odd = next((name for name in names if not name or any(letter.isspace() for letter in name)), None)
            if odd is not None:
                raise UserError(
                    f"row {row['row']} of {self.table.source} has the tag {odd!r}; tags must have no blanks"
                )
        numbers = self._read_classes(name for names in tags for name in names)
        self._numbers = [[numbers[name] for name in names] for names in tags]
        self.has_entities = are_bio_tags(self.classes)
        if self.has_entities:
            self.primary_metric = "entity_f1"
        self._missed = OUTSIDE if OUTSIDE in self.classes else _UNSEEN
        targets = np.empty(len(tags), dtype=object)
        targets[:] = [" ".join(names) for names in tags]
        return targets

    def load_model(self, source: str, revision: str | None) -> nn.Module:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification.from_pretrained(
            source,
            revision=revision,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a head trained for other tags starts anew
            **self._label_names(),
        )

    def collate(self, positions: Sequence[int]) -> Batch:
        """Token tensors (B, tokens), and besides ``targets`` (B, tokens), the class number at a word's first sub-token and
        −100 elsewhere, ``word_places`` (B, tokens), the word's number there and −1, and ``word_counts`` (B,)."""
        words = [list(self.table.rows[position]["words"]) for position in positions]
        encoded = self.tokenizer(
            words,
            is_split_into_words=True,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        batch = dict(encoded)
        places = np.full(tuple(batch["input_ids"].shape), -1)
        targets = np.full(places.shape, IGNORED)
        for index, position in enumerate(positions):
            of_token = np.array([-1 if word is None else word for word in encoded.word_ids(index)])
            first = (of_token >= 0) & (of_token != np.concatenate([[-1], of_token[:-1]]))
            places[index, first] = of_token[first]
            targets[index, first] = np.array(self._numbers[position])[of_token[first]]
        batch["targets"], batch["word_places"] = torch.as_tensor(targets), torch.as_tensor(places)
        batch["word_counts"] = torch.tensor([len(row) for row in words])
        return batch

    def predict(self, model: nn.Module, batch: Batch) -> list[str]:
        found = self._best_class(model, batch).cpu().tolist()
        texts = []
        for row, places, count in zip(found, batch["word_places"].tolist(), batch["word_counts"].tolist(), strict=True):
            tags = [self._missed] * count
            for number, place in zip(row, places, strict=True):
                if place >= 0:
                    tags[place] = self.classes[number]
            texts.append(" ".join(tags))
        return texts

    def labelled_features(
        self, features: Tensor, outputs: Tensor, logits: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        labelled = batch["targets"] != IGNORED
        return features[labelled.to(features.device)], batch["targets"][labelled]

    def items(self, positions: Sequence[int]) -> int:
        return int((self.collate(positions)["targets"] != IGNORED).sum())

    def notes(self, positions: Sequence[int]) -> list[str]:
        words, seen = sum(len(self._numbers[p]) for p in positions), self.items(positions)
        if seen == words:
            return []
        return [
            f"{words - seen:,} of {words:,} words are not seen: the model reads {self.max_length} tokens of a row (--max-length)"
        ]

    def token_count(self, position: int) -> int:
        words = list(self.table.rows[position]["words"])
        return len(self.tokenizer(words, is_split_into_words=True)["input_ids"])

    def require_training_labels(self, positions: Sequence[int]) -> None:
        if len(np.unique(self._class_numbers(positions))) < 2:
            raise UserError(
                f"all words of the {len(positions)} training rows have the same tag; take more --shots or another --seed"
            )

    def _class_numbers(self, positions: Sequence[int]) -> Array:
        return np.concatenate([self._numbers[position] for position in positions])

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens = batch["input_ids"].shape[1]

        def run(part: Batch) -> Tensor:
            logits = model(**part).logits.float()
            return functional.pad(logits, (0, 0, 0, tokens - logits.shape[1]))  # a shorter part of the batch

        return in_parts_of_equal_length(batch, run)

    def _own_metrics(self) -> tuple[str, ...]:
        return (
            *(("entity_f1", "entity_precision", "entity_recall") if self.has_entities else ()),
            "accuracy",
            "f1_macro",
        )

    def _scores(self, predictions: Array, targets: Array) -> dict[str, float | None]:
        guessed, true = self._metric_inputs(predictions, targets)
        names = sorted({*guessed.tolist(), *true.tolist()} - {_UNSEEN})
        flat: dict[str, float | None] = {
            "accuracy": float(metrics.accuracy_score(true, guessed)),
            "f1_macro": float(metrics.f1_score(true, guessed, labels=names, average="macro", zero_division=0)),
        }
        if not self.has_entities:
            return flat
        return {**entity_scores([row.split() for row in predictions], [row.split() for row in targets]), **flat}

    def _metric_inputs(self, predictions: Array, targets: Array) -> tuple[Array, Array]:
        guessed, true = ([row.split() for row in rows] for rows in (predictions, targets))
        if [len(row) for row in guessed] != [len(row) for row in true]:
            raise ValueError("predictions and targets must have a tag for the same words")
        return np.concatenate(guessed), np.concatenate(true)


def _for_words(tokenizer: Any) -> Any:
    """The tokenizer, with a blank before every word where it is one that tells words by their blanks (GPT-2, RoBERTa)."""
    if tokenizer is None:
        return None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"token classification needs a tokenizer that says which word a token is of; {type(tokenizer).__name__} is a "
            "slow one. Convert it to tokenizer.json"
        )
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.pre_tokenizers import Sequence as PreTokenizers

    kept = copy.deepcopy(tokenizer)  # not to change what other tasks use
    before: Any = kept.backend_tokenizer.pre_tokenizer
    parts: Any = before if isinstance(before, PreTokenizers) else [before]
    for part in parts:
        if isinstance(part, ByteLevel):
            part.add_prefix_space = True
    return kept
