"""What AdaLoRA has to be told while it trains: when to move its budget, and its penalty."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SMOOTHED, _UNCERTAIN, _KEPT = "adalora_importance", "adalora_uncertainty", "adalora_kept"


class AdaLoraBudget(TrainerCallback):
    """Moves AdaLoRA's rank budget after every optimizer step. Without it AdaLoRA silently is plain LoRA.

    The smoothed importance of every entry, and which directions are left, are kept in the optimizer's state beside Adam's
    moments, so that a checkpoint holds them. The configuration's ``rank_pattern`` is empty between steps: with it PEFT
    would save the directions that are left alone, and a checkpoint of other shapes fits no running optimizer.
    """

    def __init__(self) -> None:
        self.updates = 0
        self._pattern: dict[str, list[bool]] | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any,
        optimizer: Any,
        **_: Any,
    ) -> None:
        """Take up what a checkpoint's optimizer brought."""
        allocator, pattern = model.base_model.rankallocator, {}
        for name, parameter in _factors(model):
            kept = optimizer.state.get(parameter, {})
            if _SMOOTHED in kept:
                allocator.ipt[name] = torch.zeros_like(parameter)
                allocator.exp_avg_ipt[name], allocator.exp_avg_unc[name] = kept[_SMOOTHED], kept[_UNCERTAIN]
            if _KEPT in kept:
                pattern[name] = kept[_KEPT].view(-1).bool().tolist()
        self._pattern = pattern or None

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any,
        optimizer: Any,
        **_: Any,
    ) -> None:
        # called between optimizer.step() and zero_grad(): the importance scores need the gradients
        tuner = model.base_model
        config = tuner.peft_config[tuner.trainable_adapter_name]
        config.rank_pattern = self._pattern
        tuner.update_and_allocate(state.global_step + 1)
        self._pattern, config.rank_pattern = config.rank_pattern, None
        self.updates += 1
        self._keep(tuner.rankallocator, model, optimizer)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.updates == 0 and state.global_step > 0:
            raise RuntimeError("AdaLoRA's budget was never updated; please file a bug")

    def _keep(self, allocator: Any, model: nn.Module, optimizer: Any) -> None:
        for name, parameter in _factors(model):
            kept = optimizer.state[parameter]
            for key, values in ((_SMOOTHED, allocator.exp_avg_ipt), (_UNCERTAIN, allocator.exp_avg_unc)):
                kept.pop(key, None)
                if name in values:
                    kept[key] = values[name]
            if self._pattern is not None and name in self._pattern:
                kept[_KEPT] = torch.tensor(self._pattern[name]).to(parameter).view_as(parameter)


def adalora_orthogonality(model: nn.Module, weight: float = 0.5) -> Tensor:
    """AdaLoRA's penalty: weight · mean over factors of ‖PPᵀ − I‖_F (PEFT adds it only to a loss the model computes)."""
    total, count = torch.zeros(()), 0
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = parameter @ parameter.mT if "lora_A" in name else parameter.mT @ parameter
            total = total.to(gram) + torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram))
            count += 1
    return weight * total / max(count, 1)


def _factors(model: Any) -> list[tuple[str, nn.Parameter]]:
    """A, E and B of every layer by the name that PEFT's allocator gives them."""
    return [(name, p) for name, p in model.base_model.model.named_parameters() if ".lora_" in name]
