"""The ways to adapt a model: Deep LoRA, and what PEFT offers, each with its adapter, its optimizer and its start."""

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from rankwise.adapters import DeepLoraConfig, create_deeplora_optimizer
from rankwise.adapters.config import ZERO_LEFT
from rankwise.adapters.full_width import add_full_width
from rankwise.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig

    from rankwise.finetuning.settings import FinetuneSettings
    from rankwise.finetuning.tasks import Task

FRAMES_LR = 3e-3  # Deep LoRA from ε·I between placed frames: its inner factors do the learning
ADAPTED_OUTPUT = 1 / 6  # Deep LoRA's rate for an output that is there already, over that for a new head
LORA_PLUS_RATIO = 16.0  # the LoRA+ paper's recommendation: B learns sixteen times as fast as A


def adapt(model: nn.Module, task: "Task", settings: "FinetuneSettings") -> nn.Module:
    """Make the model trainable as the settings' method does: adapters on every linear layer that the loss reaches.

    ``none`` trains the head alone and ``full`` everything. A head is trained with every method, unless
    ``settings.head`` is ``frozen``.

    Raises:
        UserError: PEFT cannot adapt this model in this way.
    """
    from peft import get_peft_model

    build = _CONFIGS.get(settings.method)
    left_out = task.modules_left_out(model)
    if build is None:
        head = head_parameters(model, task)
        model.requires_grad_(settings.method == "full")
        if settings.method == "full-width":
            add_full_width(model, _linear_layers(model, task, left_out), settings.inner_depth, settings.init_scale)
        _set_trainable(head, settings.head == "trained")
        return model
    common: dict[str, Any] = {"target_modules": "all-linear", "task_type": task.peft_task_type}
    layers = _linear_layers(model, task, left_out)
    if layers and all(isinstance(model.get_submodule(name), Conv1D) for name in layers):
        common["fan_in_fan_out"] = True  # how GPT-2's layers store their weight
    if settings.method == "vera":  # its configuration knows no exclude_modules
        common["target_modules"] = "|".join(map(re.escape, layers))
    else:
        common["exclude_modules"] = left_out or None
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers by an old name whether gradient checkpointing is on: nothing a user could change
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
            adapted = get_peft_model(model, build(settings, common))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"cannot adapt this model with --method {settings.method} --rank {settings.r}: {error}"
        ) from None
    if settings.lora_start == "gaussian":
        _start_from_gaussian(adapted)
    if settings.head == "frozen":
        _set_trainable(head_parameters(adapted, task), False)
    return adapted


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
    optimizer = _OPTIMIZERS.get(settings.method, _adamw)(model, settings, adam)
    _give_head_its_group(optimizer, head_parameters(model, task), settings.head_lr)
    return optimizer


def head_parameters(model: nn.Module, task: "Task") -> list[nn.Parameter]:
    """Parameters of the task's own head on top of the pretrained body; none where the task has no head."""
    if not task.has_head:
        return []
    if hasattr(model, "peft_config"):
        return [p for name, p in model.named_parameters() if ".modules_to_save." in name]
    body = {id(p) for p in model.base_model.parameters()}  # type: ignore[union-attr]
    return [p for p in model.parameters() if id(p) not in body]


def callbacks(settings: "FinetuneSettings") -> list[TrainerCallback]:
    """What the method has to be told while training."""
    return [AdaLoraBudget()] if settings.method == "adalora" else []


def penalty(model: nn.Module, settings: "FinetuneSettings") -> Tensor | None:
    """What the method adds to the loss, or None."""
    return adalora_orthogonality(model) if settings.method == "adalora" else None


class AdaLoraBudget(TrainerCallback):
    """Moves AdaLoRA's rank budget after every optimizer step. Without it AdaLoRA silently is plain LoRA."""

    def __init__(self) -> None:
        self.updates = 0

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **_: Any,
    ) -> None:
        # called between optimizer.step() and zero_grad(): the importance scores need the gradients
        model.base_model.update_and_allocate(state.global_step + 1)  # type: ignore[operator,union-attr]
        self.updates += 1

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.updates == 0 and state.global_step > 0:
            raise RuntimeError("AdaLoRA's budget was never updated; please file a bug")


def adalora_orthogonality(model: nn.Module, weight: float = 0.5) -> Tensor:
    """AdaLoRA's penalty: weight · mean over factors of ‖PPᵀ − I‖_F (PEFT adds it only to a loss the model computes)."""
    total, count = torch.zeros(()), 0
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = parameter @ parameter.mT if "lora_A" in name else parameter.mT @ parameter
            total = total.to(gram) + torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram))
            count += 1
    return weight * total / max(count, 1)


def _deep_lora(settings: "FinetuneSettings", common: dict[str, Any]) -> "PeftConfig":
    return DeepLoraConfig(
        r=settings.r,
        inner_depth=settings.inner_depth,
        init_scale=settings.init_scale,
        variant=settings.variant,
        direction_dropout=settings.direction_dropout,
        **common,
    )


def _lora(**options: Any) -> Callable[["FinetuneSettings", dict[str, Any]], "PeftConfig"]:
    def build(settings: "FinetuneSettings", common: dict[str, Any]) -> "PeftConfig":
        from peft import LoraConfig

        # scaling 1 (1·√r with rsLoRA): rank and α are not to be confused
        return LoraConfig(r=settings.r, lora_alpha=settings.r, **options, **common)

    return build


def _adalora(settings: "FinetuneSettings", common: dict[str, Any]) -> "PeftConfig":
    from peft import AdaLoraConfig

    if settings.steps < 2:
        raise ValueError("AdaLoRA ranks its directions by what earlier steps did; give it at least 2 steps")
    start = max(settings.r + 1, round(1.5 * settings.r))
    return AdaLoraConfig(
        target_r=settings.r,
        init_r=start,
        lora_alpha=start,
        tinit=settings.steps // 10,
        tfinal=settings.steps * 3 // 10,
        deltaT=max(1, settings.steps // 40),
        total_step=settings.steps,
        orth_reg_weight=0.0,  # added by `penalty`, whoever computes the loss
        **common,
    )


def _vera(settings: "FinetuneSettings", common: dict[str, Any]) -> "PeftConfig":
    from peft import VeraConfig

    # VeRA trains two vectors a layer, so that its random projections are wide: its own default, not r
    return VeraConfig(r=256, projection_prng_key=settings.seed, save_projection=False, **common)


def _adamw(model: nn.Module, settings: "FinetuneSettings", adam: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **adam)


def _deep_lora_optimizer(model: nn.Module, settings: "FinetuneSettings", adam: dict[str, Any]) -> torch.optim.Optimizer:
    return create_deeplora_optimizer(model, torch.optim.AdamW, outer_lr_ratio=settings.outer_ratio, **adam)


def _lora_plus(model: Any, settings: "FinetuneSettings", adam: dict[str, Any]) -> torch.optim.Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(model, torch.optim.AdamW, loraplus_lr_ratio=LORA_PLUS_RATIO, **adam)


def _riemannian(model: Any, settings: "FinetuneSettings", adam: dict[str, Any]) -> torch.optim.Optimizer:
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(model, torch.optim.AdamW, **adam)


def _linear_layers(model: nn.Module, task: "Task", left_out: list[str]) -> list[str]:
    """Names of all linear layers but the head's, a language model's output layer and those left out."""
    head = {id(p) for p in head_parameters(model, task)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not output
        and name not in left_out
        and id(module.weight) not in head
    ]


def _give_head_its_group(optimizer: torch.optim.Optimizer, head: Iterable[nn.Parameter], lr: float) -> None:
    trainable = [p for p in head if p.requires_grad]
    ids = {id(p) for p in trainable}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
    # an empty group would only confuse who reads the optimizer's state
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    if trainable:
        optimizer.add_param_group({"params": trainable, "lr": lr, "name": "head"})


@torch.no_grad()
def _start_from_gaussian(model: nn.Module) -> None:
    """N(0, 1) in B and zeros in A, the other way round than PEFT: still a no-op, with much larger first steps."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.normal_()
        elif ".lora_A." in name:
            parameter.zero_()


def _set_trainable(parameters: Iterable[nn.Parameter], trainable: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(trainable)


_CONFIGS: dict[str, Callable[["FinetuneSettings", dict[str, Any]], "PeftConfig"]] = {
    "deep-lora": _deep_lora,
    "lora": _lora(),
    "lora-plus": _lora(),
    "lora-riemannian": _lora(),
    "rslora": _lora(use_rslora=True),
    "dora": _lora(use_dora=True),
    # randomized: an exact SVD of every layer would be slow
    "pissa": _lora(init_lora_weights="pissa_niter_16"),
    "adalora": _adalora,
    "vera": _vera,
}
_OPTIMIZERS: dict[str, Callable[[nn.Module, "FinetuneSettings", dict[str, Any]], torch.optim.Optimizer]] = {
    "deep-lora": _deep_lora_optimizer,
    "lora-plus": _lora_plus,
    "lora-riemannian": _riemannian,
}


@dataclass(frozen=True)
class Method:
    """What a reader wants to know of a method.

    Attributes:
        summary: one line.
        lr: default learning rate, and the middle of the grid it is tuned on.
        adam_eps: Adam's eps.
        offered: whether ``rankwise finetune`` offers it: its folder loads on the unchanged base model and resumes.
    """

    summary: str
    lr: float
    adam_eps: float = 1e-8
    offered: bool = True


METHODS: dict[str, Method] = {
    "deep-lora": Method("Deep LoRA: U, r×r factors and V (after ICML 2024)", 6e-4, 1e-6),
    "lora": Method("LoRA, Kaiming start, scaling 1", 1e-3),
    "lora-plus": Method("LoRA with B learning 16 times as fast as A (PEFT)", 3e-4),
    "rslora": Method("LoRA scaled by 1/√r (PEFT)", 3e-4),
    "dora": Method("LoRA on the direction, a trained magnitude beside it (PEFT)", 1e-3),
    "lora-riemannian": Method("LoRA with r×r preconditioned gradients (PEFT)", 3e-4),
    "pissa": Method("LoRA from the weight's top singular directions (PEFT)", 3e-4, offered=False),
    "adalora": Method("LoRA with a moving rank budget (PEFT)", 3e-3, offered=False),
    "vera": Method("two trained vectors between shared random projections (PEFT)", 1e-2, offered=False),
    "full-width": Method("Deep LoRA's factors before compression (ICML 2024, Table 1)", 1e-4, 1e-6, offered=False),
    "full": Method("every weight", 3e-5, offered=False),
    "none": Method("the unadapted model; its head alone is trained, where it has one", 1e-3, offered=False),
}


def usual_learning_rate(method: str, variant: str = ZERO_LEFT) -> float:
    """Where a search for a method's rate starts; Deep LoRA between placed frames has another than from U = 0."""
    return FRAMES_LR if method == "deep-lora" and variant != ZERO_LEFT else METHODS[method].lr


def default_learning_rate(settings: "FinetuneSettings", task: "Task") -> float:
    """The rate of a run that is given none.

    Deep LoRA's is for a head that has just been put on a model. Where the pretrained output itself is adapted, it
    learns at a sixth of that: the larger rate spoiled what was there (docs/few-labels.md).
    """
    lr = usual_learning_rate(settings.method, settings.variant)
    gentle = settings.method == "deep-lora" and settings.variant == ZERO_LEFT and task.ridge_fits
    return lr * ADAPTED_OUTPUT if gentle else lr


def learning_rate_grid(middle: float, budget: int) -> tuple[float, ...]:
    """``budget`` rates around ``middle``, √10 apart, ascending: the same spread for every method.

    Example:
        >>> from rankwise.finetuning.methods import learning_rate_grid
        >>> learning_rate_grid(1e-3, 3)
        (0.000316, 0.001, 0.00316)
    """
    return tuple(float(f"{middle * 10 ** ((i - budget // 2) / 2):.3g}") for i in range(budget))
