"""The KKT residual: zero at KKT points known by hand, equal to a written-out one elsewhere."""

import math
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from rankwise.regularization import kkt_residual, margins
from tests.regularization.classes import Labelled, clouds, max_margin_matrix
from tests.regularization.minimizing import F64, gaussians

seeds = st.integers(0, 2**31 - 1)


def written_out(weights: list[torch.Tensor], data: Labelled) -> tuple[float, float]:
    """Stationarity and complementarity from gradients of every margin by autograd and scipy's NNLS."""
    depth = len(weights)
    weights = [weight.clone().requires_grad_() for weight in weights]
    outputs = reduce(lambda below, weight: weight @ below, weights, data.X)
    q = torch.stack(
        [outputs[y, i] - outputs[c, i] for i, y in enumerate(data.y.tolist()) for c in range(len(outputs)) if c != y]
    )
    J = np.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(v, weights, retain_graph=True)]).numpy() for v in q]
    )
    theta = torch.cat([weight.detach().flatten() for weight in weights]).numpy()
    unit = float(q.min().detach()) ** (1 / depth)
    theta, J, slack = theta / unit, J / unit ** (depth - 1), q.detach().numpy() / unit**depth - 1
    size = np.linalg.norm(theta)
    A = np.vstack([J.T / size, np.diag(slack) * depth / size**2])
    alpha, _ = nnls(A, np.append(theta / size, np.zeros(len(slack))))
    return np.linalg.norm(theta - J.T @ alpha) / size, np.linalg.norm(alpha * slack) * depth / size**2


def feasible_weights(data: Labelled, depth: int, seed: int) -> list[torch.Tensor]:
    """Right on every sample, and far from any KKT point: the data's own margin matrix through bent identity layers."""
    d = len(data.X)
    inner = [torch.eye(d, dtype=F64) + bend for bend in gaussians([(d, d)] * (depth - 1), seed, 0.1)]
    f = max_margin_matrix(data)
    return [*inner, torch.linalg.solve(reduce(lambda a, b: b @ a, inner, torch.eye(d, dtype=F64)), f, left=False)]


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("classes", [2, 4])
def test_it_is_zero_at_a_kkt_point_known_by_hand(depth, classes):
    """x_i = e_i, one a class: W_l = P = I − 11ᵀ/k has q = 1 and P = α·∂(Σq)/∂f = α·kP at α = 1/k, in every layer."""
    P = torch.eye(classes, dtype=F64) - 1 / classes
    residual = kkt_residual([3 * P] * depth, torch.eye(classes, dtype=F64), torch.arange(classes))
    assert residual.total < 1e-12
    expected = (1 - torch.eye(classes, dtype=F64)) / classes
    assert residual.multipliers.sum().item() == pytest.approx(classes - 1)
    assert (
        torch.allclose(residual.multipliers, expected) or classes == 2
    )  # two classes: q_12 and q_21 have one gradient
    assert all(torch.allclose(weight, P) for weight in residual.weights)


@given(seed=seeds)
def test_it_is_zero_at_a_support_vector_machine_and_at_nothing_near(seed):
    data = clouds(3, 5, 3, seed=seed)
    f = max_margin_matrix(data)
    assert kkt_residual([f], *data).total < 1e-5  # SLSQP's own accuracy
    nudged = f + 0.05 * f.norm() * gaussians([(3, 5)], seed)[0] / 15**0.5
    assert kkt_residual([nudged], *data).total > 0.01


@given(depth=st.integers(1, 4), classes=st.integers(2, 3), seed=seeds)
def test_it_is_the_written_out_residual(depth, classes, seed):
    data = clouds(classes, 4, 3, seed=seed)
    weights = feasible_weights(data, depth, seed)
    residual = kkt_residual(weights, *data)
    assert (residual.stationarity, residual.complementarity) == pytest.approx(written_out(weights, data), abs=1e-6)
    assert residual.total == math.hypot(residual.stationarity, residual.complementarity)
    assert float(margins(residual.weights, *data).min()) == pytest.approx(1, rel=1e-12)


@given(scale=st.floats(1e-3, 1e3), stretch=st.floats(1e-3, 1e3), depth=st.integers(1, 4))
def test_neither_the_scale_of_the_weights_nor_of_the_data_counts(scale, stretch, depth):
    data = clouds(3, 4, 3)
    weights = feasible_weights(data, depth, seed=1)
    plain = kkt_residual(weights, *data)
    scaled = kkt_residual([scale * weight for weight in weights], stretch * data.X, data.y)
    assert scaled[:3] == pytest.approx(plain[:3], rel=1e-6)


def test_a_sample_far_behind_the_margin_is_no_support_vector():
    """w ∝ (1, 1) is a combination of both samples, but the second has five times the margin."""
    X, y = torch.tensor([[1.0, 0.0], [0.0, 5.0]], dtype=F64), torch.tensor([0, 0])
    weights = [torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=F64)]
    residual = kkt_residual(weights, X, y)
    assert residual.total > 0.3
    # with no word about complementarity, stationarity alone would be met
    assert nnls(np.array([[1.0, 0.0], [0.0, 5.0]]), np.array([1.0, 1.0]))[1] < 1e-12


def test_unbalanced_layers_are_no_kkt_point():
    """The same f in layers of unequal norm."""
    P, eye = torch.eye(3, dtype=F64) - 1 / 3, torch.eye(3, dtype=F64)
    assert kkt_residual([2 * P, 0.5 * P], eye, torch.arange(3)).stationarity > 0.3


def test_narrow_weights_are_measured_in_float64():
    data = clouds(3, 4, 2)
    weights = [weight.float() for weight in feasible_weights(data, 2, seed=0)]
    residual = kkt_residual(weights, data.X.float(), data.y)
    assert residual.multipliers.dtype == F64


def test_weights_that_misclassify_are_refused():
    data = clouds(3, 4, 2)
    with pytest.raises(ValueError, match=r"misclassify a sample.*fit_max_margin"):
        kkt_residual([-max_margin_matrix(data)], *data)
