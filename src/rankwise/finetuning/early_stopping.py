"""Stopping when rows set apart get no better, and going back to where they were best."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.files import save_tensors, write_json

_STATE, _BEST = "early_stopping.json", "best.safetensors"


@dataclass
class _Progress:
    best_score: float | None = None
    best_step: int = 0
    without_gain: int = 0
    stopped: bool = False


class EarlyStopping(TrainerCallback):
    """Scores the model at the start and every so many steps; stops after ``patience`` scores in a row that are no better
    than the best, the start's among them.

    A score that is undefined (a constant prediction has no correlation) is worse than any. What was trained is kept as
    it was at the best score and belongs to every checkpoint, so that a resumed run decides as an uninterrupted one.

    Args:
        score: of the model on the rows set apart, the same on every process.
        every: steps between scores; the last step is scored too.
        patience: scores without gain before the end.
        greater_is_better: of the score.
        record: told (step, score) of each, to write them down.
    """

    def __init__(
        self,
        score: Callable[[nn.Module], float | None],
        *,
        every: int,
        patience: int,
        greater_is_better: bool,
        record: Callable[[int, float | None], None],
    ):
        self.score, self.every, self.patience, self.record = score, every, patience, record
        self._sign = 1.0 if greater_is_better else -1.0
        self._progress = _Progress()
        self._best: dict[str, Tensor] = {}

    @property
    def best_score(self) -> float | None:
        return self._progress.best_score

    @property
    def best_step(self) -> int:
        return self._progress.best_step

    @property
    def stopped(self) -> bool:
        return self._progress.stopped

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        if not self._best:  # else a checkpoint brought what was best so far
            self._score(0, model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        last = state.global_step >= state.max_steps
        if state.global_step % self.every and not last:
            return
        self._score(state.global_step, model)
        if self._progress.stopped and not last:
            control.should_save = True  # a run killed while it finishes must find that it had stopped
            control.should_training_stop = True

    def _score(self, step: int, model: nn.Module) -> None:
        score = self.score(model)
        self.record(step, score)
        seen = self._progress
        defined = score is not None and math.isfinite(score)
        if not self._best or (defined and (seen.best_score is None or self._sign * (score - seen.best_score) > 0)):  # type: ignore[operator]
            seen.best_score, seen.best_step, seen.without_gain = score if defined else None, step, 0
            self._best = {name: p.detach().to("cpu", copy=True) for name, p in _trained(model).items()}
        else:
            seen.without_gain += 1
        seen.stopped = seen.without_gain >= self.patience

    @torch.no_grad()
    def restore_best(self, model: nn.Module) -> None:
        """Put the parameters back to where the score was best."""
        for name, parameter in _trained(model).items():
            if name in self._best:
                parameter.copy_(self._best[name])

    def save(self, checkpoint: Path) -> None:
        write_json(checkpoint / _STATE, {"format_version": 1, **asdict(self._progress)})
        if self._best:
            save_tensors(self._best, checkpoint / _BEST, kind="early-stopping")

    def load(self, checkpoint: Path) -> None:
        if not (checkpoint / _STATE).is_file():
            return
        content = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        del content["format_version"]
        self._progress = _Progress(**content)
        self._best = load_file(checkpoint / _BEST) if (checkpoint / _BEST).is_file() else {}


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
