"""Deep LoRA beside a convolution: the kernel counts as an (out, in·height·width) matrix."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.adapters.layers.base import DeepLoraLayer, WeightGradient
from rankwise.adapters.sharded_weights import full_shape

PLAIN_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class DeepLoraConv(DeepLoraLayer):
    """Vᵀ is r kernels of the base layer's size and stride, B a convolution of size 1 behind them."""

    def _convolution(self) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
        return cast(nn.Conv2d, self.get_base_layer())

    def project(self, x: Tensor, right: Float[Tensor, "r n"], adapter_name: str) -> Tensor:
        base = self._convolution()
        kernels = right.view(-1, *full_shape(base.weight)[1:])
        return base._conv_forward(self.deeplora_dropout[adapter_name](x), kernels, None)

    @property
    def direction_dim(self) -> int:
        return -1 - self._dimensions()

    def lift(self, projected: Tensor, B: Float[Tensor, "m r"]) -> Tensor:
        convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[self._dimensions() - 1]
        return convolve(projected, B.view(*B.shape, *[1] * self._dimensions()))

    def add_gradient(self, gradient: WeightGradient, delta: Tensor, x: Tensor) -> None:
        base = self._convolution()
        kernels = delta.new_zeros(full_shape(base.weight)).requires_grad_()
        with torch.enable_grad():
            output = base._conv_forward(x.to(delta.dtype), kernels, None)
        (found,) = torch.autograd.grad(output, kernels, delta)
        gradient.add_matrix(found.flatten(1))

    def in_layout(self, delta: Float[Tensor, "m n"]) -> Tensor:
        return delta.view(full_shape(self._convolution().weight))

    def _dimensions(self) -> int:
        return len(full_shape(self._convolution().weight)) - 2

    def __repr__(self) -> str:
        return "deeplora." + super().__repr__()
