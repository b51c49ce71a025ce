"""The rate of a run that is given none, and the rates that a method is tuned on."""

from typing import TYPE_CHECKING

from rankwise.adapters.config import ZERO_LEFT
from rankwise.finetuning.methods.table import METHODS

if TYPE_CHECKING:
    from rankwise.finetuning.settings import FinetuneSettings
    from rankwise.finetuning.tasks import Task

FRAMES_LR = 3e-3  # Deep LoRA from ε·I between placed frames: its inner factors do the learning
ADAPTED_OUTPUT = 1 / 6  # Deep LoRA's rate for an output that is there already, over that for a new head


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
