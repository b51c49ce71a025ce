"""The layers that Deep LoRA can stand beside, and which of them fits a given one."""

from typing import Any

from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.layers.base import DeepLoraLayer, matrix_shape, scaled_left, stored_scale
from rankwise.adapters.layers.convolution import PLAIN_CONVOLUTIONS, DeepLoraConv
from rankwise.adapters.layers.embedding import DeepLoraEmbedding
from rankwise.adapters.layers.linear import DeepLoraLinear
from rankwise.adapters.layers.parameter import ParamWrapper
from rankwise.adapters.sharded_weights import full_shape

__all__ = [
    "DeepLoraConv",
    "DeepLoraEmbedding",
    "DeepLoraLayer",
    "DeepLoraLinear",
    "ParamWrapper",
    "adapted_layer",
    "layout",
    "matrix_shape",
    "scaled_left",
    "stored_scale",
]


def adapted_layer(layer: nn.Module, name: str) -> type[DeepLoraLayer]:
    """Which class stands beside a layer.

    Raises:
        TypeError: none does; the message says why and what to do.
    """
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"{name} is the output projection of nn.MultiheadAttention, which reads its weight without calling it: "
            "an adapter there would never run. Leave it out with exclude_modules."
        )
    backend = resolve_quantization_backend(layer, get_apply_tensor_subclass=lambda: nn.Module)
    if backend is not None and backend.layer_type == "linear":
        return DeepLoraLinear
    if isinstance(layer, nn.Linear | Conv1D):
        if not layer.weight.dtype.is_floating_point:
            raise TypeError(
                f"{name} holds quantized weights ({layer.weight.dtype}) of a kind that PEFT does not know; load the model in "
                "float32 or bfloat16, or quantize it with a library that PEFT supports (bitsandbytes, torchao, HQQ, …)"
            )
        return DeepLoraLinear
    if isinstance(layer, nn.Embedding):
        if layer.max_norm is not None:
            raise TypeError(
                f"{name} is an embedding with max_norm, which shortens its stored vectors whenever it is used: an adapter "
                "beside it would not be shortened. Leave it out with exclude_modules."
            )
        return DeepLoraEmbedding
    if isinstance(layer, _ConvNd):
        if type(layer) not in PLAIN_CONVOLUTIONS:
            raise TypeError(
                f"{name} is a {type(layer).__name__}, which may do more than convolve; Deep LoRA adapts nn.Conv1d, nn.Conv2d "
                "and nn.Conv3d. Leave it out with exclude_modules."
            )
        if layer.groups > 1:
            raise TypeError(
                f"{name} is a convolution of {layer.groups} groups: its kernel is that many small matrices, which no one "
                "low-rank update of the whole can respect. Leave it out with exclude_modules."
            )
        return DeepLoraConv
    raise TypeError(
        f"Deep LoRA adapts linear layers, embeddings and convolutions; {name} is a {type(layer).__name__}. "
        "Name other layers in target_modules, or leave this one out with exclude_modules"
    )


def layout(layer: nn.Module) -> dict[str, Any]:
    """What is needed beside the matrix to write a layer's update for others: nothing ({}) for a linear one."""
    if isinstance(layer, nn.Embedding):
        return {"kind": "embedding", "padding_idx": layer.padding_idx}
    if not isinstance(layer, _ConvNd):
        return {}
    left_out = [
        what
        for what, used in (
            (f"dilation {layer.dilation}", any(step != 1 for step in layer.dilation)),
            (f"padding {layer.padding_mode!r}", layer.padding_mode != "zeros"),
        )
        if used
    ]
    kernel = list(full_shape(layer.weight)[1:])
    return {"kind": "convolution", "kernel": kernel, "not_in_lora": " and ".join(left_out) or None}
