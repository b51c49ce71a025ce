"""What one way to adapt a model is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from peft import PeftConfig

    from rankwise.finetuning.settings import FinetuneSettings
    from rankwise.finetuning.tasks import Task


@dataclass(frozen=True)
class Target:
    """What an adapter is configured for.

    Attributes:
        settings: of the run.
        layers: the layers to adapt, by name.
        left_out: names of linear layers that are not.
        head: names of the modules to train in full and save beside the adapter, where PEFT does not know them itself.
        task_type: PEFT's name of the task, or None.
        convolutional: whether convolutions are among the layers.
    """

    settings: "FinetuneSettings"
    layers: Mapping[str, nn.Module]
    left_out: Sequence[str] = ()
    head: Sequence[str] = ()
    task_type: str | None = None
    convolutional: bool = False


Config = Callable[[Target], "PeftConfig"]
Start = Callable[[nn.Module, "FinetuneSettings"], None]
Preparation = Callable[[nn.Module, "Task", "FinetuneSettings", Sequence[dict[str, Any]]], None]
Optimizer = Callable[[Any, "FinetuneSettings", dict[str, Any]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """One way to adapt a model, as data.

    Attributes:
        summary: one line.
        lr: default learning rate, and the middle of the grid it is tuned on.
        config: PEFT's configuration; None where no adapter is put into the model.
        peft: what PEFT calls it: a ``PeftType``, an ``init_lora_weights=…``, a field of ``LoraConfig``, or a maker of an
            optimizer.
        adam_eps: Adam's eps.
        why_not: why ``rankwise finetune`` does not offer it; empty where its folder loads on the unchanged base model
            and a run resumes.
        convolutions: whether it adapts ``nn.Conv2d`` too.
        start: what is done to the adapter once it is in the model.
        prepare: what the start needs of the data, before the first step.
        optimizer: other than AdamW over everything.
        every_weight: whether the model's own weights are trained, without an adapter.
        penalty: added to the loss.
        callback: what has to be told while training.
    """

    summary: str
    lr: float
    config: Config | None = None
    peft: str | None = None
    adam_eps: float = 1e-8
    why_not: str = ""
    convolutions: bool = False
    start: Start | None = None
    prepare: Preparation | None = None
    optimizer: Optimizer | None = None
    every_weight: bool = False
    penalty: Callable[[nn.Module], Tensor] | None = None
    callback: Callable[[], TrainerCallback] | None = None

    @property
    def offered(self) -> bool:
        """Whether ``rankwise finetune`` offers it."""
        return not self.why_not
