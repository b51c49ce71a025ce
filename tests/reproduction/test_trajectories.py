"""Points kept of a descent and the plane in which they are drawn, against dense linear algebra."""

import numpy as np
import pytest
import torch

from reproduction.planted import low_rank_target
from reproduction.trajectories import Path, evenly_along, principal_plane


def test_a_path_keeps_a_point_for_every_share_of_the_way() -> None:
    path, f = Path(share=0.1), np.ones((2, 3))
    assert [path.add(scale * f) for scale in (1.0, 1.05, 1.2, 1.3, 1.35)] == [True, False, True, False, True]
    f[:] = 0
    assert np.linalg.norm(path.points[0]) > 1, "points are copies"


def test_below_the_floor_a_path_is_measured_in_its_units() -> None:
    path, f = Path(share=0.1, floor=10.0), np.array([[1.0]])
    assert [path.add(scale * f) for scale in (1e-6, 1e-3, 0.9, 1.1, 100.0)] == [True, False, False, True, True]


def test_the_plane_holds_the_two_directions_of_largest_variance() -> None:
    rng = np.random.default_rng(0)
    points = [rng.standard_normal((4, 5)) * np.array([5.0, 1, 1, 3, 1]) for _ in range(9)]
    flat = np.stack([f.ravel() for f in points])
    _, _, Vh = np.linalg.svd(flat - flat.mean(0))
    plane = principal_plane(points)
    np.testing.assert_allclose(plane @ plane.T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(np.abs(np.sum(plane * Vh[:2], axis=1)), 1, atol=1e-10)
    for direction in plane:
        assert direction[np.abs(direction).argmax()] > 0


def test_points_kept_follow_a_late_fall_as_closely_as_the_wait_before_it() -> None:
    iterations = list(range(1001))
    values = [1.0] * 991 + [10.0 ** (-k) for k in range(1, 11)]
    kept = evenly_along(iterations, values, points=40)
    assert kept[0] == 0
    assert kept[-1] == 1000
    assert len(kept) <= 40
    assert set(range(991, 1001)) <= set(kept), "half of all points lie in the fall's ten iterations"
    assert max(np.diff(kept)) <= 2 * 1000 / 20


@pytest.mark.parametrize("rows", [None, 5])
def test_the_target_is_a_gaussian_cut_to_its_rank(rows: int | None) -> None:
    target = low_rank_target(40, 3, seed=2, rows=rows)
    gaussian = np.random.default_rng(2).standard_normal((rows or 40, 40))
    singular_values = np.linalg.svd(gaussian, compute_uv=False)
    assert target.dtype == torch.float64
    np.testing.assert_allclose(torch.linalg.svdvals(target)[:3], singular_values[:3])
    assert torch.linalg.svdvals(target)[3] < 1e-12
    residual = torch.from_numpy(gaussian) - target
    assert float(residual.norm()) == pytest.approx(np.linalg.norm(singular_values[3:]))
