"""Low-rank matrices with known answers, and masks over them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.completion import Observations


def low_rank(rows: int, columns: int, rank: int, *, condition: float = 1.0, seed: int = 0) -> NDArray[np.float64]:
    """Random orthonormal factors, singular values evenly spaced in log from ``condition`` to 1, entries of size ~1."""
    rng = np.random.default_rng(seed)
    U, _ = np.linalg.qr(rng.standard_normal((rows, rank)))
    V, _ = np.linalg.qr(rng.standard_normal((columns, rank)))
    s = np.geomspace(condition, 1, rank)
    return (U * (s / np.linalg.norm(s) * np.sqrt(rows * columns))) @ V.T


def observed(full: NDArray[Any], fraction: float, *, least: int = 0, seed: int = 0) -> NDArray[np.bool_]:
    """A uniform mask with at least ``least`` entries in every row and column."""
    rng = np.random.default_rng(seed)
    mask = rng.random(full.shape) < fraction
    for axis, short in ((1, mask), (0, mask.T)):
        for line in np.flatnonzero(short.sum(1) < least):
            hidden = np.flatnonzero(~short[line])
            chosen = rng.choice(hidden, least - int(short[line].sum()), replace=False)
            if axis == 1:
                mask[line, chosen] = True
            else:
                mask[chosen, line] = True
    return mask


def with_holes(full: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[Any]:
    return np.where(mask, full, np.nan)


def entries(full: NDArray[Any], mask: NDArray[np.bool_], dtype: Any = np.float64) -> Observations:
    rows, columns = np.nonzero(mask)
    return Observations.from_coordinates(rows, columns, full[mask], full.shape, dtype)


def relative_error(found: NDArray[Any], full: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - full) / np.linalg.norm(full))
