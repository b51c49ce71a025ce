"""The adapted linear layer: y = W₀x + U(core − ε^L·I)Vᵀx."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, reduce
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from rankwise.factorizations import compose, identity_factors
from rankwise.spectral import haar_frame
from rankwise.spectral.precision import compute_dtype

MIXED_BATCHES = (
    "Deep LoRA does not mix several adapters in one batch (adapter_names=...); "
    "call set_adapter(name) and run one batch per adapter"
)


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
    epsilon = torch.tensor(init_scale, dtype=dtype)
    product = reduce(lambda below, factor: factor * below, [epsilon] * depth)
    return -float(product) * torch.eye(width, dtype=dtype, device=device)


def scaled_left(left: Float[Tensor, "m r"], inner: Float[Tensor, "L r r"], init_scale: float) -> Float[Tensor, "m r"]:
    """B = U(W̃_L⋯W̃_1 − ε^L·I) in float32 or better: ΔW = B·Vᵀ.

    Deaf to autocast: a core near ε^L·I computed in bf16 would drown in its own rounding. Plain autograd, because a
    hand-written backward was slower at r = 8, where every operation costs its call and not its arithmetic.
    The shift is added after the product, not inside the last multiplication: fused, it would cancel the *unrounded*
    product and leave the rounding error of ε^L behind.
    """
    dtype = compute_dtype(inner.dtype)
    with _full_precision(left):
        shift = _shift(inner.shape[-1], inner.shape[0], init_scale, dtype, inner.device)
        return left.to(dtype) @ (compose(inner.to(dtype)) + shift)


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

    def forward(self, projected: Float[Tensor, "*rows r"]) -> Float[Tensor, "*rows r"]:
        if not self.training or projected.ndim < 2:
            return projected
        kept = projected.new_ones(projected.shape[0], *([1] * (projected.ndim - 2)), projected.shape[-1])
        return projected * nn.functional.dropout(kept, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Factors(NamedTuple):
    """The trainable arrays of one adapter: U (d_out, r), W̃ (L, r, r), Vᵀ (r, d_in)."""

    left: nn.Parameter
    inner: nn.Parameter
    right: nn.Parameter


class DeepLoraLayer(BaseTunerLayer):
    """What every Deep LoRA layer holds, keyed by adapter name."""

    merged_adapters: list[str]

    adapter_layer_names = ("deeplora_left", "deeplora_right", "deeplora_inner")
    other_param_names = (
        "r",
        "init_scale",
        "inner_depth",
        "zero_left",
        "deeplora_dropout",
        "deeplora_direction_dropout",
    )

    def __init__(self, base_layer: nn.Linear):
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
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
        self.deeplora_left[adapter_name] = Factor(self.out_features, r)
        self.deeplora_right[adapter_name] = Factor(r, self.in_features)
        self.deeplora_inner[adapter_name] = Factor(inner_depth, r, r)
        if not self.factors(adapter_name).left.is_meta:
            self.reset_adapter(adapter_name, no_op=init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @torch.no_grad()
    def reset_adapter(self, adapter_name: str, *, no_op: bool = True) -> None:
        """Start over between random frames; with ``no_op=False`` U orthonormal and random inner factors of norm ≈ 1."""
        r, depth = self.r[adapter_name], self.inner_depth[adapter_name]
        left, right = haar_frame(self.out_features, r), haar_frame(self.in_features, r)
        self.set_frames(adapter_name, left, right)
        if not no_op:
            factors = self.factors(adapter_name)
            factors.left.copy_(left)
            factors.inner.copy_(torch.randn(depth, r, r) / r**0.5)

    @torch.no_grad()
    def set_frames(self, adapter_name: str, left: Float[Tensor, "m r"], right: Float[Tensor, "n r"]) -> None:
        """Start over between these frames: U = left, V = right, inner factors ε·I; zero-left: U = 0, inner factors I."""
        depth, r = self.inner_depth[adapter_name], self.r[adapter_name]
        factors = self.factors(adapter_name)
        zero_left = self.zero_left[adapter_name]
        factors.left.copy_(torch.zeros_like(left) if zero_left else left)
        factors.right.copy_(right.mT)
        factors.inner.copy_(identity_factors(depth, r, 1.0 if zero_left else self.init_scale[adapter_name]))

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
        factors.left[:, : left.shape[1]].copy_(left)
        factors.right[: right.shape[1]].copy_(right.mT)
        factors.inner.copy_(torch.diag(core ** (1 / depth)).expand(depth, r, r))

    def factors(self, adapter_name: str) -> Factors:
        """The current parameters. Look them up each time: PEFT's dtype casts and loaders replace them."""
        containers = (self.deeplora_left, self.deeplora_inner, self.deeplora_right)
        return Factors(*(cast(Factor, container[adapter_name]).weight for container in containers))

    def scaled_left(self, adapter_name: str) -> Float[Tensor, "m r"]:
        """B = U(core − ε^L·I) of one adapter, in float32 or better."""
        left, inner, _ = self.factors(adapter_name)
        return scaled_left(left, inner, self.init_scale[adapter_name])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class DeepLoraLinear(nn.Module, DeepLoraLayer):
    """``nn.Linear`` with Deep LoRA adapters beside it."""

    def __init__(
        self,
        base_layer: nn.Linear,
        adapter_name: str,
        r: int,
        *,
        inner_depth: int,
        init_scale: float,
        zero_left: bool = False,
        dropout: float = 0.0,
        direction_dropout: float = 0.0,
        init_weights: bool = True,
        fan_in_fan_out: bool = False,
        inference_mode: bool = False,
    ):
        super().__init__()
        DeepLoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(
            adapter_name,
            r,
            inner_depth=inner_depth,
            init_scale=init_scale,
            zero_left=zero_left,
            dropout=dropout,
            direction_dropout=direction_dropout,
            init_weights=init_weights,
            inference_mode=inference_mode,
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(MIXED_BATCHES)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
            # Autocast would cast the input once for the base layer and again for Vᵀx: cast it once, here.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        result = self.base_layer(x, *args, **kwargs)
        for adapter_name in self.active_adapters:
            if adapter_name in self.deeplora_left:
                result = self._add_update(result, x, adapter_name)
        return result

    def _add_update(self, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        # The factors follow the activations' dtype, not the other way round: casting r×d beats copying tokens×d.
        dtype = result.dtype
        x = self.deeplora_dropout[adapter_name](x if x.dtype == dtype else x.to(dtype))
        projected = nn.functional.linear(x, self.factors(adapter_name).right.to(dtype))
        projected = self.deeplora_direction_dropout[adapter_name](projected)
        B = self.scaled_left(adapter_name).to(dtype)
        rows = projected.flatten(0, -2) if projected.ndim > 1 else projected.unsqueeze(0)
        flat = result.reshape(rows.shape[0], result.shape[-1])  # not −1: the batch may be empty
        if self._owns_output(flat):
            # multiply and add in one pass, into the array the base layer has just made
            return flat.addmm_(rows, B.mT).view(result.shape)
        return torch.addmm(flat, rows, B.mT).view(result.shape)

    def _owns_output(self, flat: Tensor) -> bool:
        """Whether nobody else can hold the base output: a plain nn.Linear, unhooked, whose gradient ignores it."""
        base = self.base_layer
        hooked = base._forward_hooks or nn.modules.module._global_forward_hooks or "forward" in base.__dict__
        return type(base) is nn.Linear and not hooked and not (flat.requires_grad and flat.is_leaf)

    def get_delta_weight(self, adapter_name: str) -> Float[Tensor, "m n"]:
        """ΔW = U(core − ε^L·I)Vᵀ, dense, in the layer's weight layout, in float32 or better."""
        B = self.scaled_left(adapter_name)
        delta = B @ self.factors(adapter_name).right.to(B.dtype)
        return delta.mT if self.fan_in_fan_out else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' ΔW to the base weight; ``safe_merge`` refuses a non-finite result and leaves W₀ as it was."""
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.deeplora_left:
                continue
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
                self.set_base_weight(self._shifted_weight(adapter_name, -1))

    def _shifted_weight(self, adapter_name: str, sign: int) -> Tensor:
        weight = self.get_base_weight()
        delta = self.get_delta_weight(adapter_name)
        return (weight.to(delta.dtype) + sign * delta).to(weight.dtype)

    def __repr__(self) -> str:
        return "deeplora." + super().__repr__()
