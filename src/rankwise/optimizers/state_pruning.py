"""What becomes of an optimizer's state when the parameter it belongs to starts anew."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class StatePruning(Protocol):
    """One of :class:`ResetState`, :class:`PruneRandomly`, :class:`PruneByMagnitude`, or your own."""

    def __call__(self, state: dict[str, Any], parameter: nn.Parameter, generator: torch.Generator) -> None:
        """Change ``optimizer.state[parameter]`` in place; ``generator`` is on the CPU and alike in every process."""


@dataclass(frozen=True)
class ResetState:
    """All of it to exact zeros, the count of steps too: the next step is that of an optimizer which has just been made.

    With the count kept, as where "reset" means that 99.9 % of the entries are pruned, Adam would take the zeros for an average
    over many steps, and step (1−β₁)/√(1−β₂) ≈ 3 times too far.

    Raises:
        ValueError: a state of whole numbers, such as that of 8-bit optimizers, whose zero is not the code 0.

    Example:
        >>> import torch
        >>> from rankwise.optimizers.state_pruning import ResetState
        >>> state = {"step": torch.tensor(7.0), "exp_avg": torch.ones(2)}
        >>> ResetState()(state, torch.nn.Parameter(torch.zeros(2)), torch.Generator())
        >>> state
        {'step': tensor(0.), 'exp_avg': tensor([0., 0.])}
    """

    def __call__(self, state: dict[str, Any], parameter: nn.Parameter, generator: torch.Generator) -> None:
        _require_plain(state)
        for name, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif not isinstance(value, bool) and isinstance(value, int | float):
                state[name] = type(value)(0)


@dataclass(frozen=True)
class PruneRandomly:
    """Exactly round(share·n) of a parameter's n entries lose their moments, drawn at random.

    One draw for all moments of a parameter. The published code draws for each: a momentum that is kept over a second moment
    that is not would be divided by little more than eps.

    Args:
        share: from 0 (keep all) to 1. ReLoRA's "reset" is .999.
    """

    share: float

    def __post_init__(self) -> None:
        _require_share(self.share)

    def __call__(self, state: dict[str, Any], parameter: nn.Parameter, generator: torch.Generator) -> None:
        moments = _moments(state, parameter)
        if moments:
            order = torch.randperm(parameter.numel(), generator=generator)
            _zero(moments, order.to(parameter.device), self.share)


@dataclass(frozen=True)
class PruneByMagnitude:
    """Exactly round(share·n) of a parameter's n entries lose their moments: those whose momentum is smallest.

    Of equal magnitudes the first in the parameter's order go. A threshold at a quantile, as in the published code, would with
    ties (the zeros of the last pruning, the rows of words that were not seen) prune nearly nothing or nearly all. The
    momentum, the first entry of the state that has the parameter's shape, decides for the other moments too; see
    :class:`PruneRandomly`.

    Args:
        share: from 0 (keep all) to 1.

    Example:
        >>> import torch
        >>> from rankwise.optimizers.state_pruning import PruneByMagnitude
        >>> state = {"exp_avg": torch.tensor([1.0, -1.0, 3.0, 1.0])}
        >>> PruneByMagnitude(0.5)(state, torch.nn.Parameter(torch.zeros(4)), torch.Generator())
        >>> state["exp_avg"]
        tensor([0., 0., 3., 1.])
    """

    share: float

    def __post_init__(self) -> None:
        _require_share(self.share)

    def __call__(self, state: dict[str, Any], parameter: nn.Parameter, generator: torch.Generator) -> None:
        moments = _moments(state, parameter)
        if moments:
            _zero(moments, moments[0].abs().flatten().argsort(stable=True), self.share)


def _require_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share is the part of the entries that is pruned, from 0 to 1; got {share}")


def _require_plain(state: dict[str, Any]) -> None:
    coded = [name for name, value in state.items() if isinstance(value, Tensor) and not value.is_floating_point()]
    if coded:
        raise ValueError(
            f"the optimizer's state {coded[0]!r} holds codes ({state[coded[0]].dtype}), not numbers; use an optimizer whose "
            "moments are floating-point"
        )


def _moments(state: dict[str, Any], parameter: nn.Parameter) -> list[Tensor]:
    """The tensors with an entry for each of the parameter's; single numbers (a count, one second moment) belong to all."""
    _require_plain(state)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.numel() > 1}
    other = [name for name, value in tensors.items() if value.shape != parameter.shape]
    if other:
        raise ValueError(
            f"the optimizer's state {other[0]!r} of shape {tuple(tensors[other[0]].shape)} has no entry for each of the "
            f"parameter's {tuple(parameter.shape)}, so a part of them cannot be pruned; use ResetState()"
        )
    return list(tensors.values())


def _zero(moments: list[Tensor], order: Tensor, share: float) -> None:
    gone = order[: round(share * order.numel())]
    keep = torch.ones(order.numel(), dtype=torch.bool, device=order.device)
    keep[gone] = False
    for moment in moments:
        # not a product with the mask: NaN·0 is NaN
        moment.masked_fill_(~keep.view(moment.shape), 0.0)
