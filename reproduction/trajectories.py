"""What a picture keeps of a descent: the end-to-end matrices it passed, the plane they are seen in, the points of a curve."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


class Path:
    """End-to-end matrices along a descent, one whenever it has moved on by a share of where it has got to.

    Args:
        share: of ‖f‖, or of ``floor`` while ‖f‖ is below it.
        floor: a norm under which the picture shows nothing, so that a small start is not followed through its first decades.
    """

    def __init__(self, share: float, floor: float = 0.0) -> None:
        self.share, self.floor = share, floor
        self.points: list[Matrix] = []

    def add(self, f: Matrix) -> bool:
        """Keeps a copy of f if it is far enough from the last one kept; says whether it did."""
        far = not self.points or np.linalg.norm(f - self.points[-1]) > self.share * max(
            float(np.linalg.norm(f)), self.floor
        )
        if far:
            self.points.append(f.copy())
        return bool(far)


def principal_plane(points: Sequence[Matrix]) -> Matrix:
    """The two leading principal directions of matrices, as rows (2, m·n), each with its largest entry positive."""
    flat = np.stack([f.ravel() for f in points])
    flat -= flat.mean(0)
    # the small Gram matrix instead of an SVD of all entries: only the two leading directions are wanted
    _, weights = np.linalg.eigh(flat @ flat.T)
    plane = np.linalg.qr(flat.T @ weights[:, :-3:-1])[0].T
    largest = np.abs(plane).argmax(axis=1)
    return plane * np.sign(plane[[0, 1], largest])[:, None]


def evenly_along(iterations: Sequence[int], values: Sequence[float], points: int) -> list[int]:
    """Indices of at most about ``points`` points of a curve, equally many along its iterations and its fall in decades."""
    steps = np.asarray(iterations, dtype=float)
    fall = np.concatenate([[0], np.cumsum(np.abs(np.diff(np.log(np.maximum(values, 1e-300)))))])
    along = steps / max(steps[-1], 1) + fall / max(fall[-1], 1e-12)
    kept = np.unique(np.searchsorted(along, np.linspace(0, along[-1], points)).clip(max=len(along) - 1))
    return [int(index) for index in kept]
