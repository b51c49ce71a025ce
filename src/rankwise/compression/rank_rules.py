"""From the spectra of all layers to a rank for each."""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.spectral import rank_for_energy


class Spectrum(NamedTuple):
    """Singular values of an m × n layer, largest first, (min(m, n),), and its shape (m, n)."""

    singular_values: Tensor
    shape: tuple[int, int]


RankRule = Callable[[Sequence[Spectrum], float], list[int]]
"""(spectra, share of the weights to keep) → a rank for each; min(m, n) where the layer stays dense."""


def highest_paying_rank(shape: tuple[int, int]) -> int:
    """The largest k with k(m + n) < mn: at any higher one the pair is no smaller than the matrix. May be 0.

    Example:
        >>> from rankwise.compression import highest_paying_rank
        >>> highest_paying_rank((768, 768)), highest_paying_rank((2, 768))
        (383, 1)
    """
    m, n = shape
    return (m * n - 1) // (m + n)


def kept_weights(shape: tuple[int, int], rank: int) -> int:
    """k(m + n) where a pair of rank k pays, mn otherwise: the layer is then kept dense."""
    m, n = shape
    return rank * (m + n) if rank <= highest_paying_rank(shape) else m * n


def uniform_ranks(spectra: Sequence[Spectrum], target: float) -> list[int]:
    """The same share for every layer: ⌊target·mn/(m + n)⌋, whatever its spectrum.

    Raises:
        ValueError: a target outside (0, 1], or below what rank 1 keeps of some layer.

    Example:
        >>> import torch
        >>> from rankwise.compression import Spectrum, uniform_ranks
        >>> uniform_ranks([Spectrum(torch.ones(64), (64, 64)), Spectrum(torch.ones(64), (64, 256))], 0.5)
        [16, 25]
    """
    require_share(target)
    if target == 1:
        return [min(spectrum.shape) for spectrum in spectra]
    ranks = []
    for _, (m, n) in spectra:
        rank = int(target * m * n / (m + n))
        if rank == 0:
            raise ValueError(
                f"target={target:g} leaves a {m} × {n} layer less than rank 1, {(m + n) / (m * n):.2g} of it"
            )
        ranks.append(rank)
    return ranks


def uniform_ranks_from_one(spectra: Sequence[Spectrum], target: float) -> list[int]:
    """:func:`uniform_ranks`, also where some layer's share is below rank 1: it keeps rank 1, and the others one share less.

    Raises:
        ValueError: a target outside (0, 1], or below what rank 1 everywhere keeps.
    """
    require_share(target)
    shapes = [spectrum.shape for spectrum in spectra]
    if all(int(target * m * n / (m + n)) for m, n in shapes):
        return uniform_ranks(spectra, target)
    # a direction's value is the share of its layer at which it comes in: the highest first is the same share for all
    shares = [-(m + n) / (m * n) * torch.arange(1.0, min(m, n) + 1) for m, n in shapes]
    return best_by_value(shares, shapes, target)


def ranks_for_energy(spectra: Sequence[Spectrum], energy: float) -> list[int]:
    """The smallest ranks that hold this share of every layer's Σσ²; at least 1.

    Raises:
        ValueError: energy outside (0, 1].

    Example:
        >>> import torch
        >>> from rankwise.compression import Spectrum, ranks_for_energy
        >>> ranks_for_energy([Spectrum(torch.tensor([3.0, 1.0]), (2, 2))], 0.9)
        [1]
    """
    return [max(1, rank_for_energy(values, energy)) for values, _ in spectra]


def best_by_value(values: Sequence[Tensor], shapes: Sequence[tuple[int, int]], target: float) -> list[int]:
    """Keep the directions of largest value in all layers, as many as the target allows; at least one a layer.

    Going down one sorted list is lowering one threshold. What is kept only grows on the way, so that the place where the
    target is met is found by bisection: exactly, where a bisection on the threshold would stop at a tolerance, and also
    among equal values (of these, the directions with fewer before them in their own layer come first).

    Args:
        values: of every layer's directions, in any units that compare across layers, (min(m, n),) and falling.
        shapes: (m, n) of each.
        target: share of Σmn to keep at most.

    Raises:
        ValueError: a target outside (0, 1], or below what rank 1 everywhere keeps.
    """
    require_share(target)
    budget = target * sum(m * n for m, n in shapes)
    layer = torch.cat([torch.full((len(v),), place) for place, v in enumerate(values)])
    position = torch.cat([torch.arange(len(v)) for v in values])
    pooled = torch.cat([v.double().cpu() for v in values])
    order = torch.argsort(position, stable=True)
    order = order[torch.argsort(pooled[order], descending=True, stable=True)]
    layer = layer[order]

    def ranks(count: int) -> list[int]:
        found = torch.bincount(layer[:count], minlength=len(values)).clamp(min=1)
        return [int(rank) for rank in found]

    def kept(count: int) -> int:
        return sum(kept_weights(shape, rank) for shape, rank in zip(shapes, ranks(count), strict=True))

    if kept(0) > budget:
        least = kept(0) / sum(m * n for m, n in shapes)
        raise ValueError(f"target={target:g} cannot be reached: rank 1 in every layer keeps {least:.3g} of the weights")
    low, high = 0, len(layer)  # kept(low) fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if kept(middle) <= budget else (low, middle - 1)
    return [
        rank if rank <= highest_paying_rank(shape) else min(shape)
        for shape, rank in zip(shapes, ranks(low), strict=True)
    ]


def require_share(target: float) -> None:
    """Refuse what is no share to keep."""
    if not isinstance(target, Real) or isinstance(target, bool) or not 0 < target <= 1:
        raise ValueError(f"target is the share of the layers' weights to keep and must lie in (0, 1], got {target!r}")
