"""The completion problem of the ICML 2024 paper's figures, and how far a factorization is from its solution."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.completion.gradient_descent import CompletionFactors, GradientDescentStep
from rankwise.completion.observations import Observations
from reproduction.trajectories import evenly_along

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class PlantedCompletion:
    """Ω⊙Φ with Φ known: a d × d Gaussian matrix cut to its top r singular values, unscaled (σ ≈ 2√d), float64.

    Attributes:
        observations: exactly ⌊p·d²⌋ entries, uniformly drawn.
        left, right: Φ = left·rightᵀ, each (d, r).
    """

    observations: Observations
    left: Matrix
    right: Matrix

    @classmethod
    def draw(cls, size: int, rank: int, observed: float, seed: int) -> "PlantedCompletion":
        generator = np.random.default_rng(seed)
        U, S, Vh = np.linalg.svd(generator.standard_normal((size, size)))
        left, right = U[:, :rank] * S[:rank], Vh[:rank].T.copy()
        places = generator.permutation(size * size)[: int(observed * size * size)]
        rows, columns = np.divmod(places, size)
        values = np.einsum("ek,ek->e", left[rows], right[columns])
        return cls(Observations.from_coordinates(rows, columns, values, (size, size)), left, right)

    @property
    def entries(self) -> int:
        """d², by which the paper's code divides every loss."""
        return self.observations.shape[0] * self.observations.shape[1]

    def squared_distance(self, factors: CompletionFactors) -> float:
        """‖f − Φ‖² from the factors: QR of both sides keeps the digits that expanding the square would lose."""
        A = np.hstack([factors.left @ factors.core, -self.left])
        B = np.hstack([factors.right, self.right])
        _, S = np.linalg.qr(A)
        _, T = np.linalg.qr(B)
        return float(np.square(S @ T.T).sum())

    def held_out_error(self, factors: CompletionFactors, observed_loss: float) -> float:
        """½·mean over all d² entries of ((1 − Ω)⊙(f − Φ))²: what the paper's figures call recovery error."""
        return max(0.5 * self.squared_distance(factors) - observed_loss, 0.0) / self.entries


@dataclass
class Recorder:
    """A callback that follows the held-out error, stops at the paper's mean loss, and keeps its own time out of the count.

    Attributes:
        problem: what is being completed.
        stop_at: ½·mean over d² of the squared residual at which descent ends.
        every: iterations between points of the curve.
        also: called with each step too.
    """

    problem: PlantedCompletion
    stop_at: float
    every: int
    also: Callable[[GradientDescentStep], None] | None = None
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    _started: float = field(default_factory=time.perf_counter)
    _own_time: float = 0.0

    def __call__(self, step: GradientDescentStep) -> bool:
        entered = time.perf_counter()
        reached = step.loss <= self.stop_at * self.problem.entries
        if reached or step.iteration % self.every == 0:
            error = self.problem.held_out_error(step.factors, step.loss)
            self.curve.append((step.iteration, entered - self._started - self._own_time, error))
            if self.also is not None:
                self.also(step)
        self._own_time += time.perf_counter() - entered
        return reached

    def summary(self) -> dict[str, Any]:
        """Iterations, seconds of descent alone, and the held-out error at the last recorded point."""
        iterations, seconds, error = self.curve[-1]
        return {"iterations": iterations, "seconds": seconds, "held_out_error": error}

    def thinned(self, points: int = 250) -> dict[str, list[float]]:
        """The curve with at most about ``points`` points: equally many along the iterations and along the error's fall."""
        iterations, seconds, errors = (np.array(column) for column in zip(*self.curve, strict=True))
        kept = evenly_along(iterations.tolist(), errors.tolist(), points)
        return {
            "iteration": iterations[kept].tolist(),
            "seconds": seconds[kept].tolist(),
            "held_out_error": errors[kept].tolist(),
        }
