"""Text from text: with an encoder-decoder model, or by going on where a causal language model's prompt ends."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.finetuning.batching import Array, Batch
from rankwise.finetuning.data import Table
from rankwise.finetuning.tasks import Task, plain
from rankwise.finetuning.text_metrics import bleu, meteor, require_text_metrics, rouge

_IGNORED = -100  # what transformers' losses leave out


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

    def __init__(self, table: Table, tokenizer: Any, max_length: int, *, beams: int = 1):
        if beams < 1:
            raise UserError(f"beams must be at least 1, got {beams}")
        require_text_metrics()
        super().__init__(table, tokenizer, max_length)
        self.beams = beams

    def _targets(self) -> Array:
        targets = np.empty(len(self.table.rows), dtype=object)
        for index, row in enumerate(self.table.rows):
            targets[index] = _references(row["label"])
            if not targets[index] or not all(text.strip() for text in targets[index]):
                raise UserError(
                    f"column {self.table.columns.label!r} of {self.table.source} must hold the text to generate, or a "
                    f"list of such texts; row {row['row']} has {row['label']!r}"
                )
        return targets

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

    def score(self, predictions: Array, targets: Array) -> dict[str, float | None]:
        """Metrics of texts against a text or a sequence of texts each."""
        texts = [str(text) for text in predictions]
        references = [_references(target) for target in targets]
        if len(texts) != len(references):
            raise ValueError(f"{len(texts)} predictions for {len(references)} targets")
        return {"bleu": bleu(texts, references), **rouge(texts, references), **meteor(texts, references)}


class CausalLanguageModel(Generation):
    """Prompt and completion on a causal language model (GPT, Llama): the loss is on the completion's tokens alone.

    A row is the prompt's tokens, the completion's and the end token. Where both are longer than ``max_length`` the prompt
    loses its beginning. Predicted by going on from the prompt until the end token, at most ``max_length`` tokens more;
    scored as generated text.
    """

    name = "causal-lm"
    peft_task_type = "CAUSAL_LM"

    def load_model(self, source: str, revision: str | None) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config = AutoConfig.from_pretrained(source, revision=revision)
        made_for = " ".join(config.architectures or [])
        causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not config.is_encoder_decoder
        if not causal or (made_for and "CausalLM" not in made_for and "LMHead" not in made_for):
            raise UserError(
                f"causal-lm needs a causal language model such as GPT-2 or Llama, this is {config.model_type}"
                + (f" ({made_for})" if made_for else "")
            )
        return AutoModelForCausalLM.from_pretrained(
            source, revision=revision, use_safetensors=True, dtype=torch.float32
        )

    def collate(self, positions: Sequence[int]) -> Batch:
        """``input_ids``, ``attention_mask`` and ``labels`` (B, tokens), padded on the right; labels of prompts are −100."""
        rows = []
        for position in positions:
            completion = [*self._ids(self.targets[position][0]), self.tokenizer.eos_token_id][: self.max_length]
            room = self.max_length - len(completion)
            prompt = self._prompt(position)
            rows.append((prompt[len(prompt) - room :] if room < len(prompt) else prompt, completion))
        longest = max(len(prompt) + len(completion) for prompt, completion in rows)
        batch = {
            "input_ids": torch.full((len(rows), longest), self.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
            "labels": torch.full((len(rows), longest), _IGNORED),
        }
        for row, (prompt, completion) in enumerate(rows):
            end = len(prompt) + len(completion)
            batch["input_ids"][row, :end] = torch.tensor([*prompt, *completion])
            batch["attention_mask"][row, :end] = 1
            batch["labels"][row, len(prompt) : end] = torch.tensor(completion)
        return batch

    def predict(self, model: nn.Module, batch: Batch) -> list[str]:
        """What the model says after each row's prompt; the completion in the batch is not shown to it."""
        generator: Any = model
        lengths = ((batch["labels"] == _IGNORED) & (batch["attention_mask"] == 1)).sum(1)
        longest, new = self._room(model, int(lengths.max()))
        prompts = batch["input_ids"].new_full((len(lengths), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(prompts)
        for row, length in enumerate(lengths.tolist()):  # on the left: generation goes on at the right
            if length:
                kept = min(length, longest)
                prompts[row, -kept:] = batch["input_ids"][row, length - kept : length]
                mask[row, -kept:] = 1
            else:  # an empty prompt begins as the end of an earlier text
                prompts[row, -1], mask[row, -1] = self.tokenizer.eos_token_id, 1
        tokens = generator.generate(
            input_ids=prompts,
            attention_mask=mask,
            max_new_tokens=new,
            num_beams=self.beams,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        return self.tokenizer.batch_decode(tokens[:, longest:], skip_special_tokens=True)

    def _room(self, model: nn.Module, prompt: int) -> tuple[int, int]:
        """Tokens of the prompts to keep, and to generate, where the model has positions for so many only."""
        positions = getattr(getattr(model, "config", None), "max_position_embeddings", None) or prompt + self.max_length
        longest = max(1, min(prompt, positions - min(self.max_length, positions // 4)))
        return longest, min(self.max_length, positions - longest)

    def _prompt(self, position: int) -> list[int]:
        row = self.table.rows[position]
        text = row["text"] if not self.table.columns.text_pair else f"{row['text']}\n{row['text_pair']}"
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _references(label: Any) -> tuple[str, ...]:
    """The texts of a label: a tuple, so that labels can be compared and counted."""
    label = label.tolist() if isinstance(label, np.ndarray) else label
    texts = label if isinstance(label, list | tuple) else [label]
    return tuple("" if text is None else str(plain(text)) for text in texts)
