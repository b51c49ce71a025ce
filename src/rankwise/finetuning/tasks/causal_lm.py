"""Prompt and completion: going on where a causal language model's prompt ends."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.finetuning.batching import Batch
from rankwise.finetuning.packing import IGNORED, pack, packed_inputs, packed_prompts, require_packable
from rankwise.finetuning.tasks.generation import Generation


class CausalLanguageModel(Generation):
    """Prompt and completion on a causal language model (GPT, Llama): the loss is on the completion's tokens alone.

    A row is the prompt's tokens, the completion's and the end token. Where both are longer than ``max_length`` the prompt
    loses its beginning. Predicted by going on from the prompt until the end token, at most ``max_length`` tokens more;
    scored as generated text.

    Args:
        packing: put several rows of a batch into one sequence of up to ``max_length`` tokens, each with its own positions
            and attention to itself alone. The same rows are in a step and give the same loss and gradient; only padding
            goes. What a method draws for each row (direction dropout) is drawn for each sequence.

    Raises:
        UserError: with ``packing``, a model in which packed rows see each other (tried when it is loaded).
    """

    name = "causal-lm"
    peft_task_type = "CAUSAL_LM"

    options = ("packing",)

    def __init__(self, *args: Any, packing: bool = False, **options: Any):
        super().__init__(*args, **options)
        self.packing = packing

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "packing": self.packing}

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
        model = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, use_safetensors=True, dtype=torch.float32
        )
        if self.packing:
            require_packable(model)
        return model

    def collate(self, positions: Sequence[int]) -> Batch:
        """``input_ids``, ``attention_mask`` and ``labels`` (B, tokens), padded on the right; labels of prompts are −100.

        With ``packing`` what :func:`~rankwise.finetuning.packing.pack` makes of the same rows.
        """
        rows = [self._row(position) for position in positions]
        if self.packing:
            return pack(rows, self.max_length, self.tokenizer.pad_token_id)
        longest = max(len(prompt) + len(completion) for prompt, completion in rows)
        batch = {
            "input_ids": torch.full((len(rows), longest), self.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
            "labels": torch.full((len(rows), longest), IGNORED),
        }
        for row, (prompt, completion) in enumerate(rows):
            end = len(prompt) + len(completion)
            batch["input_ids"][row, :end] = torch.tensor([*prompt, *completion])
            batch["attention_mask"][row, :end] = 1
            batch["labels"][row, len(prompt) : end] = torch.tensor(completion)
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(**packed_inputs(batch)).loss if self.packing else super().loss(model, batch)

    def items(self, positions: Sequence[int]) -> int:
        """Tokens of the completions, but a row's first, which follows on nothing."""
        rows = [self._row(position) for position in positions]
        return sum(len(completion) - (not prompt) for prompt, completion in rows)

    def predict(self, model: nn.Module, batch: Batch) -> list[str]:
        """What the model says after each row's prompt; the completion in the batch is not shown to it."""
        generator: Any = model
        given = packed_prompts(batch) if self.packing else _padded_prompts(batch)
        longest, new = self._room(model, max(map(len, given)))
        prompts = batch["input_ids"].new_full((len(given), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(prompts)
        for row, prompt in enumerate(given):  # on the left: generation goes on at the right
            # an empty prompt begins as the end of an earlier text
            kept = prompt[-longest:] or [self.tokenizer.eos_token_id]
            prompts[row, -len(kept) :] = torch.tensor(kept)
            mask[row, -len(kept) :] = 1
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

    def _row(self, position: int) -> tuple[list[int], list[int]]:
        """Prompt and completion, at most ``max_length`` tokens together."""
        completion = [*self._ids(self.targets[position][0]), self.tokenizer.eos_token_id][: self.max_length]
        room, prompt = self.max_length - len(completion), self._prompt(position)
        return (prompt[len(prompt) - room :] if room < len(prompt) else prompt), completion

    def _prompt(self, position: int) -> list[int]:
        row = self.table.rows[position]
        text = row["text"] if not self.table.columns.text_pair else f"{row['text']}\n{row['text_pair']}"
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _padded_prompts(batch: Batch) -> list[list[int]]:
    """The prompt of every row."""
    prompts = (batch["labels"] == IGNORED) & (batch["attention_mask"] == 1)
    return [ids[kept].tolist() for ids, kept in zip(batch["input_ids"], prompts, strict=True)]
