"""What a user asked for, checked."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rankwise.errors import UserError

SOLVERS = ("auto", "weight-decay", "evidence", "gradient-descent")
LOSSES = ("squared", "huber")


@dataclass(frozen=True)
class SolverOptions:
    """What :class:`~rankwise.completion.DeepMatrixCompletion` was asked for; its docstring explains each."""

    rank: int | None = None
    depth: int = 3
    solver: str = "auto"
    fit_intercept: bool | None = None
    loss: str = "squared"
    weight_decay: float | None = None
    early_stopping: bool = False
    validation_fraction: float = 0.1
    tol: float | None = None
    max_iter: int | None = None
    init_scale: float = 1e-3
    outer_lr_ratio: float = 0.01
    learning_rate: float | None = None
    dtype: str = "float64"
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.rank is None or _whole(self.rank, 1), "rank", "None or a whole number from 1", self.rank)
        _require(_whole(self.depth, 1), "depth", "a whole number from 1", self.depth)
        _require(self.solver in SOLVERS, "solver", f"one of {', '.join(SOLVERS)}", self.solver)
        _require(
            self.depth >= 2 or self.solver == "gradient-descent", "depth", "at least 2 for weight decay", self.depth
        )
        _require(self.loss in LOSSES, "loss", "'squared' or 'huber'", self.loss)
        _require(
            self.weight_decay is None or 0 < self.weight_decay < 1,
            "weight_decay",
            "None or between 0 and 1 (units of σ₁ of the observed matrix)",
            self.weight_decay,
        )
        _require(
            self.weight_decay is None or self.solver == "weight-decay",
            "weight_decay",
            "None unless solver='weight-decay'",
            self.weight_decay,
        )
        _require(
            not self.early_stopping or self.solver in ("weight-decay", "gradient-descent"),
            "early_stopping",
            "False unless solver is 'weight-decay' or 'gradient-descent' (the others weigh noise by themselves)",
            self.early_stopping,
        )
        _require(0 < self.validation_fraction < 1, "validation_fraction", "between 0 and 1", self.validation_fraction)
        _require(self.tol is None or self.tol > 0, "tol", "None or positive", self.tol)
        _require(self.max_iter is None or _whole(self.max_iter, 1), "max_iter", "None or from 1", self.max_iter)
        _require(str(np.dtype(self.dtype)) in ("float32", "float64"), "dtype", "'float32' or 'float64'", self.dtype)

    @property
    def tolerance(self) -> float:
        return self.tol or (1e-7 if np.dtype(self.dtype) == np.float64 else 3e-6)

    def iterations(self, default: int) -> int:
        return self.max_iter or default


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= least)


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise UserError(f"{name} must be {expected}, got {got!r}")
