"""ρ by hand, Lemma E.2 where its conditions hold and its refusal elsewhere, the bound and its missing condition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.factorizations import (
    DeepLinear,
    invariant_bases,
    invariant_blocks,
    rho_bounds,
    rho_trajectory,
    trajectory_error,
    trajectory_error_bound,
)

F64 = torch.float64
scales = st.lists(st.floats(1e-3, 1.5), min_size=1, max_size=5)


@given(scales=scales, lr=st.floats(1e-3, 0.3), decay=st.floats(0, 0.5))
def test_rho_follows_equation_6(scales, lr, decay):
    rho = rho_trajectory(scales, lr, decay, 6)
    assert rho.shape == (7, len(scales))
    assert rho.dtype == F64
    now = list(scales)
    for t in range(7):
        assert torch.allclose(rho[t], torch.tensor(now, dtype=F64), rtol=1e-12, atol=0)
        products = [math.prod(r * r for k, r in enumerate(now) if k != l) for l in range(len(now))]  # noqa: E741
        now = [r * (1 - lr * decay - lr * p) for r, p in zip(now, products, strict=True)]


@pytest.mark.parametrize("nesterov", [False, True])
@given(scales=scales, lr=st.floats(1e-3, 0.1), decay=st.floats(0, 0.5), momentum=st.floats(0.1, 0.95))
def test_rho_with_momentum_follows_its_two_term_recursion(nesterov, scales, lr, decay, momentum):
    """ρ(t+1) = ρ − ηg + μ(ρ(t) − ρ(t−1)); Nesterov's is the same about the point that torch.optim.SGD keeps, ρ + ημ·b."""
    rho = rho_trajectory(scales, lr, decay, 8, momentum=momentum, nesterov=nesterov)
    parameters = [torch.nn.Parameter(torch.tensor(s, dtype=F64)) for s in scales]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    before = rho[0]
    for t in range(8):
        assert torch.allclose(rho[t], torch.stack([p.detach() for p in parameters]), rtol=1e-10, atol=1e-14)
        # the gradient of ½∏ρ² is ρ_l∏_{k≠l}ρ_k²
        loss = 0.5 * torch.stack(list(parameters)).prod().square()
        g = torch.stack(torch.autograd.grad(loss, parameters))
        for parameter, slope in zip(parameters, g, strict=True):
            parameter.grad = slope
        if not nesterov:
            heavy = rho[t] - lr * (g + decay * rho[t]) + momentum * (rho[t] - before)
            assert torch.allclose(rho[t + 1], heavy, rtol=1e-10, atol=1e-14)
        before = rho[t]
        optimizer.step()


@given(epsilon=st.floats(1e-3, 1.0), depth=st.integers(2, 6), decay=st.floats(0, 2.0), share=st.floats(0.01, 1.0))
def test_lemma_e2_bounds_hold_under_its_conditions(epsilon, depth, decay, share):
    lr = share / (decay + epsilon)
    rho = rho_trajectory([epsilon] * depth, lr, decay, 30)
    lower, upper = rho_bounds([epsilon] * depth, lr, decay, 30)
    assert lower.shape == upper.shape == (31,)
    assert torch.equal(rho[:, 0], rho[:, -1])
    slack = 1e-12 * epsilon
    assert bool((lower - slack <= rho[:, 0]).all())
    assert bool((rho[:, 0] <= upper + slack).all())


def test_lemma_e2_needs_two_factors():
    """A single factor loses 1 − η(λ+1) a step, more than the lower bound's 1 − η(λ+ε): ours to say, not the paper's."""
    epsilon, lr = 0.1, 0.5
    rho = rho_trajectory([epsilon], lr, 0.0, 1)
    assert float(rho[1, 0]) < epsilon * (1 - lr * epsilon)
    with pytest.raises(ValueError, match="two or more factors"):
        rho_bounds([epsilon], lr, 0.0, 1)


@pytest.mark.parametrize(
    ("scales", "lr", "decay", "message"),
    [
        ([0.1, 0.2], 0.1, 0.0, "one scale"),
        ([1.2, 1.2], 0.1, 0.0, "at most 1"),
        ([0.5, 0.5], 2.01, 0.0, r"≤ 1/\(λ \+ ε\) = 2"),
        ([0.5, 0.5], 1.01, 0.5, "lr = 1.01"),
        ([0.5, 0.5], 0.1, -0.1, "λ ≥ 0"),
        ([0.5, -0.5], 0.1, 0.0, "positive scale"),
    ],
)
def test_lemma_e2_says_which_condition_fails(scales, lr, decay, message):
    with pytest.raises(ValueError, match=message):
        rho_bounds(scales, lr, decay, 3)


@pytest.mark.parametrize("scales", [[1.1, 1.1, 1.1], [0.2, 0.9, 0.9]])
def test_lemma_e2_is_false_without_equal_scales_of_at_most_one(scales):
    """Its lower bound, whichever ε one puts in, is crossed."""
    lr = 0.5 / max(scales)
    rho = rho_trajectory(scales, lr, 0.0, 20)
    lower = scales[0] * (1 - lr * scales[0]) ** torch.arange(21, dtype=F64)
    assert bool((rho[:, 0] < lower - 1e-6).any())


@given(
    scales=st.lists(st.floats(1e-3, 2.0), min_size=1, max_size=5), decay=st.floats(0, 1.0), share=st.floats(0.01, 1.0)
)
def test_the_error_stays_below_the_bound_under_its_condition(scales, decay, share):
    fastest = decay + max(math.prod(r * r for k, r in enumerate(scales) if k != l) for l in range(len(scales)))  # noqa: E741
    lr = share * 2 / fastest * (1 - 1e-12)
    bound = trajectory_error_bound(scales, 30, 4, lr=lr, weight_decay=decay)
    assert bound == pytest.approx(22 * math.prod(r * r for r in scales), rel=1e-12)
    error = trajectory_error(rho_trajectory(scales, lr, decay, 60), 30, 4)
    assert float(error[0]) == pytest.approx(bound, rel=1e-12)
    assert float(error.max()) <= bound * (1 + 1e-9)


@pytest.mark.parametrize(("width", "rank"), [(10, 5), (10, 6), (9, 5), (10, 0)])
def test_a_rank_that_leaves_nothing_behind_is_refused(width, rank, generator):
    with pytest.raises(ValueError, match=f"got width {width} and rank {rank}"):
        trajectory_error_bound([0.1], width, rank, lr=0.1)
    with pytest.raises(ValueError, match="above 2·rank"):
        trajectory_error(torch.ones(2, 1, dtype=F64), width, rank)
    deep = DeepLinear.orthogonal(width, 2, 0.1, generator=generator, dtype=F64)
    with pytest.raises(ValueError, match="nothing can be compressed"):
        invariant_bases(deep, torch.eye(width, dtype=F64), rank)


def test_bad_scales_and_steps_are_refused():
    for bad in ([], [0.0], [-1.0, 1.0], [math.inf], [math.nan]):
        with pytest.raises(ValueError, match="one positive scale"):
            rho_trajectory(bad, 0.1, 0.0, 3)
    with pytest.raises(ValueError, match="number of updates"):
        rho_trajectory([0.1], 0.1, 0.0, -1)


def test_a_diverging_rho_ends_in_infinities_not_in_an_exception():
    assert not bool(rho_trajectory([30.0, 20.0], 1.0, 0.0, 60)[-1].isfinite().all())


def test_blocks_of_a_matrix_built_from_blocks():
    """UᵀWV = [[A, B], [C, D]] planted: leakage is √(‖B‖²+‖C‖²), ρ the mean of D's diagonal, its error ‖D − ρI‖."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(6, 6, dtype=F64, generator=generator)).Q for _ in range(2))
    whole = torch.zeros(6, 6, dtype=F64)
    whole[:2, :2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    whole[0, 5], whole[4, 1] = 3.0, 4.0
    whole[2:, 2:] = torch.diag(torch.tensor([0.5, 0.5, 0.5, 0.7], dtype=F64))
    blocks = invariant_blocks([U @ whole @ V.mT], [U], [V], width=2)
    assert torch.allclose(blocks.inner[0], whole[:2, :2], atol=1e-12)
    assert float(blocks.leakage) == pytest.approx(5.0)
    assert float(blocks.rho) == pytest.approx(0.55)
    assert float(blocks.rho_error) == pytest.approx(math.sqrt(3 * 0.05**2 + 0.15**2))
    against = invariant_blocks([U @ whole @ V.mT], [U], [V], width=2, rho=torch.tensor([0.5], dtype=F64))
    assert float(against.rho_error) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="1 factors, 2 U and 1 V"):
        invariant_blocks([whole], [U, U], [V], width=2)
