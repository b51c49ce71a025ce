"""Plain gradient descent on the compressed deep factorization: eq. 11 as it stands, for study and as a yardstick."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rankwise.completion.entry_products import EntryProducts, entry_products
from rankwise.completion.observations import Observations
from rankwise.errors import UserError
from rankwise.factorizations import invariant_subspaces
from rankwise.spectral import haar_frame, truncated_svd

Floats = NDArray[np.floating]

# η in units of the largest step that is stable at the solution, which is 2; the paper's 5e-3 is 0.9 on its problem
_SAFE_STEP = 0.9


@dataclass(frozen=True)
class CompletionFactors:
    """U W̃_L ⋯ W̃_1 Vᵀ.

    Attributes:
        left: U, (m, w).
        inner: W̃, (L, w, w), index 0 applied first; L may be 0.
        right: V, (n, w).
    """

    left: Floats
    inner: Floats
    right: Floats

    @property
    def core(self) -> Floats:
        """W̃_L ⋯ W̃_1, (w, w)."""
        return _prefix_products(self.inner)[-1]

    def entries(self, rows: NDArray[np.integer], columns: NDArray[np.integer]) -> Floats:
        """The product's entries at (rows, columns), each (k,): a (k, w) array at most, never the matrix."""
        return np.einsum("ek,ek->e", (self.left @ self.core)[rows], self.right[columns])


@dataclass(frozen=True)
class GradientDescentStep:
    """What a callback sees before each update; the factors are live arrays, to be copied if kept.

    Attributes:
        iteration: updates made so far.
        loss: ½‖Ω⊙(f − Φ)‖² at these factors.
        relative_residual: ‖Ω⊙(f − Φ)‖ / ‖Ω⊙Φ‖.
        factors: the current U, W̃ and V.
    """

    iteration: int
    loss: float
    relative_residual: float
    factors: CompletionFactors


@dataclass(frozen=True)
class GradientDescentResult(CompletionFactors):
    """The factors that descent ended with, and how it went.

    Attributes:
        history: one dict for every recorded iteration: ``iteration``, ``loss``, ``relative_residual``.
        iterations: updates made.
        converged: the relative residual reached ``tol``.
        learning_rate: η as used.
    """

    history: list[dict[str, float]]
    iterations: int
    converged: bool
    learning_rate: float


def compressed_start(
    observations: Observations, rank: int, *, depth: int = 3, init_scale: float = 1e-3, seed: int = 0
) -> CompletionFactors:
    """The paper's start: crossed frames from the top singular vectors of Ω⊙Φ, inner factors ε·I (ICML 2024, §2.3, 3).

    The masked matrix enters as it is, without 1/p: only its singular vectors matter. See
    :func:`rankwise.factorizations.invariant_subspaces` for the crossing and for m ≠ n.

    Args:
        observations: Ω⊙Φ, (m, n).
        rank: k, an upper bound on the rank of Φ; the width is w = 2k, or min(m, n) where that is smaller.
        depth: L, number of inner factors.
        init_scale: ε.
        seed: of the random frames.

    Raises:
        UserError: rank outside 1 … min(m, n), or every observed value zero.

    Example:
        >>> import numpy as np
        >>> from rankwise.completion.gradient_descent import compressed_start
        >>> from rankwise.completion.observations import as_observations
        >>> start = compressed_start(as_observations(np.outer(np.arange(1.0, 7), np.ones(5))), rank=2)
        >>> start.left.shape, start.inner.shape, start.right.shape
        ((6, 4), (3, 4, 4), (5, 4))
    """
    smaller = min(observations.shape)
    if not 1 <= rank <= smaller:
        raise UserError(f"rank must lie between 1 and the smaller side of the matrix, {smaller}; got {rank}")
    if not observations.values.any():
        raise UserError("every observed value is zero, so the data point in no direction; there is nothing to complete")
    generator = torch.Generator().manual_seed(seed)
    frames = invariant_subspaces(_start_gradient(observations), rank, width=min(2 * rank, smaller), generator=generator)
    dtype = observations.values.dtype
    width = frames.left.shape[1]
    inner = np.repeat(init_scale * np.eye(width, dtype=dtype)[None], depth, axis=0)
    return CompletionFactors(frames.left.numpy().astype(dtype), inner, frames.right.numpy().astype(dtype))


def narrow_random_start(
    observations: Observations, width: int, *, depth: int = 3, init_scale: float = 1e-3, seed: int = 0
) -> CompletionFactors:
    """A narrow deep factorization that knows nothing of the data, what the paper compares with (ICML 2024, §D.1).

    All L factors are ε times Haar frames, W_L (m, w), W_2 … W_{L−1} (w, w), W_1 (w, n); the outer two train at the same
    rate as the others, so descend with ``outer_lr_ratio=1``. In eq. 11's letters U = W_L, V = W_1ᵀ and L − 2 factors W̃.

    Args:
        observations: Ω⊙Φ, (m, n); only shape and dtype are used.
        width: w, up to min(m, n).
        depth: L ≥ 2, number of factors in all.
        init_scale: ε.
        seed: of the random frames.

    Raises:
        UserError: width or depth out of range.

    Example:
        >>> import numpy as np
        >>> from rankwise.completion.gradient_descent import narrow_random_start
        >>> from rankwise.completion.observations import as_observations
        >>> narrow_random_start(as_observations(np.ones((6, 5))), width=4).inner.shape
        (1, 4, 4)
    """
    (m, n), dtype = observations.shape, observations.values.dtype
    if not 1 <= width <= min(m, n):
        raise UserError(f"width must lie between 1 and the smaller side of the matrix, {min(m, n)}; got {width}")
    if depth < 2:
        raise UserError(f"depth counts the two outer factors as well, so it is at least 2; got {depth}")
    generator = torch.Generator().manual_seed(seed)
    left, right, *inner = (
        haar_frame(rows, width, scale=init_scale, generator=generator, dtype=torch.float64).numpy().astype(dtype)
        for rows in (m, n, *[width] * (depth - 2))
    )
    return CompletionFactors(left, np.array(inner, dtype).reshape(depth - 2, width, width), right)


def safe_learning_rate(
    observations: Observations,
    *,
    depth: int = 3,
    outer_lr_ratio: float = 0.01,
    outer_scale: float = 1.0,
    seed: int = 0,
) -> float:
    """A step η that is stable at the solution, in units of the observed fraction p and of Φ's largest singular value.

    Balanced factors reach σ₁ with inner singular values s and outer ones u where u²s^L = σ₁ and, since descent
    conserves UᵀU/γ − W̃_L W̃_Lᵀ, u² = u₀² + γs². On entries observed at rate p the curvature of eq. 11 there is

        λ = p·(L u⁴ s^{2L−2} + 2γ u² s^{2L})          (= p·L·σ₁^{2−2/L} for u₀ = 1 and γ → 0),

    and descent is stable for η < 2/λ. Returned is 0.9/λ with σ₁ estimated as σ₁(Ω⊙Φ)/p, which errs upward where
    observations are few or unevenly spread. The paper's 5e-3 (σ₁ ≈ 2√1000, p = .2, L = 3, γ = .01) is 0.9/λ as well.

    Args:
        observations: Ω⊙Φ.
        depth: L, number of inner factors.
        outer_lr_ratio: γ.
        outer_scale: u₀, the length of the outer factors' columns at the start.
        seed: of the SVD's sketch.

    Raises:
        UserError: every observed value is zero, or there is nothing to train (L = 0 and γ = 0).

    Example:
        >>> import numpy as np
        >>> from rankwise.completion.gradient_descent import safe_learning_rate
        >>> from rankwise.completion.observations import as_observations
        >>> round(safe_learning_rate(as_observations(8 * np.eye(4)), depth=3, outer_lr_ratio=0.0), 6)
        0.01875
    """
    if depth == 0 and outer_lr_ratio == 0:
        raise UserError("no inner factors and outer_lr_ratio=0: nothing is left to train")
    p = observations.density
    generator = torch.Generator().manual_seed(seed)
    svd = truncated_svd(_start_gradient(observations), 1, generator=generator, estimate_error=False)
    sigma = float(svd.S[0]) / p
    if not sigma > 0:
        raise UserError("every observed value is zero, so there is nothing to take steps towards")

    def reached(s: float) -> float:
        return (outer_scale**2 + outer_lr_ratio * s * s) * s**depth

    low, high = 0.0, 1.0
    while reached(high) < sigma:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < sigma else (low, middle)
    s, u_squared = high, outer_scale**2 + outer_lr_ratio * high * high
    inner = depth * u_squared**2 * s ** (2 * depth - 2)
    outer = 2 * outer_lr_ratio * u_squared * s ** (2 * depth)
    return _SAFE_STEP / (p * (inner + outer))


def gradient_descent(
    observations: Observations,
    *,
    rank: int,
    depth: int = 3,
    init_scale: float = 1e-3,
    outer_lr_ratio: float = 0.01,
    learning_rate: float | None = None,
    tol: float = 1e-6,
    max_iter: int = 100_000,
    seed: int = 0,
    start: CompletionFactors | None = None,
    callback: Callable[[GradientDescentStep], object] | None = None,
    record_every: int = 1,
) -> GradientDescentResult:
    """min ½‖Ω⊙(U W̃_L ⋯ W̃_1 Vᵀ − Φ)‖² by gradient descent on everything at once (ICML 2024, eq. 11).

    With E = Ω⊙(f − Φ) and C = W̃_L ⋯ W̃_1, every step is simultaneous:

        W̃_l ← W̃_l − η (W̃_L ⋯ W̃_{l+1})ᵀ Uᵀ E V (W̃_{l−1} ⋯ W̃_1)ᵀ,   U ← U − γη E V Cᵀ,   V ← V − γη Eᵀ U C,

    in 6·nnz·w + O((m + n)·w² + L·w³) operations. The loss is flat for thousands of iterations before each singular
    value appears, so lack of progress never ends descent: it stops at ``tol``, at ``max_iter``, or when told to.

    The paper's problem has Φ a d × d Gaussian matrix cut to its top r singular values (≈ 2√d, unscaled), ε = 1e-3,
    γ = .01 and η = 5e-3, which its code writes as 5e3 on the mean over all d² = 10⁶ entries. γ = 0 keeps the frames
    and stalls: they come from Ω⊙Φ and do not hold Φ.

    The settings carry the data's units: c·Φ descends like Φ with init_scale c^(1/L)·ε, outer_lr_ratio c^(−2/L)·γ and a
    learning rate of c^(2/L−2)·η, to factors c^(1/L)·W̃_l. Data far from the paper's scale wants them adapted.

    Args:
        observations: Ω⊙Φ, (m, n); descent runs in the values' dtype.
        rank: k, an upper bound on the rank; the width is 2k (:func:`compressed_start`). Not used with ``start``.
        depth: L, number of inner factors. Not used with ``start``.
        init_scale: ε. Not used with ``start``.
        outer_lr_ratio: γ, the outer factors' learning rate over the inner ones'.
        learning_rate: η, in units of 1/loss for the loss above (a sum, not a mean); :func:`safe_learning_rate` unless
            given.
        tol: relative residual ‖Ω⊙(f − Φ)‖/‖Ω⊙Φ‖ at which descent has converged.
        max_iter: most updates made.
        seed: of the random frames.
        start: other factors to start from, of the observations' dtype; they are copied.
        callback: called with a :class:`GradientDescentStep` before every update; returning True ends descent.
        record_every: iterations between entries of the history; the last one is always recorded.

    Returns:
        :class:`GradientDescentResult`.

    Raises:
        UserError: rank or a setting out of range, nothing but zeros observed, or a loss that is no longer finite.

    Example:
        >>> import numpy as np
        >>> from rankwise.completion.gradient_descent import gradient_descent
        >>> from rankwise.completion.observations import as_observations
        >>> truth = np.outer(np.arange(1.0, 7.0), np.arange(2.0, 7.0))
        >>> holes = truth.copy()
        >>> holes[0, 0] = holes[3, 2] = holes[5, 4] = np.nan
        >>> found = gradient_descent(as_observations(holes), rank=1, tol=1e-6)
        >>> found.converged, [round(float(value), 2) for value in found.entries([0, 3, 5], [0, 2, 4])]
        (True, [2.0, 16.0, 36.0])
    """
    _check_settings(depth, init_scale, outer_lr_ratio, learning_rate, max_iter, record_every)
    if start is None:
        start = compressed_start(observations, rank, depth=depth, init_scale=init_scale, seed=seed)
    dtype = observations.values.dtype
    U, inner, V = (np.array(factor, dtype, order="C") for factor in (start.left, start.inner, start.right))
    eta = learning_rate
    if eta is None:
        column_length = float(np.linalg.norm(U)) / U.shape[1] ** 0.5
        eta = safe_learning_rate(
            observations, depth=len(inner), outer_lr_ratio=outer_lr_ratio, outer_scale=column_length, seed=seed
        )
    live = CompletionFactors(U, inner, V)
    data_norm = float(np.linalg.norm(observations.values.astype(np.float64)))
    products = EntryProducts.empty(observations, U.shape[1])
    history: list[dict[str, float]] = []
    iteration = 0
    while True:
        prefixes = _prefix_products(inner)
        with np.errstate(over="ignore", invalid="ignore"):  # the loss tells
            entry_products(observations, U @ prefixes[-1], V, out=products)
        loss = 0.5 * products.squared_norm
        if not np.isfinite(loss):
            raise UserError(
                f"descent diverged: the loss is no longer finite after {iteration} iterations at learning_rate="
                f"{eta:.3g} and outer_lr_ratio={outer_lr_ratio:g}; lower learning_rate, a tenth is a good next try"
            )
        relative = (2 * loss) ** 0.5 / data_norm
        converged = relative <= tol
        told = callback is not None and callback(GradientDescentStep(iteration, loss, relative, live)) is True
        last = converged or told or iteration >= max_iter
        if last or iteration % record_every == 0:
            history.append({"iteration": iteration, "loss": loss, "relative_residual": relative})
        if last:
            return GradientDescentResult(U, inner, V, history, iteration, converged, eta)
        with np.errstate(over="ignore", invalid="ignore"):
            _descend(U, inner, V, prefixes, products, eta, outer_lr_ratio * eta)
        iteration += 1


def _prefix_products(inner: Floats) -> list[Floats]:
    """[I, W̃_1, W̃_2 W̃_1, …, W̃_L ⋯ W̃_1]."""
    products = [np.eye(inner.shape[-1], dtype=inner.dtype)]
    with np.errstate(over="ignore", invalid="ignore"):
        for factor in inner:
            products.append(factor @ products[-1])
    return products


def _descend(
    U: Floats,
    inner: Floats,
    V: Floats,
    prefixes: list[Floats],
    products: EntryProducts,
    inner_step: float,
    outer_step: float,
) -> None:
    """One simultaneous update of everything, in place."""
    C = prefixes[-1]
    below_output = U.T @ products.left  # Uᵀ E V, then (W̃_L ⋯ W̃_{l+1})ᵀ Uᵀ E V
    if outer_step:
        U -= outer_step * (products.left @ C.T)
        V -= outer_step * products.right
    for layer in range(len(inner) - 1, -1, -1):
        gradient = below_output @ prefixes[layer].T
        below_output = inner[layer].T @ below_output
        inner[layer] -= inner_step * gradient


def _start_gradient(observations: Observations) -> torch.Tensor:
    """−Ω⊙Φ, eq. 11's gradient by f at f = 0, as a sparse tensor."""
    indices = np.stack([observations.row_of_each(), observations.columns])
    return torch.sparse_coo_tensor(
        torch.from_numpy(indices.astype(np.int64)),
        torch.from_numpy(-observations.values),
        observations.shape,
        is_coalesced=True,
        check_invariants=False,
    )


def _check_settings(
    depth: int,
    init_scale: float,
    outer_lr_ratio: float,
    learning_rate: float | None,
    max_iter: int,
    record_every: int,
) -> None:
    if depth < 1:
        raise UserError(f"depth is the number of inner factors and must be at least 1, got {depth}")
    if not 0 < init_scale < np.inf:
        raise UserError(f"init_scale must be positive (zero is a saddle that descent never leaves), got {init_scale}")
    if not 0 <= outer_lr_ratio < np.inf:
        raise UserError(f"outer_lr_ratio must be zero or positive, got {outer_lr_ratio}")
    if learning_rate is not None and not 0 < learning_rate < np.inf:
        raise UserError(f"learning_rate must be positive, got {learning_rate}")
    if max_iter < 0 or record_every < 1:
        raise UserError(f"max_iter must be at least 0 and record_every at least 1, got {max_iter} and {record_every}")
