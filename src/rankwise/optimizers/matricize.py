"""Which parameters are matrices to project, and on which side: decided once, from the shape, never from a projected gradient."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rankwise.optimizers.setting_checks import is_count

SIDES = ("smaller", "larger", "left", "right")


@dataclass(frozen=True)
class Geometry:
    """How a parameter is read as an m × n matrix, and what is projected.

    Everything below is written for the *oriented* matrix A, whose rows are the projected side: A = G for ``side="left"``, Gᵀ
    for ``side="right"``. With c rows and o columns of A the basis P is c × r and the projected gradient PᵀA is r × o.

    Attributes:
        rows: m, the first dimension of the parameter (out_features, out_channels).
        columns: n, the product of the others.
        side: "left" projects the m rows, "right" the n columns.
        rank: r, or the most it may be where the rank moves.
    """

    rows: int
    columns: int
    side: str
    rank: int

    @property
    def compressed(self) -> int:
        """c, the length of a basis vector."""
        return self.rows if self.side == "left" else self.columns

    @property
    def other(self) -> int:
        """o, the side that is not projected."""
        return self.columns if self.side == "left" else self.rows

    def oriented(self, gradient: Tensor) -> Tensor:
        """A view of a gradient, or of the rows of it that a process holds, with the projected side first."""
        matrix = gradient.reshape(gradient.shape[0], self.columns)
        return matrix if self.side == "left" else matrix.mT


def is_matricized(shape: Sequence[int]) -> bool:
    """Matrices, and the kernels of 2-d and 3-d convolutions.

    A 3-d parameter is not: it is as well a 1-d convolution's kernel as a stack of experts, which want different matrices.
    """
    return len(shape) in (2, 4, 5)


def geometry_of(shape: Sequence[int], rank: int | None, side: str = "smaller") -> Geometry | None:
    """The geometry of a parameter, or None where it takes the base rule at full size.

    Args:
        shape: of the parameter; (out, in, k, k) of a convolution is read as (out, in·k·k).
        rank: r; None projects nothing.
        side: "smaller" projects the smaller side, as the paper does, "larger" the larger one, which needs less memory:
            (max + 2·min)·r numbers under Adam instead of (min + 2·max)·r. "left" and "right" name the side. Of a square
            matrix "smaller" is the right one, as in the authors' code: GP is a faster product than PᵀG.

    Raises:
        ValueError: a rank below 1 or above min(m, n), an unknown side, an empty matrix.

    Example:
        >>> from rankwise.optimizers.matricize import geometry_of
        >>> geometry_of((64, 32, 3, 3), rank=8)
        Geometry(rows=64, columns=288, side='left', rank=8)
    """
    if side not in SIDES:
        raise ValueError(f"side must be one of {', '.join(SIDES)}, got {side!r}")
    if rank is None:
        return None
    if not is_count(rank, 1):
        raise ValueError(f"rank must be a whole number from 1, or None to project nothing, got {rank!r}")
    if not is_matricized(shape):
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    if rank > min(rows, columns):
        raise ValueError(
            f"a parameter of shape {tuple(shape)} is a {rows} × {columns} matrix and has no rank {rank}; choose at most "
            f"{min(rows, columns)}, or put it into a group with rank=None, as model_param_groups does"
        )
    if side in ("smaller", "larger"):
        side = "left" if (rows < columns) == (side == "smaller") else "right"
    return Geometry(rows, columns, side, operator.index(rank))
