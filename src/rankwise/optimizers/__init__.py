"""Optimizers that know about low-rank structure."""

from rankwise.optimizers.adarankgrad import AdaRankGrad
from rankwise.optimizers.equivariant_adam import EquivariantAdam
from rankwise.optimizers.factor_pairs import LoraPair, lora_pairs
from rankwise.optimizers.galore import GaLoreAdafactor, GaLoreAdamW, GaLoreSGD
from rankwise.optimizers.jagged_schedule import jagged_cosine
from rankwise.optimizers.lora_rite import LoraRite, lorarite_param_groups
from rankwise.optimizers.loraplus import loraplus_param_groups
from rankwise.optimizers.memory import optimizer_memory
from rankwise.optimizers.param_groups import model_param_groups
from rankwise.optimizers.per_layer import PerLayerUpdates
from rankwise.optimizers.relora import ReLora
from rankwise.optimizers.state_pruning import PruneByMagnitude, PruneRandomly, ResetState

__all__ = [
    "AdaRankGrad",
    "EquivariantAdam",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreSGD",
    "LoraPair",
    "LoraRite",
    "PerLayerUpdates",
    "PruneByMagnitude",
    "PruneRandomly",
    "ReLora",
    "ResetState",
    "jagged_cosine",
    "lora_pairs",
    "loraplus_param_groups",
    "lorarite_param_groups",
    "model_param_groups",
    "optimizer_memory",
]
