"""Deep LoRA on a parameter that a module reads itself: the fused experts of mixture models, one product an expert."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.adapters.layers.base import DeepLoraLayer
from rankwise.adapters.sharded_weights import full_shape


class ParamWrapper(DeepLoraLayer):
    """Runs the module with W + ΔW in the place of one of its parameters W, as PEFT's class of this name does for LoRA.

    W is (experts, d_out, d_in), (experts, d_in, d_out) where the module says ``is_transposed``, or one (d_out, d_in) matrix.
    Several parameters of one module are wrapped one around the other. PEFT finds the wrappers by this class's name.

    The module sees weights, not rows of a batch: there is no dropout of directions or inputs, no mixed batches, and a forward
    pass in bfloat16 rounds W + ΔW to bfloat16. It costs a copy of W for the time of a step.
    """

    probe: Callable[[Tensor], Tensor] | None = None
    """What a gradient capture puts in the place of W, for a forward pass without adapters."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, r: int, *, parameter_name: str, **settings: Any):
        self.parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, r, **settings)

    def _measure(self) -> tuple[int, int]:
        *experts, rows, columns = full_shape(self.base_parameter())
        self.experts = tuple(experts)
        return (columns, rows) if self._is_transposed() else (rows, columns)

    def _is_transposed(self) -> bool:
        return bool(self.experts) and bool(getattr(self.get_base_layer(), "is_transposed", False))

    def update_layer(self, adapter_name: str, r: int, **settings: Any) -> None:
        if settings["dropout"]:
            raise ValueError(
                f"dropout={settings['dropout']} hides inputs, which {self.parameter_name} of target_parameters never sees; "
                "set dropout=0 or leave the parameter out"
            )
        super().update_layer(adapter_name, r, **settings | {"direction_dropout": 0.0})

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is not None:
            raise ValueError(
                "adapter_names cannot mix adapters of target_parameters: experts share one weight among all rows of a batch"
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        weight: Tensor = self.base_parameter()
        if self.disable_adapters or self.merged:
            weight = weight if self.probe is None else self.probe(weight)
        else:
            for adapter_name in self.active_adapters:
                if adapter_name in self.deeplora_left:
                    weight = self._with_update(weight, adapter_name)
        if weight is self.base_parameter():
            return self.base_layer(x, *args, **kwargs)
        return torch.func.functional_call(
            self.base_layer, {self._path(): weight}, (x, *args), kwargs, tie_weights=False
        )

    def _with_update(self, weight: Tensor, adapter_name: str) -> Tensor:
        """W + B·Vᵀ in one pass: never a second array of W's size."""
        B = self.scaled_left(adapter_name)
        left, right = B.to(weight.dtype), self.factors(adapter_name).right.to(weight.dtype)
        if self._is_transposed():
            left, right = right.mT, left.mT
        return torch.baddbmm(weight, left, right) if self.experts else torch.addmm(weight, left, right)

    def _path(self) -> str:
        """Where the parameter is, seen from what is wrapped: behind the wrappers of the module's other parameters."""
        path, layer = self.parameter_name, self.base_layer
        while isinstance(layer, ParamWrapper):
            path, layer = f"base_layer.{path}", layer.base_layer
        return path

    def in_layout(self, delta: Float[Tensor, "*e m n"]) -> Tensor:
        return delta.mT if self._is_transposed() else delta

    def matrices(self, gradient: Tensor) -> list[Float[Tensor, "m n"]]:
        """Something of W's shape as one (d_out, d_in) matrix an expert."""
        return list(self.in_layout(gradient).reshape(-1, self.out_features, self.in_features))

    def name_in_model(self, name: str) -> str:
        return f"{name.replace('.base_layer', '')}.{self.parameter_name}"

    def matrix_names(self, name: str) -> list[str]:
        return [f"{name}[{expert}]" for expert in range(math.prod(self.experts))] if self.experts else [name]

    def get_base_weight(self) -> Tensor:
        return self.base_parameter().data

    def set_base_weight(self, weight_data: Tensor) -> None:
        self.base_parameter().data = weight_data

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT calls to take a wrapper off: the ones inside it go along."""
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's own looks for a ``weight``."""
        parameter = self.base_parameter()
        for factors in (self.deeplora_left, self.deeplora_right, self.deeplora_inner):
            if not any(factor.is_meta for factor in factors[adapter_name].parameters()):
                factors[adapter_name].to(device=device or parameter.device, dtype=parameter.dtype)

    def __repr__(self) -> str:
        return super().__repr__().replace("(", f"(\n  parameter_name='{self.parameter_name}',", 1)
