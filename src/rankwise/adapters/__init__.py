"""Deep LoRA as a PEFT method: importing this package registers it.

Needs the Hugging Face side: ``pip install "rankwise[hf]"``.
"""

try:
    import peft as _peft  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"rankwise.adapters needs peft and transformers ({error}); install them with: pip install 'rankwise[hf]'"
    ) from error

from rankwise.adapters.config import DeepLoraConfig
from rankwise.adapters.export import ExportSummary, LayerExport, export_adapter_folder, save_as_lora
from rankwise.adapters.gguf import save_as_gguf
from rankwise.adapters.initialization import (
    InitializationSummary,
    LayerInitialization,
    initialize_deeplora_weights,
    save_subspaces,
)
from rankwise.adapters.layers import DeepLoraConv, DeepLoraEmbedding, DeepLoraLayer, DeepLoraLinear
from rankwise.adapters.optimizer import create_deeplora_optimizer, deeplora_param_groups
from rankwise.adapters.registration import DeepLoraPeftType, register_with_peft
from rankwise.adapters.tangent import RidgeFit, RidgeSummary, solve_deeplora_weights
from rankwise.adapters.tuner import DeepLoraModel
from rankwise.adapters.warm_start import deeplora_from_adapter

register_with_peft(DeepLoraConfig, DeepLoraModel)

__all__ = [
    "DeepLoraConfig",
    "DeepLoraConv",
    "DeepLoraEmbedding",
    "DeepLoraLayer",
    "DeepLoraLinear",
    "DeepLoraModel",
    "DeepLoraPeftType",
    "ExportSummary",
    "InitializationSummary",
    "LayerExport",
    "LayerInitialization",
    "RidgeFit",
    "RidgeSummary",
    "create_deeplora_optimizer",
    "deeplora_from_adapter",
    "deeplora_param_groups",
    "export_adapter_folder",
    "initialize_deeplora_weights",
    "save_as_gguf",
    "save_as_lora",
    "save_subspaces",
    "solve_deeplora_weights",
]
