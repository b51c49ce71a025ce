"""Deep LoRA beside a linear layer: ``nn.Linear`` and what works like it, and GPT-2's ``Conv1D``."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.layers.base import DeepLoraLayer, WeightGradient


class DeepLoraLinear(DeepLoraLayer):
    """y = Wx, the features last. ``Conv1D`` is the same with its weight stored as (in, out)."""

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weight is stored as (in, out)."""
        return isinstance(self.get_base_layer(), Conv1D)

    def project(self, x: Tensor, right: Float[Tensor, "r n"], adapter_name: str) -> Tensor:
        return nn.functional.linear(self.deeplora_dropout[adapter_name](x), right)

    def lift(self, projected: Tensor, B: Float[Tensor, "m r"]) -> Tensor:
        return nn.functional.linear(projected, B)

    def add_update(self, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        """Multiply and add in one pass, and into the array that the base layer has just made where nobody else has it."""
        projected = self.projected(x, adapter_name, result.dtype)
        B = self.scaled_left(adapter_name).to(result.dtype)
        rows = projected.flatten(0, -2) if projected.ndim > 1 else projected.unsqueeze(0)
        flat = result.reshape(rows.shape[0], result.shape[-1])  # not −1: the batch may be empty
        if self._owns_output(flat):
            return flat.addmm_(rows, B.mT).view(result.shape)
        return torch.addmm(flat, rows, B.mT).view(result.shape)

    def _owns_output(self, flat: Tensor) -> bool:
        """Whether nobody else can hold the base output: a plain layer, unhooked, whose gradient ignores it."""
        base = self.base_layer
        hooked = base._forward_hooks or nn.modules.module._global_forward_hooks or "forward" in base.__dict__
        return type(base) in (nn.Linear, Conv1D) and not hooked and not (flat.requires_grad and flat.is_leaf)

    def add_gradient(self, gradient: WeightGradient, delta: Tensor, x: Tensor) -> None:
        gradient.add(delta, x)

    def in_layout(self, delta: Float[Tensor, "m n"]) -> Tensor:
        return delta.mT if self.fan_in_fan_out else delta

    def __repr__(self) -> str:
        return "deeplora." + super().__repr__()
