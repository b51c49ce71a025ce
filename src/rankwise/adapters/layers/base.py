"""What every adapted layer does: y = W₀x + U(core − ε^L·I)Vᵀx, whatever W₀x is for its kind of layer."""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, reduce
from typing import Any, NamedTuple, Protocol, cast

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.sharded_weights import full_shape, gathered
from rankwise.factorizations import compose, identity_factors
from rankwise.spectral import haar_frame
from rankwise.spectral.precision import compute_dtype

_BASE = "__base__"  # PEFT's name for "no adapter" in a mixed batch


class Factor(nn.Module):
    """One trainable array under ``.weight``.

    A leaf module rather than a bare Parameter: FSDP wraps modules, and PEFT's key renaming expects ``….weight``.
    """

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))

    def extra_repr(self) -> str:
        return "×".join(map(str, self.weight.shape))


def stored_scale(init_scale: float, zero_left: bool) -> float:
    """ε as the layers use it: none for the zero-left start, which is a no-op without a shift, else rounded to bf16.

    bf16 is the narrowest format adapters are kept in (8 significant bits: at most 0.4 % off).

    Adapters are cast from float32 to the base model's dtype and back. An ε that every cast leaves alone is what makes
    W̃_l = ε·I, and with it the step-0 no-op, exact in all of them.
    """
    return 0.0 if zero_left else float(torch.tensor(init_scale, dtype=torch.bfloat16))


@lru_cache(maxsize=256)
def _shift(width: int, depth: int, init_scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """−ε^L·I, with ε^L rounded as the product of the factors itself is; shared by all layers."""
    epsilon = torch.full((), init_scale, dtype=dtype, device=device)
    product = reduce(lambda below, factor: factor * below, [epsilon] * depth)
    return -product * torch.eye(width, dtype=dtype, device=device)


def scaled_left(
    left: Float[Tensor, "*e m r"], inner: Float[Tensor, "L *e r r"], init_scale: float
) -> Float[Tensor, "*e m r"]:
    """B = U(W̃_L⋯W̃_1 − ε^L·I) in float32 or better: ΔW = B·Vᵀ. A dimension of experts (e) goes along.

    Deaf to autocast: a core near ε^L·I computed in bf16 would drown in its own rounding. Plain autograd, because a
    hand-written backward was slower at r = 8, where every operation costs its call and not its arithmetic.
    The shift is added after the product, not inside the last multiplication: fused, it would cancel the *unrounded*
    product and leave the rounding error of ε^L behind.
    """
    dtype = compute_dtype(inner.dtype)
    with _full_precision(left):
        core = compose(inner.to(dtype))
        if init_scale:  # without, as from the zero-left start, there is nothing to subtract
            make = _shift.__wrapped__ if torch.compiler.is_compiling() else _shift
            core = core + make(inner.shape[-1], inner.shape[0], init_scale, dtype, inner.device)
        return left.to(dtype) @ core


def _full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class DirectionDropout(nn.Module):
    """Hides random directions of the adapter from each row of a training batch, from all of its tokens alike.

    Dropout of a factorization's columns penalizes the square of the product's nuclear norm (overview, §4, eq. 31-32):
    no direction may carry the fit alone. One mask a row, not a token, was worth more (docs/few-labels.md): a row of
    many tokens would see every direction on average.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, projected: Tensor, dim: int = -1) -> Tensor:
        """``dim`` is where the directions are; the rows of the batch come first."""
        if not self.training or projected.ndim < 2:
            return projected
        shape = [1] * projected.ndim
        shape[0], shape[dim] = projected.shape[0], projected.shape[dim]
        return projected * nn.functional.dropout(projected.new_ones(shape), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class WeightGradient(Protocol):
    """Where a layer puts the gradient of its weight, seen as a matrix."""

    def add(self, delta: Tensor, x: Tensor) -> None:
        """Add Σ δᵢxᵢᵀ over all leading dimensions of δ (…, m) and x (…, n)."""

    def add_matrix(self, matrix: Float[Tensor, "m n"]) -> None:
        """Add a dense part."""


def _no_way_back() -> type:
    """Stands for the torchao settings that only a model quantized while it was loaded brings along."""
    raise ValueError(
        "merging into weights that torchao quantized needs the settings they were quantized with: load the model with "
        "transformers' quantization_config=TorchAoConfig(...), or keep the adapter beside it"
    )


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer's weight as a matrix."""
    if isinstance(layer, Conv1D):
        columns, rows = full_shape(layer.weight)
        return rows, columns
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    if isinstance(layer, _ConvNd):
        rows, *kernel = full_shape(layer.weight)
        return rows, math.prod(kernel)
    sizes: Any = layer  # not the weight's shape: a quantized weight is packed
    return int(sizes.out_features), int(sizes.in_features)


class Factors(NamedTuple):
    """The trainable arrays of one adapter: U (d_out, r), W̃ (L, r, r), Vᵀ (r, d_in), or (e, d_out, r), (L, e, r, r), (e, r, d_in)."""

    left: nn.Parameter
    inner: nn.Parameter
    right: nn.Parameter


class DeepLoraLayer(nn.Module, BaseTunerLayer):
    """A layer with Deep LoRA adapters beside it, each under its name.

    A kind of layer is what it does with Vᵀ and B = U(core − ε^L·I): :meth:`project` and :meth:`lift`. Its weight counts as
    an (out_features, in_features) matrix; ``in_features`` and ``out_features`` are those of this matrix.
    """

    merged_adapters: list[str]
    experts: tuple[int, ...] = ()  # how many matrices of one shape the weight holds: one, unless it is a stack of (e,)
    parameter_name = "weight"
    cast_input_dtype_enabled = True  # PEFT's helpers switch it; nothing here casts inputs to the factors' dtype

    adapter_layer_names = ("deeplora_left", "deeplora_right", "deeplora_inner")
    other_param_names = (
        "r",
        "init_scale",
        "inner_depth",
        "zero_left",
        "deeplora_dropout",
        "deeplora_direction_dropout",
    )

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        *,
        get_apply_tensor_subclass: Callable[[], type] | None = None,
        **settings: Any,
    ):
        """``settings`` are those of :meth:`update_layer`; torchao's quantized weights need ``get_apply_tensor_subclass``."""
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(
            base, get_apply_tensor_subclass=get_apply_tensor_subclass or _no_way_back
        )
        self.out_features, self.in_features = self._measure()
        self.r: dict[str, int] = {}
        self.init_scale: dict[str, float] = {}
        self.inner_depth: dict[str, int] = {}
        self.zero_left: dict[str, bool] = {}
        self.deeplora_dropout = nn.ModuleDict()
        self.deeplora_direction_dropout = nn.ModuleDict()
        self.deeplora_left = nn.ModuleDict()
        self.deeplora_right = nn.ModuleDict()
        self.deeplora_inner = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, **settings)

    def _measure(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return matrix_shape(self.get_base_layer())

    def base_parameter(self) -> nn.Parameter:
        """The weight that the adapters stand beside."""
        return cast(nn.Parameter, getattr(self.get_base_layer(), self.parameter_name))

    # -- what a kind of layer says --------------------------------------------------------------------------------

    @property
    def direction_dim(self) -> int:
        """Where in Vᵀx the directions are, from the end."""
        return -1

    def project(self, x: Tensor, right: Float[Tensor, "r n"], adapter_name: str) -> Tensor:
        """Vᵀx, for ``right`` = Vᵀ in the dtype to compute in; dropout of the input included."""
        raise NotImplementedError

    def lift(self, projected: Tensor, B: Float[Tensor, "m r"]) -> Tensor:
        """B·projected, in the shape of the base layer's output."""
        raise NotImplementedError

    def add_gradient(self, gradient: "WeightGradient", delta: Tensor, x: Tensor) -> None:
        """Add the gradient of the weight, as a matrix, from those of the output (``delta``) and the input ``x``."""
        raise NotImplementedError

    def in_layout(self, delta: Float[Tensor, "m n"]) -> Tensor:
        """A matrix as the base layer stores its weight."""
        return delta

    def without_ignored(self, right: Float[Tensor, "r n"]) -> Float[Tensor, "r n"]:
        """Vᵀ without what this layer ignores of it."""
        return right

    def fitting_frame(self, right: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
        """V as this layer can have it."""
        return right

    def name_in_model(self, name: str) -> str:
        """What the weight is called, for a layer under this module name."""
        return name

    def matrix_names(self, name: str) -> list[str]:
        """One name for each of the weight's matrices."""
        return [name]

    # -- adapters ---------------------------------------------------------------------------------------------------

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        *,
        inner_depth: int,
        init_scale: float,
        zero_left: bool,
        dropout: float,
        direction_dropout: float,
        init_weights: bool,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter of width r. Runs on load and on the meta device too: no data is needed here."""
        self.r[adapter_name] = r
        self.init_scale[adapter_name] = stored_scale(init_scale, zero_left)
        self.inner_depth[adapter_name] = inner_depth
        self.zero_left[adapter_name] = zero_left
        self.deeplora_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.deeplora_direction_dropout[adapter_name] = (
            DirectionDropout(direction_dropout) if direction_dropout else nn.Identity()
        )
        for dropout_layers in (self.deeplora_dropout, self.deeplora_direction_dropout):
            dropout_layers[adapter_name].train(self.training)  # new modules train, whatever the layer beside them does
        self.deeplora_left[adapter_name] = Factor(*self.experts, self.out_features, r)
        self.deeplora_right[adapter_name] = Factor(*self.experts, r, self.in_features)
        self.deeplora_inner[adapter_name] = Factor(inner_depth, *self.experts, r, r)
        if not self.factors(adapter_name).left.is_meta:
            self.reset_adapter(adapter_name, no_op=init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @torch.no_grad()
    def reset_adapter(self, adapter_name: str, *, no_op: bool = True) -> None:
        """Start over between random frames; with ``no_op=False`` U orthonormal and random inner factors of norm ≈ 1."""
        r, depth = self.r[adapter_name], self.inner_depth[adapter_name]
        left, right = (
            self.stacked([haar_frame(dimension, r) for _ in range(math.prod(self.experts))])
            for dimension in (self.out_features, self.in_features)
        )
        self.set_frames(adapter_name, left, right)
        if not no_op:
            factors = self.factors(adapter_name)
            with gathered(factors, writing=True):
                factors.left.copy_(left)
                factors.inner.copy_(torch.randn(depth, *self.experts, r, r) / r**0.5)

    def stacked(self, matrices: list[Float[Tensor, "m r"]]) -> Float[Tensor, "*e m r"]:
        """One matrix for each of the weight's as one array."""
        return torch.stack(matrices).view(*self.experts, *matrices[0].shape)

    @torch.no_grad()
    def set_frames(self, adapter_name: str, left: Float[Tensor, "*e m r"], right: Float[Tensor, "*e n r"]) -> None:
        """Start over between these frames: U = left, V = right, inner factors ε·I; zero-left: U = 0, inner factors I."""
        depth, r = self.inner_depth[adapter_name], self.r[adapter_name]
        factors = self.factors(adapter_name)
        zero_left = self.zero_left[adapter_name]
        with gathered(factors, writing=True):
            factors.left.copy_(torch.zeros_like(left) if zero_left else left)
            factors.right.copy_(self.fitting_frame(right).mT)
            inner = identity_factors(depth, r, 1.0 if zero_left else self.init_scale[adapter_name])
            factors.inner.copy_(inner.view(depth, *[1] * len(self.experts), r, r))

    @torch.no_grad()
    def set_update(
        self,
        adapter_name: str,
        left: Float[Tensor, "m k"],
        singular_values: Float[Tensor, " k"],
        right: Float[Tensor, "n k"],
    ) -> None:
        """Make ΔW = left·diag(singular_values)·rightᵀ, for orthonormal sides of k ≤ r columns.

        Every inner factor gets the L-th root of the core ε^L·I + diag(singular_values): balanced, as gradient flow from
        a small start would leave them.
        """
        depth, r = self.inner_depth[adapter_name], self.r[adapter_name]
        factors = self.factors(adapter_name)
        start = self.init_scale[adapter_name]
        core = torch.full((r,), start**depth, dtype=compute_dtype(factors.inner.dtype))
        core[: len(singular_values)] += singular_values.to(core)
        if self.zero_left[adapter_name]:  # a direction without an update starts as in a new adapter
            core[len(singular_values) :] = 1
        with gathered(factors, writing=True):
            factors.left[:, : left.shape[1]].copy_(left)
            factors.right[: right.shape[1]].copy_(right.mT)
            factors.inner.copy_(torch.diag(core ** (1 / depth)).expand(depth, r, r))

    def factors(self, adapter_name: str) -> Factors:
        """The current parameters. Look them up each time: PEFT's dtype casts and loaders replace them."""
        containers = (self.deeplora_left, self.deeplora_inner, self.deeplora_right)
        return Factors(*(cast(Factor, container[adapter_name]).weight for container in containers))

    def scaled_left(self, adapter_name: str) -> Float[Tensor, "m r"]:
        """B = U(core − ε^L·I) of one adapter, in float32 or better; under ZeRO-3 outside of forward, gather before."""
        left, inner, _ = self.factors(adapter_name)
        return scaled_left(left, inner, self.init_scale[adapter_name])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
            # Autocast would cast the input once for the base layer and again for Vᵀx: cast it once, here.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if adapter_names is not None:
            return self._add_updates_by_row(result, x, adapter_names)
        for adapter_name in self.active_adapters:
            if adapter_name in self.deeplora_left:
                result = self.add_update(result, x, adapter_name)
        return result

    def add_update(self, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        """The base layer's output plus the adapter's, in a new tensor."""
        return result + self.update_of(x, adapter_name, result.dtype)

    def update_of(self, x: Tensor, adapter_name: str, dtype: torch.dtype) -> Tensor:
        """U(core − ε^L·I)Vᵀx."""
        projected = self.projected(x, adapter_name, dtype)
        return self.lift(projected, self.scaled_left(adapter_name).to(dtype))

    def projected(self, x: Tensor, adapter_name: str, dtype: torch.dtype) -> Tensor:
        """Vᵀx, some of its directions hidden in training. The factors follow the activations' dtype, not the other way
        round: casting r × d beats copying tokens × d."""
        x = x if not x.is_floating_point() or x.dtype == dtype else x.to(dtype)
        projected = self.project(x, self.factors(adapter_name).right.to(dtype), adapter_name)
        hidden = self.deeplora_direction_dropout[adapter_name]
        return hidden(projected, self.direction_dim) if isinstance(hidden, DirectionDropout) else projected

    def _add_updates_by_row(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        """Each row of the batch with its own adapter, or none (``"__base__"``)."""
        if len(adapter_names) != len(x):
            raise ValueError(
                f"adapter_names must have one name for each of the {len(x)} rows of the batch, got {len(adapter_names)}"
            )
        result = result.clone()
        for name in dict.fromkeys(adapter_names):
            if name != _BASE and name in self.deeplora_left:
                rows = torch.tensor([i for i, given in enumerate(adapter_names) if given == name], device=x.device)
                result.index_add_(0, rows, self.update_of(x[rows], name, result.dtype))
        return result

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW = U(core − ε^L·I)Vᵀ, dense, in the layer's weight layout, in float32 or better."""
        factors = self.factors(adapter_name)
        with gathered(factors):
            B = self.scaled_left(adapter_name)
            return self.in_layout(B @ factors.right.to(B.dtype))

    # -- merging ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' ΔW to the base weight; ``safe_merge`` refuses a non-finite result and leaves W₀ as it was."""
        self._refuse_to_merge()
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.deeplora_left:
                continue
            with gathered([self.base_parameter()], writing=True):
                merged = self._shifted_weight(adapter_name, +1)
                if safe_merge and not bool(torch.isfinite(merged).all()):
                    raise ValueError(
                        f"merging adapter {adapter_name!r} gives non-finite weights, so it was not merged; "
                        "the adapter itself holds NaN or infinite numbers"
                    )
                self.set_base_weight(merged)
            self.merged_adapters.append(adapter_name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract what :meth:`merge` added, up to rounding of the base dtype."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            if adapter_name in self.deeplora_left:
                with gathered([self.base_parameter()], writing=True):
                    self.set_base_weight(self._shifted_weight(adapter_name, -1))

    def _refuse_to_merge(self) -> None:
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ValueError(
                f"weights quantized by {backend.backend_name} cannot be unpacked, so nothing can be merged into them; "
                "export the adapter and merge it into an unquantized model, or keep it beside the quantized one"
            )

    def _shifted_weight(self, adapter_name: str, sign: int) -> Tensor:
        weight = self.get_base_weight()
        delta = self.get_delta_weight(adapter_name)
        return (weight.to(delta.dtype) + sign * delta).to(weight.dtype)

    def __repr__(self) -> str:
        return "deeplora." + super().__repr__()
