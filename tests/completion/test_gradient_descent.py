"""Eq. 11 as it stands: its gradient by autograd, its trajectory by the full width, its behaviour by the paper."""

import numpy as np
import pytest
import torch

from rankwise.completion import entry_products as kernels
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
    """Prop 2.2 at every iterate: the products differ by (d − 2r)·∏ρ_l² ≤ (d − 2r)·ε^{2L} in squared norm.

    The error is 4e-7 between products of size 1 to 3, so float64 holds its square to about 1e-6 of it.
    """
    d, r, depth, scale, eta, steps = 30, 2, 3, 0.05, 0.05, 300
    full = low_rank(d, d, r) / d * 3
    generator = torch.Generator().manual_seed(0)
    deep = DeepLinear.orthogonal(d, depth, scale, generator=generator, dtype=torch.float64)
    narrow = CompressedDeepLinear.from_full_width(deep, torch.from_numpy(-full), r)
    start = CompletionFactors(*(p.detach().numpy() for p in (narrow.left, narrow.inner, narrow.right)))
    products = []
    gradient_descent(
        as_observations(full),
        rank=r,
        start=start,
        learning_rate=eta,
        outer_lr_ratio=0.0,
        max_iter=steps,
        tol=1e-15,
        callback=lambda step: products.append(product(step.factors)),
    )
    weights = [w.detach().clone().requires_grad_() for w in deep.weights]
    rho = scale
    assert len(products) == steps + 1
    for compressed in products:
        f = torch.linalg.multi_dot(list(reversed(weights)))
        error = np.sum((f.detach().numpy() - compressed) ** 2)
        assert error == pytest.approx((d - 2 * r) * rho ** (2 * depth), rel=1e-5)
        assert error <= (d - 2 * r) * scale ** (2 * depth) * (1 + 1e-5)
        gradients = torch.autograd.grad(0.5 * ((f - torch.from_numpy(full)) ** 2).sum(), weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= eta * gradient
        rho *= 1 - eta * rho ** (2 * depth - 2)
    assert relative_error(products[-1], full) < 0.5  # it has left the start


def test_it_stops_at_the_first_step_whose_dense_residual_is_small_enough():
    full = 7 * low_rank(20, 16, 2)
    mask = observed(full, 0.7)
    tol, residuals = 1e-3, []
    found = gradient_descent(
        entries(full, mask),
        rank=2,
        init_scale=1e-1,
        outer_lr_ratio=0.1,
        tol=tol,
        max_iter=20_000,
        callback=lambda step: residuals.append(np.where(mask, product(step.factors) - full, 0)) and None,
    )
    relative = [np.linalg.norm(E) / np.linalg.norm(full[mask]) for E in residuals]
    assert found.converged
    assert relative[-1] <= tol < min(relative[:-1])
    assert found.iterations == len(relative) - 1
    np.testing.assert_allclose([entry["relative_residual"] for entry in found.history], relative, rtol=1e-9)
    losses = [0.5 * np.sum(E**2) for E in residuals]
    np.testing.assert_allclose([entry["loss"] for entry in found.history], losses, rtol=1e-9)


def test_without_numba_it_takes_the_same_path(monkeypatch):
    full = low_rank(30, 20, 2)
    seen = entries(full, observed(full, 0.6))
    settings = {"rank": 2, "init_scale": 1e-1, "outer_lr_ratio": 0.1, "tol": 1e-12, "max_iter": 500}
    usual = gradient_descent(seen, **settings)
    monkeypatch.setattr(kernels, "numba", None)
    plain = gradient_descent(seen, **settings)
    np.testing.assert_allclose(product(plain), product(usual), rtol=0, atol=1e-9)
    assert relative_error(product(plain), full) < 0.5  # it has left the start


def test_an_overestimated_rank_does_no_harm():
    """Neither to the answer nor, as in the paper's Fig. 10, to the number of iterations."""
    full = low_rank(100, 100, 2)
    seen = entries(full, observed(full, 0.4))
    settings = {"init_scale": 1e-2, "outer_lr_ratio": 0.1, "tol": 1e-4, "max_iter": 20_000}
    exact, double, triple = (gradient_descent(seen, rank=rank, **settings) for rank in (2, 4, 6))
    for found in (exact, double, triple):
        assert found.converged
        assert relative_error(product(found), full) < 1e-3
        assert found.iterations == pytest.approx(exact.iterations, rel=0.1)


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
    narrow = narrow_random_start(seen, 5, depth=4, init_scale=0.01)
    assert (narrow.left.shape, narrow.inner.shape, narrow.right.shape) == ((20, 5), (2, 5, 5), (14, 5))
    for factor in (narrow.left, *narrow.inner, narrow.right):
        np.testing.assert_allclose(factor.T @ factor, 1e-4 * np.eye(5), atol=1e-12)


@pytest.mark.parametrize(
    ("depth", "gamma", "outer_scale"),
    [(3, 0.0, 1.0), (3, 0.01, 1.0), (1, 1.0, 1.0), (2, 0.3, 1.0), (3, 0.01, 1e-3), (1, 1.0, 1e-3), (0, 1.0, 1e-3)],
)
def test_a_safe_rate_is_in_units_of_the_curvature_at_the_solution(depth, gamma, outer_scale):
    """The largest eigenvalue of autograd's Hessian where descent from small inner factors arrives, rates included."""
    a, b, sigma = torch.full((4, 1), 0.5), torch.full((9, 1), 1 / 3), 5.0
    target = sigma * (a @ b.T).double()
    low, high = 0.0, 10.0 * sigma
    for _ in range(200):  # s with (u₀² + γs²)·s^L = σ₁
        s = (low + high) / 2
        low, high = (s, high) if (outer_scale**2 + gamma * s * s) * s**depth < sigma else (low, s)
    u = (outer_scale**2 + gamma * s * s) ** 0.5

    def loss(x):  # descent at rate γη on U is descent at rate η on U/√γ
        U, V = u * a + gamma**0.5 * x[:4, None], u * b + gamma**0.5 * x[4:13, None]
        return 0.5 * ((U @ V.T * (s + x[13:]).prod() - target) ** 2).sum()

    hessian = torch.autograd.functional.hessian(loss, torch.zeros(13 + depth, dtype=torch.float64))
    curvature = float(torch.linalg.eigvalsh(hessian)[-1])
    eta = safe_learning_rate(
        as_observations(target.numpy()), depth=depth, outer_lr_ratio=gamma, outer_scale=outer_scale
    )
    assert eta * curvature == pytest.approx(0.9, rel=1e-4)


def test_a_safe_rate_is_safe_and_not_timid():
    full = 40 * low_rank(50, 50, 2)
    seen = entries(full, observed(full, 0.5))
    eta = safe_learning_rate(seen, outer_lr_ratio=0.1)
    settings = {"rank": 2, "init_scale": 1e-2, "outer_lr_ratio": 0.1, "tol": 1e-4, "max_iter": 30_000}
    assert gradient_descent(seen, learning_rate=eta, **settings).converged
    with pytest.raises(UserError, match="lower learning_rate"):
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
