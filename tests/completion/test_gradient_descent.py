"""Eq. 11 as it stands: its gradient by autograd, its trajectory by the full width, its behaviour by the paper."""

import numpy as np
import pytest
import torch

from rankwise.completion.gradient_descent import (
    CompletionFactors,
    compressed_start,
    gradient_descent,
    narrow_random_start,
    safe_learning_rate,
)
from rankwise.completion.observations import as_observations
from rankwise.errors import UserError
from rankwise.factorizations import CompressedDeepLinear, DeepLinear
from tests.completion.planted import entries, low_rank, observed, relative_error


def product(found):
    return found.left @ found.core @ found.right.T


@pytest.mark.parametrize("shape", [(12, 9), (8, 8), (6, 14)])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_one_step_is_autograds(shape, depth):
    full = low_rank(*shape, 2)
    mask = observed(full, 0.6)
    rng = np.random.default_rng(0)
    start = CompletionFactors(*(rng.standard_normal(s) for s in ((shape[0], 4), (depth, 4, 4), (shape[1], 4))))
    eta, gamma = 1e-3, 0.2
    found = gradient_descent(
        entries(full, mask), rank=2, start=start, learning_rate=eta, outer_lr_ratio=gamma, max_iter=1, tol=1e-12
    )
    U, inner, V = (torch.tensor(f, requires_grad=True) for f in (start.left, start.inner, start.right))
    f = U
    for W in reversed(list(inner)):
        f = f @ W
    loss = 0.5 * ((f @ V.T - torch.tensor(full))[torch.tensor(mask)] ** 2).sum()
    loss.backward()
    assert found.history[0]["loss"] == pytest.approx(loss.item())
    for got, parameter, rate in (
        (found.left, U, gamma * eta),
        (found.inner, inner, eta),
        (found.right, V, gamma * eta),
    ):
        np.testing.assert_allclose(got, (parameter - rate * parameter.grad).detach().numpy(), atol=1e-12)


def test_with_everything_observed_it_follows_the_full_width_to_the_paper_s_bound():
    """Prop 2.2: the products differ by exactly (d − 2r)·∏ρ_l² ≤ (d − 2r)·ε^{2L} in squared norm."""
    d, r, depth, scale, eta, steps = 30, 2, 3, 0.05, 0.05, 300
    full = low_rank(d, d, r) / d * 3
    generator = torch.Generator().manual_seed(0)
    deep = DeepLinear.orthogonal(d, depth, scale, generator=generator, dtype=torch.float64)
    narrow = CompressedDeepLinear.from_full_width(deep, torch.from_numpy(-full), r)
    start = CompletionFactors(*(p.detach().numpy() for p in (narrow.left, narrow.inner, narrow.right)))
    found = gradient_descent(
        as_observations(full), rank=r, start=start, learning_rate=eta, outer_lr_ratio=0.0, max_iter=steps, tol=1e-15
    )
    weights = [w.detach().clone().requires_grad_() for w in deep.weights]
    for _ in range(steps):
        f = torch.linalg.multi_dot(list(reversed(weights)))
        gradients = torch.autograd.grad(0.5 * ((f - torch.from_numpy(full)) ** 2).sum(), weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= eta * gradient
    wide = torch.linalg.multi_dot(list(reversed(weights))).detach().numpy()
    assert relative_error(wide, full) < 0.5  # it has left the start
    assert np.sum((wide - product(found)) ** 2) <= (d - 2 * r) * scale ** (2 * depth) * (1 + 1e-6)


@pytest.mark.parametrize("rank", [2, 6])
def test_an_overestimated_rank_does_no_harm(rank):
    full = low_rank(60, 60, 2)
    seen = entries(full, observed(full, 0.5))
    found = gradient_descent(seen, rank=rank, init_scale=1e-2, outer_lr_ratio=0.1, tol=1e-4, max_iter=20_000)
    assert found.converged
    assert relative_error(product(found), full) < 1e-3


def test_a_tall_matrix_is_recovered_too():
    full = low_rank(120, 30, 2)
    seen = entries(full, observed(full, 0.6))
    found = gradient_descent(seen, rank=3, init_scale=1e-2, outer_lr_ratio=0.1, tol=1e-4, max_iter=20_000)
    assert relative_error(product(found), full) < 1e-3


def test_frames_that_never_move_stall():
    full = low_rank(60, 60, 2)
    seen = entries(full, observed(full, 0.5))
    settings = {"rank": 2, "init_scale": 1e-2, "tol": 1e-6, "max_iter": 5000}
    stalled = gradient_descent(seen, outer_lr_ratio=0.0, **settings)
    moving = gradient_descent(seen, outer_lr_ratio=0.1, **settings)
    assert not stalled.converged
    assert relative_error(product(stalled), full) > 30 * relative_error(product(moving), full)


def test_starts_are_what_they_say():
    full = low_rank(20, 14, 3)
    seen = entries(full, observed(full, 0.7))
    start = compressed_start(seen, 3, depth=4, init_scale=0.01)
    np.testing.assert_allclose(start.left.T @ start.left, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(start.right.T @ start.right, np.eye(6), atol=1e-12)
    np.testing.assert_array_equal(start.inner, 0.01 * np.tile(np.eye(6), (4, 1, 1)))
    U = np.linalg.svd(seen.matrix().toarray())[0][:, :3]
    np.testing.assert_allclose(start.left @ (start.left.T @ U), U, atol=1e-8)  # holds the gradient's directions
    narrow = narrow_random_start(seen, 5, depth=3, init_scale=0.01)
    np.testing.assert_allclose(narrow.left.T @ narrow.left, 1e-4 * np.eye(5), atol=1e-12)


def test_a_safe_rate_is_safe_and_not_timid():
    full = 40 * low_rank(50, 50, 2)
    seen = entries(full, observed(full, 0.5))
    eta = safe_learning_rate(seen, outer_lr_ratio=0.1)
    settings = {"rank": 2, "init_scale": 1e-2, "outer_lr_ratio": 0.1, "tol": 1e-4, "max_iter": 30_000}
    assert gradient_descent(seen, learning_rate=eta, **settings).converged
    with pytest.raises(UserError, match="lower learning_rate"), np.errstate(all="ignore"):
        gradient_descent(seen, learning_rate=20 * eta, **settings)


def test_a_callback_ends_it_and_sees_every_step():
    full = low_rank(20, 20, 2)
    seen = []

    def watch(step):
        seen.append(step.iteration)
        return step.iteration == 7

    found = gradient_descent(entries(full, observed(full, 0.6)), rank=2, callback=watch, record_every=5)
    assert seen == list(range(8))
    assert found.iterations == 7
    assert [entry["iteration"] for entry in found.history] == [0, 5, 7]


def test_float32_stays_float32():
    full = low_rank(40, 40, 2)
    seen = entries(full, observed(full, 0.6), np.float32)
    found = gradient_descent(seen, rank=2, init_scale=1e-2, outer_lr_ratio=0.1, tol=1e-3, max_iter=20_000)
    assert found.left.dtype == np.float32
    assert found.converged


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 99}, "rank"),
        ({"depth": 0}, "depth"),
        ({"init_scale": -1.0}, "init_scale"),
        ({"outer_lr_ratio": -1.0}, "outer_lr_ratio"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"max_iter": -1}, "max_iter"),
    ],
)
def test_unusable_settings_are_named(settings, says):
    with pytest.raises(UserError, match=says):
        gradient_descent(as_observations(np.eye(6) + 1), **{"rank": 2, **settings})


def test_nothing_but_zeros_point_nowhere():
    with pytest.raises(UserError, match="zero"):
        gradient_descent(as_observations(np.zeros((4, 4))), rank=1)
