"""The state_dict that an optimizer is about to load, looked at before anything of the optimizer changes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

ELSEWHERE = ": the state belongs to another optimizer, another model or parameters in another order"


class SavedGroup(NamedTuple):
    """A group of a state_dict beside the optimizer's own.

    Attributes:
        settings: the saved group as it will be, with the optimizer's own parameters as ``params``.
        states: the saved state of each of them, empty where it has had no step.
    """

    settings: dict[str, Any]
    states: list[Mapping[str, Any]]


def saved_groups(optimizer: torch.optim.Optimizer, state_dict: Any) -> list[SavedGroup]:
    """What a state_dict says of each of the optimizer's groups.

    Raises:
        ValueError: no state_dict, or one whose groups are others.
    """
    kind = type(optimizer).__name__
    whole = isinstance(state_dict, Mapping) and {"state", "param_groups"} <= set(state_dict)
    if not whole or not _is_well_formed(state_dict["state"], state_dict["param_groups"]):
        came = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(
            f'{kind} loads what its state_dict() returned, a dictionary with "state" and "param_groups", got {came}'
        )
    found, groups = state_dict["param_groups"], optimizer.param_groups
    sizes = [len(group["params"]) for group in groups]
    saved = [len(group["params"]) for group in found]
    if saved != sizes:
        raise ValueError(
            f"the saved groups have {saved} parameters and those of this {kind} {sizes}: the state belongs to another model "
            "or to other groups"
        )
    made = []
    for theirs, ours in zip(found, groups, strict=True):
        # torch adds settings of its own to the defaults when an optimizer is copied, which then are in no group
        missing = sorted(set(optimizer.defaults) & set(ours) - set(theirs))
        if missing:
            raise ValueError(
                f"this is the state of another optimizer than {kind}: its groups have no {', '.join(missing)}"
            )
        states = [state_dict["state"].get(number, {}) for number in theirs["params"]]
        made.append(SavedGroup({**theirs, "params": ours["params"]}, states))
    return made


def _is_well_formed(state: Any, groups: Any) -> bool:
    return (
        isinstance(state, Mapping)
        and all(isinstance(entries, Mapping) for entries in state.values())
        and isinstance(groups, list | tuple)
        and all(isinstance(group, Mapping) and "params" in group for group in groups)
    )


def require_entries(saved: Mapping[str, Any], parameter: Tensor, *names: str) -> None:
    """Refuse a saved state that lacks one of these.

    Raises:
        ValueError: it does.
    """
    for name in names:
        if name not in saved:
            raise ValueError(f"the saved {name} of a parameter of shape {tuple(parameter.shape)} is missing{ELSEWHERE}")


def require_shape(saved: Mapping[str, Any], parameter: Tensor, name: str, shape: tuple[int, ...]) -> None:
    """Refuse a saved tensor that is missing or has another shape.

    Raises:
        ValueError: it is.
    """
    value = saved.get(name)
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape):
        found = "missing" if value is None else tuple(value.shape) if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"the saved {name} of a parameter of shape {tuple(parameter.shape)} is {found} instead of {tuple(shape)}{ELSEWHERE}"
        )
