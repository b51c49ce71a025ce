"""Which layers of a model are adapted, and which parameters and modules are its head."""

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from rankwise.finetuning.tasks import Task


def head_parameters(model: nn.Module, task: "Task") -> list[nn.Parameter]:
    """Parameters of the task's own head on top of the pretrained body; none where the task has no head."""
    if not task.has_head:
        return []
    if hasattr(model, "peft_config"):
        return [p for name, p in model.named_parameters() if ".modules_to_save." in name]
    body = {id(p) for p in model.base_model.parameters()}  # type: ignore[union-attr]
    return [p for p in model.parameters() if id(p) not in body]


def head_modules(model: nn.Module, task: "Task") -> list[str]:
    """Names of the modules that hold the head's parameters themselves, of a model without adapters."""
    head = {id(p) for p in head_parameters(model, task)}
    return [
        name for name, module in model.named_modules() if any(id(p) in head for p in module.parameters(recurse=False))
    ]


def head_modules_unknown_to_peft(model: nn.Module, task: "Task") -> list[str]:
    """Those of :func:`head_modules` that PEFT has to be told to train and save, for this kind of task.

    It knows a classifier's by their usual names, but for half of some: DistilBERT's ``pre_classifier``.
    """
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    known = set(SEQ_CLS_HEAD_NAMES) if task.peft_task_type in ("SEQ_CLS", "TOKEN_CLS") else set()
    return [name for name in head_modules(model, task) if not known & set(name.split("."))]


def adapted_layers(model: nn.Module, task: "Task") -> dict[str, nn.Module]:
    """The layers that the methods adapt, by name, of a model without adapters.

    Linear layers (GPT-2's ``Conv1D`` among them) but the head's, a language model's output layer and those that the task
    leaves out. Ungrouped ``nn.Conv2d`` too where the model is convolutional: more than half of its body's weights are
    kernels. The one convolution that cuts an image into a transformer's patches is none of those.
    """
    head = {id(p) for p in head_parameters(model, task)}
    left_out = task.modules_left_out(model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    convolutions = is_convolutional(model, task)
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear | Conv1D) or (convolutions and _plain_convolution(module)))
        and module is not output
        and name not in left_out
        and id(module.weight) not in head
    }


def is_convolutional(model: nn.Module, task: "Task") -> bool:
    """Whether more than half of the body's weights (parameters of two or more dimensions) lie in convolutions."""
    head = {id(p) for p in head_parameters(model, task)}
    sizes = {id(p): p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in head}
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, _ConvNd)}
    return 2 * sum(size for key, size in sizes.items() if key in kernels) > sum(sizes.values())


def _plain_convolution(module: nn.Module) -> bool:
    # a grouped kernel is many small matrices, which no one low-rank update respects
    return type(module) is nn.Conv2d and module.groups == 1
