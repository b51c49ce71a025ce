"""The ways to adapt a model: Deep LoRA, and what PEFT offers, each with its adapter, its optimizer and its start."""

from rankwise.finetuning.methods.adalora import AdaLoraBudget, adalora_orthogonality
from rankwise.finetuning.methods.adapting import adapt, callbacks, create_optimizer, penalty, prepare
from rankwise.finetuning.methods.layers import adapted_layers, head_modules, head_parameters, is_convolutional
from rankwise.finetuning.methods.learning_rates import (
    ADAPTED_OUTPUT,
    FRAMES_LR,
    default_learning_rate,
    learning_rate_grid,
    usual_learning_rate,
)
from rankwise.finetuning.methods.left_out import LEFT_OUT
from rankwise.finetuning.methods.method import Method, Target
from rankwise.finetuning.methods.optimizers import LOGITS_RATIO, LORA_PLUS_RATIO
from rankwise.finetuning.methods.table import METHODS

__all__ = [
    "ADAPTED_OUTPUT",
    "FRAMES_LR",
    "LEFT_OUT",
    "LOGITS_RATIO",
    "LORA_PLUS_RATIO",
    "METHODS",
    "AdaLoraBudget",
    "Method",
    "Target",
    "adalora_orthogonality",
    "adapt",
    "adapted_layers",
    "callbacks",
    "create_optimizer",
    "default_learning_rate",
    "head_modules",
    "head_parameters",
    "is_convolutional",
    "learning_rate_grid",
    "penalty",
    "prepare",
    "usual_learning_rate",
]
