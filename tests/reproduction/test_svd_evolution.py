"""Singular vectors followed through equal and crossing singular values, against planted ones."""

import numpy as np
import pytest
import torch
from torch import Tensor

from rankwise.factorizations import DeepLinear, InvariantBases, SquaredLoss, fit_factorization
from rankwise.spectral import haar_frame
from reproduction.svd_evolution import WeightRecorder, as_returned, block_errors, followed, gaps

# soon after the start once more: there the basis departs from that the start leaves open
_TIMES = np.concatenate([[0, 1e-6], np.linspace(0, 1, 41)[1:]])


def _frames(d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left, right = (haar_frame(d, d, generator=generator, dtype=torch.float64) for _ in range(2))
    return left, right


def _rotation(angle: float, d: int) -> Tensor:
    """In the plane of the first two axes."""
    R = torch.eye(d, dtype=torch.float64)
    R[:2, :2] = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return R


def _planted(d: int = 7) -> list[Tensor]:
    """All σ equal to 1 at first; then one rises, another crosses the rest, which sink together, from above.

    On the right the two turn by half a radian in their plane, on the left by nothing.
    """
    U, V = _frames(d)
    weights = []
    for t in _TIMES:
        S = torch.full((d,), 1 - 0.2 * t, dtype=torch.float64)
        S[0], S[1] = 1 + 2 * t, 1 + 0.5 * t - t * t
        weights.append(U @ torch.diag(S) @ (V @ _rotation(0.5 * t, d)).mT)
    return weights


def test_planted_values_and_turns_are_found_and_the_rest_stands_still() -> None:
    evolution = followed(_planted())
    first, last = evolution.sigma[:, 0], evolution.sigma[:, -1]
    np.testing.assert_allclose(first, 1 + 2 * _TIMES)
    np.testing.assert_allclose(last, 1 + 0.5 * _TIMES - _TIMES**2)
    assert evolution.moved().tolist() == [True] + [False] * 5 + [True]
    turned_at_first = np.degrees(0.5 * _TIMES[1])  # of which the start's one rotation takes half
    for moving in (0, -1):
        np.testing.assert_allclose(
            evolution.right_degrees[:, moving], np.degrees(0.5 * _TIMES), rtol=1e-6, atol=0.6 * turned_at_first
        )
        assert evolution.left_degrees[:, moving].max() < 0.6 * turned_at_first
    assert evolution.right_degrees[:, 1:-1].max() < 1e-6  # rounding over the gap of 7e-7 at that first time
    found = evolution.summary()
    assert (found["moving"], found["still"]) == (2, 5)
    assert found["spread_of_still"] < 1e-14
    assert found["least_turn_of_moving"] == pytest.approx(np.degrees(0.5))


def test_the_svd_routines_own_order_shows_turns_that_are_not_there() -> None:
    by_routine = as_returned(_planted())
    assert np.median(by_routine.right_degrees[-1]) > 20


def test_a_turn_is_an_angle_between_lines() -> None:
    """3 radians are 180° − 171.9° = 8.1° to a vector without a sign."""
    U, V = _frames(4)
    S = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    turning = [U @ S @ (V @ _rotation(3.0 * t, 4)).mT for t in _TIMES]
    evolution = followed(turning)
    assert evolution.right_degrees[-1, 0] == pytest.approx(180 - np.degrees(3.0))
    assert evolution.right_degrees[:, 0].max() == pytest.approx(90, abs=3)


def test_small_turns_keep_their_digits() -> None:
    """1e-10 radians, which arccos would call 0."""
    U, V = _frames(3)
    S = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    evolution = followed([U @ S @ V.mT, U @ S @ (V @ _rotation(1e-10, 3)).mT])
    assert np.radians(evolution.right_degrees[-1, 0]) == pytest.approx(1e-10, rel=1e-3)


def test_curves_hold_the_moving_ones_and_the_band_of_the_rest() -> None:
    evolution = followed(_planted())
    curves = evolution.curves(list(range(len(_TIMES))), points=5)
    assert curves["iteration"] == [0, 10, 20, 30, 41]
    times = _TIMES[curves["iteration"]]
    np.testing.assert_allclose(curves["sigma"]["moving"][0], 1 + 2 * times)
    np.testing.assert_allclose(curves["sigma"]["still"], [1 - 0.2 * times] * 2)


def test_a_recorder_keeps_copies_more_and_more_rarely_and_the_last() -> None:
    deep = DeepLinear.orthogonal(6, 2, 0.5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = deep.weights[0].detach().clone()
    recorder = WeightRecorder(last=97, growth=1.5)
    result = fit_factorization(
        deep, SquaredLoss(torch.eye(6, dtype=torch.float64)), lr=0.05, steps=97, tol=0.0, callbacks=[recorder]
    )
    assert recorder.iterations == [0, 1, 2, 3, 5, 8, 12, 18, 27, 41, 62, 93, 97]
    torch.testing.assert_close(recorder.of_layer(1)[0], start, rtol=0, atol=0)
    torch.testing.assert_close(recorder.of_layer(2)[-1], deep.weights[1].detach(), rtol=0, atol=0)
    torch.testing.assert_close(recorder.products[-1], deep.product().detach())
    assert recorder.losses == [result.losses[at] for at in recorder.iterations]


def test_block_errors_see_what_leaves_the_blocks_and_what_leaves_rho() -> None:
    """One planted entry outside the blocks, one off the diagonal of the rest, read in turned bases."""
    U, V = _frames(5)
    inside = torch.diag(torch.tensor([3.0, 2.0, 0.5, 0.5, 0.5], dtype=torch.float64))
    outside, beside = inside.clone(), inside.clone()
    outside[4, 0], beside[3, 2] = 0.25, 0.125
    recorder = WeightRecorder(last=2)
    recorder.iterations = [0, 1, 2]
    recorder.weights = [[U @ block @ V.mT] for block in (inside, outside, beside)]
    rho = torch.tensor([[0.5], [0.5], [0.5]], dtype=torch.float64)
    errors = block_errors(recorder, InvariantBases([U], [V], width=2), rho)
    np.testing.assert_allclose(errors["leakage"], [0, 0.25, 0], atol=1e-14)
    np.testing.assert_allclose(errors["rho_error"], [0, 0, 0.125], atol=1e-14)
    off = block_errors(recorder, InvariantBases([U], [V], width=2), rho + 0.1)
    assert off["rho_error"][0] == pytest.approx(0.1 * 3**0.5)


def test_gaps_are_frobenius_distances_of_the_products() -> None:
    full, narrow = WeightRecorder(last=0), WeightRecorder(last=0)
    full.products, narrow.products = [torch.zeros(2, 2), torch.ones(2, 2)], [torch.zeros(2, 2), -torch.ones(2, 2)]
    assert gaps(full, narrow) == [0.0, 4.0]
