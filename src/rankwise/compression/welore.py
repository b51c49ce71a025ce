"""WeLore: one threshold on normalized singular values for all layers, so that layers of low rank give up most."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.compression.rank_rules import Spectrum, best_by_value


def min_max_normalized(singular_values: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """(σ − σ_min)/(σ_max − σ_min). A flat spectrum becomes all ones: none of its directions matters less; zeros stay.

    Example:
        >>> import torch
        >>> from rankwise.compression import min_max_normalized
        >>> min_max_normalized(torch.tensor([5.0, 2.0, 1.0])).tolist()
        [1.0, 0.25, 0.0]
    """
    high, low = singular_values.max(), singular_values.min()
    if float(high - low) <= torch.finfo(singular_values.dtype).eps * float(high):
        return (singular_values > 0).to(singular_values.dtype)
    return (singular_values - low) / (high - low)


def welore_ranks(spectra: Sequence[Spectrum], target: float) -> list[int]:
    """Count each layer's normalized singular values above one threshold, found so that the target is kept.

    A layer keeps k(m + n) weights where that is less than mn, and stays dense otherwise. The published code has a
    threshold written down for each model and target; here it is searched for. It takes strictly what the target allows: the
    share kept is at most ``target`` and falls short by less than one direction of one layer.

    Args:
        spectra: of all layers.
        target: share of Σmn to keep, in (0, 1].

    Returns:
        A rank a layer; min(m, n) for those that stay dense.

    Raises:
        ValueError: a target outside (0, 1], or below what rank 1 everywhere keeps.

    Source: WeLore (Jaiswal et al. 2024, §3.2).

    Example:
        >>> import torch
        >>> from rankwise.compression import Spectrum, welore_ranks
        >>> steep, slow = 0.5 ** torch.arange(64.0), torch.linspace(1, 0.5, 64)
        >>> welore_ranks([Spectrum(steep, (64, 64)), Spectrum(slow, (64, 64))], 0.7)
        [12, 64]
    """
    values = [min_max_normalized(spectrum.singular_values) for spectrum in spectra]
    return best_by_value(values, [spectrum.shape for spectrum in spectra], target)
