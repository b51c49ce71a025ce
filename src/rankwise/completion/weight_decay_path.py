"""Completion by a deep factorization whose weight decay is let go to zero.

The decay ½λΣ‖W_l‖² of an L-layer factorization of X costs X itself (λL/2)Σσ^{2/L} (overview, Corollary 1): few large
singular values are cheaper than many small ones, the more so the deeper. Followed from the λ at which X = 0 down to
nothing, the minimizers pick up one direction after another, as gradient descent from a vanishing start does saddle by
saddle, but each in a few second-order steps instead of thousands of first-order ones. How many directions could be had
(the bound on the rank) does not matter: only those that the entries ask for enter.

One step at λ: the penalty is majorized by a quadratic, w(σ) = λσ^{2/L − 1} for each direction (Mohan & Fazel 2012),
smoothed below the scale that λ cannot see; the rows' factors are eliminated by ridge regression (variable projection)
and the columns' take one Gauss–Newton step by block-preconditioned conjugate gradients. Cost O(nnz·k² + (m + n)k³) a
step and O(nnz·k) a product; nothing is m × n.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.completion import kernels
from rankwise.completion.balanced import Balanced, balanced
from rankwise.completion.observations import Observations
from rankwise.completion.sparse_svd import leading_triplets

Array = NDArray[np.floating]
Callback = Callable[[dict[str, Any]], None]
Watch = Callable[[Array, Array, dict[str, Any]], bool]

_FIRST_DECAY = 0.5  # of the λ at which nothing fits
_STEADY_PACE = 0.5
_FASTEST_PACE, _SLOWEST_PACE = 1e-3, 0.7
_LAST_DECAY = 1e-13  # of the λ at which nothing fits: below lies rounding
_FLAT, _FLAT_STEPS = 0.98, 4
_CG_TOLERANCE = 0.1
_CG_PRODUCTS = 100
_SMOOTHED = 0.5  # singular values below this much of λ's own scale all count as zero
_NEGLIGIBLE = 1e-10  # of the largest singular value


@dataclass(frozen=True)
class PathEnd:
    """Where the path stopped.

    Attributes:
        factors: the balanced factors, k directions.
        decay: (k,) what each direction's squared norms were last multiplied by; the rows' ridge penalty.
        residual: ‖Ω⊙(X − Φ)‖ / ‖Ω⊙Φ‖.
        reason: "fitted" (residual below the tolerance), "decay" (the λ asked for was reached), "rank" (more directions
            than ``trusted_rank`` entered), "stalled" (all ``max_rank`` directions are in and the residual no longer falls, or
            λ reached rounding) or "max_iter".
        history: one entry a step.
    """

    factors: Balanced
    decay: Array
    residual: float
    reason: str
    history: list[dict[str, Any]] = field(default_factory=list)


def follow_weight_decay(
    observations: Observations,
    *,
    max_rank: int,
    depth: int = 3,
    pace: float | None = None,
    weight_decay: float = 0.0,
    trusted_rank: int | None = None,
    tolerance: float = 1e-8,
    max_iter: int = 300,
    seed: int = 0,
    start: Array | None = None,
    watch: Watch | None = None,
    callback: Callback | None = None,
) -> PathEnd:
    """Follow the minimizers of ½‖Ω⊙(X − Φ)‖² + (λL/2)Σσ^{2/L}(X) as λ falls.

    Args:
        observations: Ω⊙Φ, at least as many rows as columns runs fastest; with several processes each one's rows.
        max_rank: directions at most.
        depth: L ≥ 2 layers of the factorization that the decay is on; 2 is the nuclear norm.
        pace: by how much λ falls a step. None: by a half while directions enter, then faster and faster.
        weight_decay: where λ stops, in units of σ₁(Ω⊙Φ).
        trusted_rank: give up once more directions than this have entered; None means never.
        tolerance: stop when the relative residual on the observed entries is below.
        max_iter: steps at most.
        seed: of the random starts of the Lanczos process.
        start: (n, k) column factors of an earlier fit; λ then starts where their residual asks for a new direction.
        watch: called with the factors of each step and its entry of the history; True ends the path.
        callback: called with each step's entry of the history.

    Returns:
        :class:`PathEnd`.
    """
    y = observations.values
    scale = _norm(observations, y)
    if scale == 0:
        return _nothing(observations)
    s, V = _leading(observations, y, 1 if pace else min(4, max_rank), seed)
    path = _Path(observations, depth, float(s[0]))
    if start is None:
        decay = _FIRST_DECAY * path.first
        enough = s >= decay
        enough[0] = True
        sigma = s[enough] / observations.density
        right = V[:, enough] * np.sqrt(sigma).astype(V.dtype)
    else:
        sigma, right, decay = path.resumed(start[:, :max_rank], seed)
    fall = _Fall(pace)
    history: list[dict[str, Any]] = []
    relative, flat, reason = 1.0, 0, None
    for iteration in range(1, max_iter + 1):
        step = path.step(right, path.weights(decay, sigma))
        factors = _without_negligible(step.factors, observations)
        sigma, right = factors.singular_values, factors.right
        previous, relative = relative, float(np.sqrt(step.loss)) / scale
        entry = {
            "iteration": iteration,
            "weight_decay": decay / path.first,
            "residual": relative,
            "rank": len(sigma),
            "products": step.products,
        }
        history.append(entry)
        ended = watch is not None and watch(factors.left, factors.right, entry)
        if callback:
            callback(entry)
        reason = _reason_to_stop(relative, tolerance, len(sigma), trusted_rank, decay / path.first, weight_decay)
        # with room left, a flat residual is a saddle: the next direction enters once λ is low enough
        flat = flat + 1 if len(sigma) == max_rank and relative > _FLAT * previous else 0
        if flat >= _FLAT_STEPS and weight_decay == 0:
            reason = reason or "stalled"
        if ended:
            reason = reason or "decay"
        if reason or iteration == max_iter:
            break
        entered = 0
        if len(sigma) < max_rank:
            count = 1 if pace else min(4, max_rank - len(sigma))
            born, directions = path.new_directions(step.residual, decay, count, seed + iteration)
            entered = len(born)
            right, sigma = np.hstack([right, directions]), np.concatenate([sigma, born])
        ratio = fall.next(relative, previous, step.length, entered)
        decay = max(decay * ratio, weight_decay * path.first, _LAST_DECAY * path.first)
    weights = path.weights(decay, sigma)
    left, _, residual = path.rows(right, weights)
    relative = _norm(observations, residual) / scale
    return PathEnd(Balanced(left, right, sigma), weights, relative, reason or "max_iter", history)


def _norm(observations: Observations, values: Array) -> float:
    """‖values‖ over everybody's entries."""
    return observations.collective.total(float(np.linalg.norm(values.astype(np.float64))) ** 2) ** 0.5


def _leading(observations: Observations, values: Array, count: int, seed: int) -> tuple[Array, Array]:
    """Leading singular values and right vectors of the entries with these values."""
    matrix = observations.matrix(values)
    height = observations.whole_shape[0]
    _, s, V = leading_triplets(matrix, count, seed, collective=observations.collective, height=height)
    agreed = observations.collective.agreed
    return agreed(s), agreed(V)


def _without_negligible(factors: Balanced, observations: Observations) -> Balanced:
    agreed = observations.collective.agreed
    sizes = agreed(factors.singular_values)
    same = Balanced(factors.left, agreed(factors.right), sizes)
    return same.keep(sizes > _NEGLIGIBLE * sizes[0])


class _Fall:
    """By how much λ falls from step to step."""

    def __init__(self, pace: float | None):
        self.pace = pace
        self.ratio = pace or _STEADY_PACE

    def next(self, residual: float, previous: float, length: float, entered: int) -> float:
        """After a step of this ``length`` at whose end ``entered`` directions came in."""
        if self.pace is None:
            if length == 1 and not entered and residual < 1.5 * self.ratio * previous:
                self.ratio = max(self.ratio**1.7, _FASTEST_PACE)  # the residual keeps up with λ: a straight walk
            elif length < 1:
                self.ratio = min(max(self.ratio, 0.1) ** 0.5, _SLOWEST_PACE)
            else:
                self.ratio = min(max(self.ratio, _STEADY_PACE), _SLOWEST_PACE)
        return self.ratio


def _reason_to_stop(
    relative: float, tolerance: float, rank: int, trusted_rank: int | None, decay: float, weight_decay: float
) -> str | None:
    if relative < tolerance:
        return "fitted"
    if trusted_rank is not None and rank > trusted_rank:
        return "rank"
    if weight_decay > 0 and decay <= weight_decay * (1 + 1e-9):
        return "decay"
    if decay <= _LAST_DECAY * (1 + 1e-9):
        return "stalled"
    return None


def _nothing(observations: Observations) -> PathEnd:
    height, width = observations.shape
    dtype = observations.values.dtype
    zero = Balanced(np.zeros((height, 1), dtype), np.zeros((width, 1), dtype), np.zeros(1, dtype))
    return PathEnd(zero, np.ones(1, dtype), 0.0, "fitted")


@dataclass(frozen=True)
class _Step:
    factors: Balanced
    residual: Array
    loss: float
    length: float
    products: int


class _Path:
    """The problem, and one majorize-then-Gauss–Newton step on it."""

    def __init__(self, observations: Observations, depth: int, first: float):
        self.seen = observations
        self.first = first  # σ₁(Ω⊙Φ): with this much decay nothing fits
        self.top = first / observations.density  # the scale of σ₁(Φ)
        self.exponent = 1 - 2 / depth

    def weights(self, decay: float, sigma: Array) -> Array:
        """λσ^{2/L − 1} in units of the top direction's, smoothed: w(σ₁) ≈ λ."""
        floor = _SMOOTHED * decay / self.seen.density
        weights = decay * (self.top / np.sqrt(sigma.astype(np.float64) ** 2 + floor**2)) ** self.exponent
        return weights.astype(self.seen.values.dtype)

    def resumed(self, start: Array, seed: int) -> tuple[Array, Array, float]:
        """Singular values, column factors and decay to go on with from an earlier fit's column factors."""
        right = np.ascontiguousarray(start, self.seen.values.dtype)
        slight = np.full(right.shape[1], _LAST_DECAY * self.first, right.dtype)
        left, _, residual = self.rows(right, slight)
        s, _ = _leading(self.seen, residual, 1, seed)
        factors = balanced(left, right, self.seen.collective)
        factors = _without_negligible(factors, self.seen)
        decay = _FIRST_DECAY * min(max(float(s[0]), _LAST_DECAY * self.first), self.first)
        return factors.singular_values, factors.right, decay

    def new_directions(self, residual: Array, decay: float, count: int, seed: int) -> tuple[Array, Array]:
        """Singular values (e,) and column factors (n, e) of up to ``count`` directions that pay for their decay."""
        s, V = _leading(self.seen, residual, count, seed)
        new = s > self.weights(decay, np.zeros(1))[0]
        born = s[new] / self.seen.density
        return born, V[:, new] * np.sqrt(born).astype(V.dtype)

    def rows(self, right: Array, weights: Array) -> tuple[Array, Array, Array]:
        k = right.shape[1]
        nothing = np.zeros((k, k), right.dtype)
        return kernels.ridge_rows(
            self.seen.row_starts, self.seen.columns, self.seen.values, right, np.diag(weights), nothing, nothing[0]
        )

    def objective(self, left: Array, right: Array, residual: Array, weights: Array) -> tuple[float, float]:
        total = self.seen.collective.total
        loss = total(float(np.dot(residual, residual)))
        penalty = total(float(weights @ (left * left).sum(0))) + float(weights @ (right * right).sum(0))
        return loss, self.seen.collective.agreed(loss + penalty)

    def step(self, right: Array, weights: Array) -> _Step:
        left, triangles, residual = self.rows(right, weights)
        _, before = self.objective(left, right, residual, weights)
        direction, products = self.gauss_newton(left, right, triangles, residual, weights)
        length = 1.0
        while True:
            trial = right + length * direction
            left, _, residual = self.rows(trial, weights)
            loss, after = self.objective(left, trial, residual, weights)
            if after <= before * (1 + 1e-12) or length < 1e-4:
                factors = balanced(left, trial, self.seen.collective)
                return _Step(factors, residual, loss, length, products)
            length *= 0.3

    def gauss_newton(
        self, left: Array, right: Array, triangles: Array, residual: Array, weights: Array
    ) -> tuple[Array, int]:
        """The change of the column factors, rows refitted along, that minimizes the linearized objective."""
        seen = self.seen
        sums = seen.collective.total(kernels.block_sums(seen.column_starts, seen.rows, left))
        blocks = kernels.factor_blocks(sums, weights)
        remaining = self.gather(left, residual) - right * weights
        change = np.zeros_like(right)
        scaled = kernels.solve_blocks(blocks, remaining)
        direction = scaled.copy()
        agreed = seen.collective.agreed
        energy = first = agreed(float(np.vdot(remaining, scaled)))
        for products in range(1, _CG_PRODUCTS + 1):
            if not energy > 0:
                return change, products - 1
            moved = kernels.project_out_rows(seen.row_starts, seen.columns, left, right, triangles, direction)
            image = self.gather(left, moved) + direction * weights
            length = energy / float(np.vdot(direction, image))
            change += length * direction
            remaining -= length * image
            scaled = kernels.solve_blocks(blocks, remaining)
            before, energy = energy, agreed(float(np.vdot(remaining, scaled)))
            if energy <= _CG_TOLERANCE**2 * first:
                break
            direction *= energy / before
            direction += scaled
        return change, products

    def gather(self, left: Array, values: Array) -> Array:
        seen = self.seen
        return seen.collective.total(kernels.gather_columns(seen.column_starts, seen.rows, seen.order, left, values))
