"""The texts of a run, as batches of the model's tokens."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rankwise.compression import token_windows
from rankwise.compression_runs.loading import LoadedModel
from rankwise.compression_runs.settings import CompressionSettings, is_table
from rankwise.errors import UserError
from rankwise.finetuning.data import read_texts
from rankwise.finetuning.models import text_length

ROWS = 8  # texts a batch
SCORED = 500  # texts or windows scored on at most
_HELD_OUT = 5  # without --eval every fifth text is kept from calibration and scored on


class Parts(NamedTuple):
    """Texts, or windows of tokens for a causal language model: to calibrate on, to score on, and where the latter are from."""

    calibration: list[Any]
    held_out: list[Any]
    about: str


class Texts:
    """What the run's model reads, and how."""

    def __init__(self, loaded: LoadedModel, settings: CompressionSettings):
        self.loaded, self.settings = loaded, settings
        self.length = text_length(loaded.model, settings.max_length)

    def parts(self) -> Parts:
        """Drawn by the seed; a fifth is held out where there is no ``--eval``.

        Raises:
            UserError: a file that cannot be read, or too few texts.
        """
        asked = self.settings
        units = [] if asked.calibrate is None else self._units(asked.calibrate)
        order = list(range(len(units)))
        random.Random(asked.seed).shuffle(order)
        held_out: list[Any] = []
        about = f"a fifth of {Path(asked.calibrate or '').name}"
        if asked.eval is None and units:
            if len(units) < _HELD_OUT:
                raise UserError(
                    f"{asked.calibrate} has {len(units)} texts or windows of {asked.max_length} tokens; give at least "
                    f"{_HELD_OUT}, or name other text to score on with --eval"
                )
            held_out = [units[place] for place in order[::_HELD_OUT][:SCORED]]
            order = [place for index, place in enumerate(order) if index % _HELD_OUT]
        elif asked.eval is not None and asked.task is None:
            held_out, about = self._units(asked.eval)[:SCORED], Path(asked.eval).name
        return Parts([units[place] for place in order[: asked.calibrate_rows]], held_out, about)

    def batches(self, units: Sequence[Any]) -> list[dict[str, Any]]:
        """As the model takes them."""
        if self.loaded.predicts_tokens:
            return [{"input_ids": torch.stack(list(units[s : s + ROWS]))} for s in range(0, len(units), ROWS)]
        ordered = sorted(units, key=len)  # equal lengths together: little padding
        return [self.tokens(ordered[s : s + ROWS]) for s in range(0, len(ordered), ROWS)]

    def tokens(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> dict[str, Any]:
        """One batch of texts, or of pairs of them."""
        return dict(
            self.loaded.tokenizer(
                list(texts), pairs, padding=True, truncation=True, max_length=self.length, return_tensors="pt"
            )
        )

    def _units(self, file: str) -> list[Any]:
        """Windows of tokens for a causal language model, texts for any other."""
        texts = self._lines(file)
        if not self.loaded.predicts_tokens:
            return texts
        ids = self.loaded.tokenizer("\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [window for batch in token_windows(torch.tensor(ids), self.length, 1) for window in batch]

    def _lines(self, file: str) -> list[str]:
        asked = self.settings
        if is_table(file):
            return read_texts(file, text=asked.text, text_pair=asked.text_pair, label=asked.label)
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 (byte {error.start} cannot be read); save it as UTF-8") from None
        texts = [line for line in lines if line.strip()]
        if not texts:
            raise UserError(f"{file} is empty; expected text, a line each")
        return texts
