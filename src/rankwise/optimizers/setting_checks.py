"""What may stand in a parameter group: finite numbers, whole counts and a pair of betas, each refused in one sentence."""

import math
import operator
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor


def is_finite_number(value: Any) -> bool:
    """One real number that is neither NaN nor infinite; a tensor that holds one is a learning rate too."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.is_floating_point() and math.isfinite(value)
    return isinstance(value, Real) and math.isfinite(value)


def is_count(value: Any, least: float) -> bool:
    """A whole number of at least ``least``, numpy's too; 2.0 and True are none."""
    try:
        return not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        return False


def require_not_negative(settings: Mapping[str, Any], *names: str) -> None:
    """Refuse all but finite numbers from 0.

    Raises:
        ValueError: the first setting that is none.
    """
    for name in names:
        if not is_finite_number(settings[name]) or settings[name] < 0:
            climb = "; to climb instead of descend set maximize=True" if name == "lr" else ""
            raise ValueError(f"{name} cannot be negative and must be a finite number, got {settings[name]!r}{climb}")


def require_seed(seed: Any) -> None:
    """Refuse all but whole numbers.

    Raises:
        ValueError: no whole number.
    """
    if not is_count(seed, -math.inf):
        raise ValueError(f"seed must be a whole number, got {seed!r}")


def require_betas(betas: Any) -> None:
    """Refuse what is no pair of numbers in [0, 1).

    Raises:
        ValueError: that.
    """
    pair = betas if isinstance(betas, tuple | list) else ()
    if len(pair) != 2 or not all(is_finite_number(beta) and 0 <= beta < 1 for beta in pair):
        raise ValueError(f"betas must be a pair of numbers, and both betas must lie in [0, 1), got {betas!r}")
