"""What a run asks of a method: adapt the model, prepare the start, make the optimizer, say what to do while training."""

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rankwise.adapters.full_width import add_full_width
from rankwise.errors import UserError
from rankwise.finetuning.methods.layers import (
    adapted_layers,
    head_modules,
    head_modules_unknown_to_peft,
    head_parameters,
    is_convolutional,
)
from rankwise.finetuning.methods.lora_starts import start_from_gaussian
from rankwise.finetuning.methods.method import Target
from rankwise.finetuning.methods.optimizers import adamw
from rankwise.finetuning.methods.table import METHODS

if TYPE_CHECKING:
    from rankwise.finetuning.settings import FinetuneSettings
    from rankwise.finetuning.tasks import Task


def adapt(model: nn.Module, task: "Task", settings: "FinetuneSettings") -> nn.Module:
    """Make the model trainable as the settings' method does: adapters on every layer of :func:`adapted_layers`.

    ``none`` trains the head alone; ``full``, ``galore`` and ``adarankgrad`` everything. A head is trained with every method, unless
    ``settings.head`` is ``frozen``.

    Raises:
        UserError: PEFT cannot adapt this model in this way.
    """
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    method = METHODS[settings.method]
    if method.config is None:
        return _without_adapter(model, task, settings)
    target = _target(model, task, settings)
    try:
        with warnings.catch_warnings():
            _ignore_what_a_user_cannot_change()
            adapted = get_peft_model(model, method.config(target))
        if not any(isinstance(module, BaseTunerLayer) for module in adapted.modules()):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in target.layers.values()}))
            raise ValueError(f"PEFT's {method.peft} knows none of its layers ({kinds})")
        if method.start:
            method.start(adapted, settings)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"cannot adapt this model with --method {settings.method} --rank {settings.r}: {error}"
        ) from None
    if settings.lora_start == "gaussian":
        start_from_gaussian(adapted)
    if settings.head == "frozen":
        _set_trainable(head_parameters(adapted, task), False)
    return adapted


def prepare(model: nn.Module, task: "Task", settings: "FinetuneSettings", batches: Sequence[dict[str, Any]]) -> None:
    """What an adapted model's start needs of the data (EVA, CorDA, LoRA-GA); nothing for the other methods.

    Before the first step, and not where a checkpoint is gone on from: it brings its start. Deep LoRA's frames are
    :func:`rankwise.finetuning.training.place_frames`'s.

    Raises:
        UserError: a layer that these batches do not reach, or numbers that are not finite.
    """
    method = METHODS[settings.method]
    if method.prepare:
        method.prepare(model, task, settings, batches)


def create_optimizer(model: nn.Module, task: "Task", settings: "FinetuneSettings") -> torch.optim.Optimizer:
    """AdamW over what :func:`adapt` made trainable, as the method wants it.

    The head is a group of its own at ``settings.head_lr``, the same for every method: how fast a head should learn has
    nothing to do with how the layers below it are adapted.

    Raises:
        UserError: nothing is trainable.
    """
    adam: dict[str, Any] = {
        "lr": settings.learning_rate,
        "eps": settings.epsilon,
        "weight_decay": 0.0,
        "fused": next(model.parameters()).device.type in ("cpu", "cuda"),
    }
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"--method {settings.method} leaves nothing to train: this task's model has no head")
    optimizer = (METHODS[settings.method].optimizer or adamw)(model, settings, adam)
    _give_head_its_group(optimizer, head_parameters(model, task), settings.head_lr)
    return optimizer


def callbacks(settings: "FinetuneSettings") -> list[TrainerCallback]:
    """What the method has to be told while training."""
    callback = METHODS[settings.method].callback
    return [callback()] if callback else []


def penalty(model: nn.Module, settings: "FinetuneSettings") -> Tensor | None:
    """What the method adds to the loss, or None."""
    added = METHODS[settings.method].penalty
    return added(model) if added else None


def _target(model: nn.Module, task: "Task", settings: "FinetuneSettings") -> Target:
    method, layers = METHODS[settings.method], adapted_layers(model, task)
    convolutional = is_convolutional(model, task)
    if convolutional and not method.convolutions:
        able = ", ".join(name for name, other in METHODS.items() if other.convolutions and other.offered)
        raise UserError(
            f"--method {settings.method} adapts linear layers, and this model is made of convolutions; take one of {able}"
        )
    if not layers:
        raise UserError(f"{type(model).__name__} has no layer that --method {settings.method} could adapt")
    return Target(
        settings=settings,
        layers=layers,
        left_out=[*task.modules_left_out(model), *head_modules(model, task)],
        head=head_modules_unknown_to_peft(model, task),
        task_type=task.peft_task_type,
        convolutional=convolutional,
    )


def _without_adapter(model: nn.Module, task: "Task", settings: "FinetuneSettings") -> nn.Module:
    head = head_parameters(model, task)
    layers = adapted_layers(model, task)
    model.requires_grad_(METHODS[settings.method].every_weight)
    if settings.method == "full-width":
        if not all(isinstance(layer, nn.Linear) for layer in layers.values()):
            raise UserError("--method full-width stands beside nn.Linear layers only, and this model has other ones")
        add_full_width(model, layers, settings.inner_depth, settings.init_scale)
    _set_trainable(head, settings.head == "trained")
    return model


def _ignore_what_a_user_cannot_change() -> None:
    # PEFT asks transformers by an old name whether gradient checkpointing is on
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
    # BOFT looks for a CUDA compiler, and does without
    warnings.filterwarnings(
        "ignore", category=UserWarning, message="(Failed to load the CUDA|Setting boft_n_butterfly)"
    )


def _give_head_its_group(optimizer: torch.optim.Optimizer, head: Iterable[nn.Parameter], lr: float) -> None:
    trainable = [p for p in head if p.requires_grad]
    ids = {id(p) for p in trainable}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
    # an empty group would only confuse who reads the optimizer's state
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    if trainable:
        optimizer.add_param_group({"params": trainable, "lr": lr, "name": "head"})


def _set_trainable(parameters: Iterable[nn.Parameter], trainable: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(trainable)
