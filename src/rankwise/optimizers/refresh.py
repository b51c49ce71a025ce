"""A new subspace from a gradient, by products with it: the old one is the start, and no SVD of the gradient is made."""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.optimizers.projection import project
from rankwise.optimizers.sharding import Whole

# more iterations where no old subspace is there to start from: 99 % of the SVD's energy after three, measured
_COLD = 2
_FIRST_GUESS = 8  # directions tried for a gradient of which nothing is known


class Subspace(NamedTuple):
    """Ritz vectors of AAᵀ, leading ones first.

    Attributes:
        basis: P, (c, k) orthonormal.
        projected: PᵀA, (k, o).
        energies: (k,) squared norms of the rows of PᵀA: what each direction holds of ‖A‖².
    """

    basis: Tensor
    projected: Tensor
    energies: Tensor

    def leading(self, rank: int) -> "Subspace":
        return Subspace(self.basis[:, :rank].contiguous(), self.projected[:rank].contiguous(), self.energies[:rank])


def sketch(rows: int, columns: int, like: Tensor, seed: int, number: int, attempt: int = 0) -> Tensor:
    """(rows, columns) standard normal numbers that follow from ``seed``, the refresh and the attempt at it alone.

    Drawn on the CPU, so on every device and in every process they are the same; independent of a parameter's place in the
    optimizer, so the order of the parameters decides nothing.
    """
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + number) * 64 + attempt) % 2**63)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(like)


def iterate(A: Tensor, start: Tensor, iterations: int, pieces: Whole) -> Tensor | None:
    """Q ← orth(A·AᵀQ), ``iterations`` times; None where A is zero or not finite.

    Neither a QR nor an eigendecomposition sees a NaN: the first product has one wherever A has one, since even 0·∞ is NaN.
    Its largest entry is taken out before the second product, which would else overflow or vanish for large or tiny A.

    Args:
        A: (c, o).
        start: (c, k), any matrix of full column rank.
    """
    Q = start
    for _ in range(iterations):
        B = pieces.over_compressed(project(A, Q))
        largest = float(pieces.peak(B))
        if not 0 < largest < math.inf:
            return None
        Q = pieces.orthonormal(pieces.over_other(A @ (B / largest).mT))
    return Q


def rayleigh_ritz(A: Tensor, Q: Tensor, pieces: Whole) -> Subspace:
    """Turn an orthonormal Q so that the directions in which A is large come first; by a k × k eigenproblem."""
    B = pieces.over_compressed(project(A, Q))
    largest = float(pieces.peak(B)) or 1.0
    small = B / largest
    energies, E = torch.linalg.eigh(pieces.over_other(small @ small.mT))
    E = E.flip(1)
    return Subspace(Q @ E, E.mT @ B, energies.flip(0).clamp(min=0) * largest * largest)


def subspace_by_iteration(
    A: Tensor,
    rank: int,
    previous: Tensor | None,
    *,
    oversample: int,
    iterations: int,
    seed: int,
    number: int,
    pieces: Whole,
    whole_shape: tuple[int, int],
) -> Subspace | None:
    """The ``rank`` leading directions of A, nearly, from ``previous`` ones and some random ones.

    Halko, Martinsson & Tropp (2011), Algorithm 4.4, whose random start is replaced by the old basis and ``oversample`` random
    columns, which see what the old basis cannot. 2·iterations + 1 products of A with k = rank + oversample vectors, a QR of a
    c × k matrix and a k × k eigenproblem: O(cok), where the SVD is O(co·min(c, o)).

    Args:
        A: (c, o), this process's piece of it.
        rank: r.
        previous: (c, r') old basis, or None for the first.
        whole_shape: (c, o) of the whole A.

    Returns:
        None where A is zero or has a NaN or an infinity.
    """
    width = min(rank + oversample, *whole_shape)
    kept = 0 if previous is None else min(previous.shape[1], width)
    fresh = pieces.mine(sketch(whole_shape[0], width - kept, A, seed, number))
    start = fresh if previous is None else torch.cat([previous[:, :kept], fresh], dim=1)
    Q = iterate(A, start, iterations if kept else iterations + _COLD, pieces)
    return None if Q is None else rayleigh_ritz(A, Q, pieces).leading(rank)


def subspace_by_energy(
    A: Tensor,
    energy: float,
    most: int,
    previous: Tensor | None,
    *,
    oversample: int,
    iterations: int,
    seed: int,
    number: int,
    pieces: Whole,
    whole_shape: tuple[int, int],
) -> Subspace | None:
    """The smallest subspace found with ‖A − PPᵀA‖² ≤ (1 − energy)·‖A‖², of ``most`` directions where none so small has it.

    A range finder that doubles until it holds enough, from the old basis on; the Ritz values then say how many of the
    directions are needed. The condition is met exactly by the P returned: P is orthonormal, so ‖A − PPᵀA‖² = ‖A‖² − ‖PᵀA‖².

    Args:
        A: (c, o), this process's piece of it.
        energy: share of ‖A‖² to hold.
        most: largest rank allowed.
        previous: (c, r') old basis, or None for the first.
        whole_shape: (c, o) of the whole A.

    Returns:
        None where A is zero or has a NaN or an infinity.
    """
    cap = min(most + oversample, *whole_shape)
    start = previous if previous is not None else A.new_empty(A.shape[0], 0)
    width = min((start.shape[1] or _FIRST_GUESS) + oversample, cap)
    needed = energy * pieces.norm(A) ** 2
    for attempt in itertools.count():
        fresh = pieces.mine(sketch(whole_shape[0], max(width - start.shape[1], 0), A, seed, number, attempt))
        cold = previous is None and not attempt
        start = torch.cat([start[:, :width], fresh], dim=1)
        Q = iterate(A, start, iterations + _COLD if cold else iterations, pieces)
        if Q is None:
            return None
        found = rayleigh_ritz(A, Q, pieces)
        held = found.energies[:most].double().cumsum(0)
        if float(held[-1]) >= needed or width == cap:
            # of equal energies in rounding: never more than there are
            return found.leading(min(int((held < needed).sum()) + 1, held.numel()))
        start, width = found.basis, min(2 * width, cap)
    raise AssertionError("the loop ends at the cap")


def subspace_by_svd(A: Tensor, rank: int) -> Subspace | None:
    """The ``rank`` leading left singular vectors of A exactly, by LAPACK; None where A is zero or not finite."""
    largest = float(A.abs().max()) if A.numel() else 0.0
    if not 0 < largest < math.inf:
        return None
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return Subspace(U, S[:, None] * Vh, S.square()).leading(rank)
