"""ReLoRA inside a transformers Trainer: when to restart, the jagged schedule, and checkpoints that hold the base weights."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.errors import UserError
from rankwise.files import save_tensors, write_json
from rankwise.optimizers.jagged_schedule import jagged
from rankwise.optimizers.relora import ReLora
from rankwise.optimizers.state_pruning import StatePruning

_WEIGHTS, _COUNTS = "relora_base_weights.safetensors", "relora.json"
_CYCLES = 4  # of a run that is not told how many


class ReLoraRestarts(TrainerCallback):
    """Makes a Trainer's LoRA a ReLoRA: restarts every so many optimizer steps, and warms up again after each.

    Steps are the optimizer's: accumulation changes nothing. After the last step the adapter stays as it is. The schedule is
    whatever the Trainer has, cut to 0 after every restart (:func:`rankwise.optimizers.jagged_schedule.jagged`); give it a
    cosine for the paper's.

    The base weights change. Every checkpoint gets ``relora_base_weights.safetensors`` beside the adapter, and a run that goes
    on from one of ``args.output_dir`` puts them back. When training is over, save ``model.merge_and_unload()``.

    Args:
        every: optimizer steps between restarts; a quarter of the run unless given.
        rewarmup_steps: after each; a tenth of ``every`` unless given.
        pruning: of the optimizer's state, see :class:`rankwise.optimizers.ReLora`.

    Attributes:
        relora: the :class:`ReLora` of the run, once it has begun.

    Raises:
        UserError: when training begins: a model or optimizer that ReLora refuses, a scheduler that is no ``LambdaLR``,
            ``load_best_model_at_end`` (it would put an old adapter on newer weights), a checkpoint without its base weights.
    """

    def __init__(
        self, every: int | None = None, *, rewarmup_steps: int | None = None, pruning: StatePruning | None = None
    ):
        if every is not None and every < 1:
            raise UserError(f"every counts optimizer steps and must be at least 1, got {every}")
        self.every, self.rewarmup_steps, self.pruning = every, rewarmup_steps, pruning
        self.relora: ReLora | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any,
        optimizer: Any,
        lr_scheduler: Any,
        **_: Any,
    ) -> None:
        """Look whether all fits, make the schedule jagged, and take up what a checkpoint brought."""
        if args.load_best_model_at_end:
            raise UserError(
                "load_best_model_at_end puts the best checkpoint's adapter on the base weights of the end, which ReLoRA has "
                "changed since; leave it out"
            )
        every = self._steps_between(state)
        rewarmup = every // 10 if self.rewarmup_steps is None else self.rewarmup_steps
        try:
            self.relora = ReLora(model, optimizer, pruning=self.pruning, seed=args.seed)
            if rewarmup:
                _make_jagged(lr_scheduler, every, rewarmup)
        except ValueError as error:
            raise UserError(f"ReLoRA cannot train this: {error}") from None
        if state.global_step:
            _read(self.relora, Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # called once a step of the optimizer, when the gradients are zero and before a checkpoint is written
        due = state.global_step % self._steps_between(state) == 0 and state.global_step < state.max_steps
        if self.relora is not None and due:
            self.relora.merge_and_restart()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.relora is not None and state.is_world_process_zero:
            _write(self.relora, Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")

    def _steps_between(self, state: TrainerState) -> int:
        return self.every or math.ceil(state.max_steps / _CYCLES)


def _make_jagged(schedule: Any, every: int, rewarmup: int) -> None:
    if not isinstance(schedule, LambdaLR):
        raise ValueError(
            f"warming up again multiplies the factors of a LambdaLR, and the Trainer's scheduler is {type(schedule).__name__}; "
            "take another lr_scheduler_type, or rewarmup_steps=0"
        )
    # a LambdaLR reads its functions anew at every step, and transformers' schedules are stateless
    schedule.lr_lambdas = [
        jagged(factor, restart_every=every, rewarmup_steps=rewarmup) for factor in schedule.lr_lambdas
    ]


def _write(relora: ReLora, checkpoint: Path) -> None:
    """The weights first: where the counts stand, the weights do too."""
    content = relora.state_dict()
    save_tensors(content.pop("base_weights"), checkpoint / _WEIGHTS, kind="relora-base-weights")
    write_json(checkpoint / _COUNTS, {**content, "factors_sha256": _fingerprint(relora)})


def _read(relora: ReLora, checkpoint: Path) -> None:
    if not (checkpoint / _COUNTS).is_file():
        raise UserError(
            f"{checkpoint} has no {_COUNTS}: the base weights that ReLoRA changed are not there, and the adapter alone is not "
            "the model; go on from a checkpoint of output_dir that was written with this callback"
        )
    content = json.loads((checkpoint / _COUNTS).read_text(encoding="utf-8"))
    if content.pop("factors_sha256") != _fingerprint(relora):
        raise UserError(
            f"the adapter that was loaded is not the one of {checkpoint}, whose base weights would be put under it; go on "
            "from a checkpoint of this run's output_dir"
        )
    try:
        relora.load_state_dict({**content, "base_weights": load_file(checkpoint / _WEIGHTS)})
    except ValueError as error:
        raise UserError(f"cannot go on from {checkpoint}: {error}") from None


def _fingerprint(relora: ReLora) -> str:
    digest = hashlib.sha256()
    for pair in relora.pairs:
        for factor in pair.factors:
            digest.update(_bytes(factor))
    return digest.hexdigest()


def _bytes(factor: nn.Parameter) -> bytes:
    return factor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
