"""How a weight's singular value decomposition moves while it trains, told from the weights alone (ICML 2024, Fig. 3).

A theorem says that most of it stands still. Seeing that takes care: at an orthogonal start *all* singular values are equal
and later most still are, so that "the i-th singular vector" is whatever basis of a large subspace the SVD routine happens
to return. What is defined is the subspace, and within it the basis that moves least is as good as any. So the vectors are
followed *backwards* from the end, where those that trained have singular values of their own: at each earlier time
every vector is given to the group of equal singular values that holds most of it, and within a group the basis is turned
onto the vectors that it is to continue. At the start that leaves the basis from which the later vectors departed, to
within half of what they turn until the first recorded time: u_i and v_i share one rotation there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rankwise.factorizations import DescentStep, InvariantBases, invariant_blocks
from reproduction.style import BLUE, ORANGE

Array = NDArray[np.float64]

# singular values nearer than this share of the largest count as one: far over rounding, far under any step of training
_SAME = 1e-10
# a vector has moved when it turned by this much: rounding over a gap of 1e-6 between singular values stays below it
_MOVED_DEGREES = 1e-4


@dataclass(frozen=True)
class SvdEvolution:
    """W(t) = Σ_i σ_i(t) u_i(t) v_i(t)ᵀ with each i followed through time; T recorded times.

    Attributes:
        sigma: σ_i(t), (T, d), in falling order at the end.
        left_degrees: ∠(u_i(t), u_i(0)), (T, d), 0 to 90: a singular vector has no sign.
        right_degrees: ∠(v_i(t), v_i(0)), likewise.
    """

    sigma: Array
    left_degrees: Array
    right_degrees: Array

    def moved(self) -> NDArray[np.bool_]:
        """Which i ever turn, (d,)."""
        return np.maximum(self.left_degrees, self.right_degrees).max(axis=0) > _MOVED_DEGREES

    def summary(self) -> dict[str, Any]:
        """How many turn, by how much, and how still the others are."""
        moved = self.moved()
        largest = np.maximum(self.left_degrees, self.right_degrees).max(axis=0)
        still = self.sigma[:, ~moved]
        return {
            "moving": int(moved.sum()),
            "still": int((~moved).sum()),
            "least_turn_of_moving": float(largest[moved].min()) if moved.any() else 0.0,
            "largest_turn_of_still": float(largest[~moved].max()) if still.size else 0.0,
            "spread_of_still": float(np.ptp(still, axis=1).max()) if still.size else 0.0,
        }

    def curves(self, iterations: Sequence[int], points: int) -> dict[str, Any]:
        """Every i that moves, and the band in which all others lie, at about ``points`` of the recorded times."""
        moved = self.moved()
        kept = np.unique(np.linspace(0, len(iterations) - 1, points).astype(int))
        drawn: dict[str, Any] = {"iteration": [iterations[at] for at in kept]}
        for name in ("sigma", "right_degrees", "left_degrees"):
            values = getattr(self, name)[kept]
            still = values[:, ~moved]
            drawn[name] = {
                "moving": values[:, moved].T.tolist(),
                "still": [still.min(axis=1).tolist(), still.max(axis=1).tolist()] if still.size else [],
            }
        return drawn


def followed(weights: Sequence[Tensor]) -> SvdEvolution:
    """Follows every singular triplet of a square weight through its recorded values, the start first.

    Recorded often enough: between two times no vector may turn so far that another looks more like it.

    Example:
        >>> import torch
        >>> from reproduction.svd_evolution import followed
        >>> still = torch.diag(torch.tensor([1.0, 1, 1], dtype=torch.float64))
        >>> followed([still, torch.diag(torch.tensor([3.0, 1, 1], dtype=torch.float64))]).sigma.tolist()
        [[1.0, 1.0, 1.0], [3.0, 1.0, 1.0]]
    """
    decompositions = [_svd(weight) for weight in weights]
    U, _, V = decompositions[-1]
    lefts, rights, sigmas = [], [], []
    for U_now, S_now, V_now in reversed(decompositions):
        U, S, V = _continued(U_now, S_now, V_now, U, V)
        lefts.append(U)
        rights.append(V)
        sigmas.append(S)
    return SvdEvolution(
        np.stack(sigmas[::-1]),
        np.stack([_degrees(U, lefts[-1]) for U in reversed(lefts)]),
        np.stack([_degrees(V, rights[-1]) for V in reversed(rights)]),
    )


def as_returned(weights: Sequence[Tensor]) -> SvdEvolution:
    """The same with the i-th vector of each SVD taken as it comes: what cannot be seen this way is the point."""
    decompositions = [_svd(weight) for weight in weights]
    U, _, V = decompositions[0]
    return SvdEvolution(
        np.stack([S for _, S, _ in decompositions]),
        np.stack([_degrees(now, U) for now, _, _ in decompositions]),
        np.stack([_degrees(now, V) for _, _, now in decompositions]),
    )


@dataclass
class WeightRecorder:
    """A callback that keeps all factors: every iteration at first, then further and further apart, and the last.

    Attributes:
        last: the iteration at which descent will end.
        growth: the next time is at least this many times the last.
        iterations: at which ``weights`` were taken.
        weights: W_1 … W_L at each.
        products: their product at each.
        losses: at each.
    """

    last: int
    growth: float = 1.03
    iterations: list[int] = field(default_factory=list)
    weights: list[list[Tensor]] = field(default_factory=list)
    products: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __call__(self, step: DescentStep) -> None:
        due = not self.iterations or step.iteration >= self.growth * self.iterations[-1]
        if due or step.iteration == self.last:
            self.iterations.append(step.iteration)
            self.losses.append(step.loss)
            self.products.append(step.model.product().detach())
            factors = getattr(step.model, "weights", None)
            self.weights.append([weight.detach().clone() for weight in factors] if factors is not None else [])

    def of_layer(self, number: int) -> list[Tensor]:
        """W_l at each recorded time, l counted from 1."""
        return [factors[number - 1] for factors in self.weights]


def block_errors(recorder: WeightRecorder, bases: InvariantBases, rho: Tensor) -> dict[str, list[float]]:
    """Theorem 2.1 read in its bases: the largest leakage and ρ error over the factors at each recorded time.

    Args:
        recorder: of the descent.
        bases: as many as there are factors to look at, from W_1 on.
        rho: ρ_l(t) for each of these factors at every iteration, (T + 1, L).
    """
    leakage, rho_error = [], []
    for iteration, weights in zip(recorder.iterations, recorder.weights, strict=True):
        blocks = invariant_blocks(
            weights[: len(bases.left)], bases.left, bases.right, width=bases.width, rho=rho[iteration]
        )
        leakage.append(float(blocks.leakage.max()))
        rho_error.append(float(blocks.rho_error.max()))
    return {"leakage": leakage, "rho_error": rho_error}


def gaps(full: WeightRecorder, compressed: WeightRecorder) -> list[float]:
    """‖f(t) − f_C(t)‖_F at the recorded times, the same for both."""
    return [float((f - f_C).norm()) for f, f_C in zip(full.products, compressed.products, strict=True)]


def draw_evolution(panels: Sequence[Axes], curves: dict[str, Any], of: str = "W₁") -> None:
    """The figure's panels, one to three: singular values, angles of right and of left singular vectors to their start."""
    names = (
        ("sigma", f"Singular values of {of}", "σᵢ(t)"),
        ("right_degrees", "Right singular vectors", "∠(vᵢ(t), vᵢ(0)), °"),
        ("left_degrees", "Left singular vectors", "∠(uᵢ(t), uᵢ(0)), °"),
    )
    for axes, (name, title, label) in zip(panels, names, strict=False):
        lines = curves[name]
        for line in lines["moving"]:
            axes.plot(curves["iteration"], line, color=BLUE, linewidth=1.2 if lines["still"] else 0.6)
        for line in lines["still"]:
            axes.plot(curves["iteration"], line, color=ORANGE, linewidth=2.2)
        axes.set(title=title, xlabel="iteration t", ylabel=label)
        if name != "sigma":
            axes.set_ylim(-3, 93)
            axes.set_yticks([0, 30, 60, 90])


def name_lines(axes: Axes, moving: int, still: int, location: str) -> None:
    """The legend of :func:`draw_evolution`."""
    axes.plot([], [], color=BLUE, linewidth=1.2, label=f"the {moving} that move" if still else f"all {moving} move")
    if still:
        axes.plot([], [], color=ORANGE, linewidth=2.2, label=f"the other {still}")
    axes.legend(loc=location)


def _svd(weight: Tensor) -> tuple[Array, Array, Array]:
    U, S, Vh = np.linalg.svd(weight.numpy())
    return U, S, Vh.T


def _continued(U: Array, S: Array, V: Array, U_later: Array, V_later: Array) -> tuple[Array, Array, Array]:
    """The triplets of one time, ordered and turned to continue into those of the next recorded one."""
    groups = np.concatenate([[0], np.cumsum(-np.diff(S) > _SAME * S[0])])
    held = (V.T @ V_later) ** 2 + (U.T @ U_later) ** 2
    # a slot's worth to a later vector is the share of that vector which the slot's whole group holds
    shares = np.stack([held[groups == group].sum(axis=0) for group in range(groups[-1] + 1)])[groups]
    slots, later = linear_sum_assignment(shares, maximize=True)
    U_new, S_new, V_new = np.empty_like(U), np.empty_like(S), np.empty_like(V)
    for group in range(groups[-1] + 1):
        inside = groups == group
        takes = later[slots[inside[slots]]]
        R = _nearest_rotation(V[:, inside].T @ V_later[:, takes] + U[:, inside].T @ U_later[:, takes])
        U_new[:, takes], V_new[:, takes], S_new[takes] = U[:, inside] @ R, V[:, inside] @ R, S[inside]
    return U_new, S_new, V_new


def _nearest_rotation(M: Array) -> Array:
    left, _, right = np.linalg.svd(M)
    return left @ right


def _degrees(vectors: Array, reference: Array) -> Array:
    """Angles between corresponding columns as lines; the sine form, since arccos loses angles under 1e-8."""
    apart = np.linalg.norm(vectors - reference, axis=0)
    along = np.linalg.norm(vectors + reference, axis=0)
    return np.degrees(2 * np.arctan2(np.minimum(apart, along), np.maximum(apart, along)))
