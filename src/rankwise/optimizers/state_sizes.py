"""What optimizers keep for a parameter, from its shape and dtype alone.

A rule maps a shape, a dtype and the group's settings to the tensors of the state. Plain numbers (our own optimizers count their
steps in them) take no tensor memory and are left out.
"""

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankwise.optimizers.base_rules import BaseRule
from rankwise.optimizers.equivariant_adam import empty_second_moment
from rankwise.optimizers.lora_rite import LoraRite
from rankwise.optimizers.matricize import geometry_of
from rankwise.optimizers.moment_storage import BLOCK, FORMS, SMALLEST
from rankwise.optimizers.projected import ProjectedOptimizer
from rankwise.spectral.precision import compute_dtype

Settings = Mapping[str, Any]


class TensorSize(NamedTuple):
    """A tensor that somebody holds: all that its bytes depend on."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numbers * self.dtype.itemsize


def size_of(tensor: Tensor) -> TensorSize:
    return TensorSize(tuple(tensor.shape), tensor.dtype)


def total_bytes(tensors: Iterable[TensorSize]) -> int:
    return sum(size.bytes for size in tensors)


StateRule = Callable[[tuple[int, ...], torch.dtype, Settings], list[TensorSize]]
_TORCH_STEP = TensorSize((), torch.float32)  # torch's own optimizers count steps in a tensor for each parameter


def adamw(shape: tuple[int, ...], dtype: torch.dtype, settings: Settings) -> list[TensorSize]:
    """torch.optim.AdamW and Adam: two moments of the parameter's shape and dtype, a third with ``amsgrad``."""
    moments = 3 if settings.get("amsgrad") else 2
    return [_TORCH_STEP, *[TensorSize(shape, dtype)] * moments]


def sgd(shape: tuple[int, ...], dtype: torch.dtype, settings: Settings) -> list[TensorSize]:
    """torch.optim.SGD: nothing, or with ``momentum`` one buffer."""
    return [TensorSize(shape, dtype)] if settings.get("momentum") else []


def adafactor(shape: tuple[int, ...], dtype: torch.dtype, settings: Settings) -> list[TensorSize]:
    """torch.optim.Adafactor: m + n numbers of an m × n matrix, and of a stack for each of its matrices."""
    if len(shape) < 2:
        return [_TORCH_STEP, TensorSize(shape, dtype)]
    return [_TORCH_STEP, TensorSize((*shape[:-1], 1), dtype), TensorSize((*shape[:-2], 1, shape[-1]), dtype)]


def equivariant_adam(shape: tuple[int, ...], dtype: torch.dtype, settings: Settings) -> list[TensorSize]:
    """EquivariantAdam: one moment of the parameter's shape, and one number a matrix."""
    second = empty_second_moment(_meta(shape, dtype), settings.get("stacked", True))
    return [TensorSize(shape, dtype), size_of(second)]


def adamw_8bit(shape: tuple[int, ...], dtype: torch.dtype, settings: Settings) -> list[TensorSize]:
    """bitsandbytes' AdamW8bit: a byte and 1/256 scale for each entry of both moments; tensors below 4096 entries in float32."""
    return [kept for _ in range(2) for kept in _eight_bits(TensorSize(shape, torch.float32))]


def projected(rule: BaseRule) -> StateRule:
    """Our projected optimizers: the basis (c × r) and the rule's moments of the projected gradient (r × o).

    With side "smaller" c = min(m, n) and o = max(m, n): under AdamW mr + 2nr numbers for m ≤ n, instead of 2mn. Where the rank
    moves, as in AdaRankGrad, it is what the highest rank takes.
    """

    def tensors(shape: tuple[int, ...], dtype: torch.dtype, settings: Settings) -> list[TensorSize]:
        form, wide = settings.get("moments_in", "wide"), compute_dtype(dtype)
        if form not in FORMS:
            raise ValueError(f"moments_in must be one of {', '.join(FORMS)}, got {form!r}")
        geometry = geometry_of(shape, settings.get("rank"), settings.get("side", "smaller"))
        gradient = _meta(shape if geometry is None else (geometry.rank, geometry.other), wide)
        moments = [size_of(moment) for moment in rule.start(gradient, settings).values()]
        bases = [] if geometry is None else [TensorSize((geometry.compressed, geometry.rank), wide)]
        if form == "parameter":
            return [TensorSize(kept.shape, dtype) for kept in (*bases, *moments)]
        if form == "8-bit":
            return [*bases, *(part for moment in moments for part in _eight_bits(moment))]
        return [*bases, *moments]

    return tensors


def lora_rite(shape: tuple[int, ...], dtype: torch.dtype, settings: Settings) -> list[TensorSize]:
    """LoraRite, in float32 or wider: a factor's momentum, its basis, r × r second moments and a number.

    A factor's basis stands in the state of the other one, and is counted with its own. What is not in pairs (``rank`` None) has
    AdamW's two moments.
    """
    wide, rank = compute_dtype(dtype), settings.get("rank")
    twice = [TensorSize(shape, wide)] * 2
    return twice if rank is None else [*twice, TensorSize((rank, rank), wide), TensorSize((), wide)]


def tensors_of(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, dtype: torch.dtype, group: Settings
) -> list[TensorSize]:
    """What this optimizer will keep for one of its parameters in this dtype, or keeps already.

    By a rule where there is one; else by a rehearsal, a step of a copy whose tensors are all on the meta device, where they have
    shapes and no memory.

    Raises:
        ValueError: an optimizer of another library whose step looks at values, which tensors on the meta device have none of.
    """
    if optimizer.state.get(parameter):
        return [size_of(value) for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    shape = tuple(parameter.shape)
    if isinstance(optimizer, ProjectedOptimizer):
        return projected(optimizer.rule)(shape, dtype, group)
    if isinstance(optimizer, LoraRite):
        return lora_rite(shape, dtype, {"rank": _rank_in_pair(parameter, group) if group["paired"] else None})
    if isinstance(optimizer, torch.optim.Adafactor):  # its step looks at norms
        return adafactor(shape, dtype, group)
    return _rehearsed(optimizer, parameter, dtype, group)


def _rank_in_pair(factor: nn.Parameter, group: Settings) -> int:
    """r of A (r × n) or of B (m × r), which stand in turn."""
    place = next(place for place, parameter in enumerate(group["params"]) if parameter is factor)
    return factor.shape[0] if place % 2 == 0 else factor.flatten(1).shape[1]


def _rehearsed(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, dtype: torch.dtype, group: Settings
) -> list[TensorSize]:
    twin = nn.Parameter(_meta(tuple(parameter.shape), dtype))
    twin.grad = torch.empty_like(twin)
    settings = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    # neither a fused nor a foreach kernel runs on the meta device; what they keep is the same
    settings |= {name: False for name in ("fused", "foreach") if name in settings}
    actor = type(optimizer).__new__(type(optimizer))
    actor.__dict__.update(optimizer.__dict__)
    actor.__dict__.pop("step", None)  # a scheduler puts one there that steps the optimizer itself
    actor.state, actor.param_groups = defaultdict(dict), [{"params": [twin], **settings}]
    actor._optimizer_step_pre_hooks, actor._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        actor.step()
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"what {type(optimizer).__name__} keeps cannot be told before its first step ({reason}); take a step and ask again"
        ) from None
    return [size_of(value) for value in actor.state[twin].values() if isinstance(value, Tensor)]


def _eight_bits(moment: TensorSize) -> list[TensorSize]:
    if moment.numbers < SMALLEST:
        return [moment]
    return [TensorSize(moment.shape, torch.uint8), TensorSize((math.ceil(moment.numbers / BLOCK),), torch.float32)]


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
