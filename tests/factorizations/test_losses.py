"""Every loss against autograd on its definition, and its rewriting for a core against the whole matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.factorizations import AutogradLoss, MaskedSquaredLoss, RegressionLoss, SquaredLoss, whitened
from tests.spectral.planted import frame, planted

F64 = torch.float64
seeds = st.integers(0, 2**31 - 1)


def gaussian(rows, columns, seed):
    return torch.randn(rows, columns, dtype=F64, generator=torch.Generator().manual_seed(seed))


def squared(m, n, seed):
    target = gaussian(m, n, seed)
    return SquaredLoss(target), lambda f: 0.5 * (f - target).square().sum()


def masked(m, n, seed):
    target, mask = gaussian(m, n, seed), gaussian(m, n, seed + 1) > 0
    mask[0, 0] = True
    holes = target.masked_fill(~mask, torch.nan)
    return MaskedSquaredLoss(holes, mask), lambda f: 0.5 * (mask * (f - target)).square().sum()


def few_samples(m, n, seed):
    X, Y = gaussian(n, max(n - 1, 1), seed), gaussian(m, max(n - 1, 1), seed + 1)
    return RegressionLoss(X, Y), lambda f: 0.5 * (f @ X - Y).square().sum()


def many_samples(m, n, seed):
    X, Y = gaussian(n, 3 * n + 2, seed), gaussian(m, 3 * n + 2, seed + 1)
    return RegressionLoss(X, Y), lambda f: 0.5 * (f @ X - Y).square().sum()


def white(m, n, seed):
    X, Y = whitened(gaussian(n, n + 3, seed)), gaussian(m, n + 3, seed + 1)
    return RegressionLoss(X, Y), lambda f: 0.5 * (f @ X - Y).square().sum()


def logistic(m, n, seed):
    signs = gaussian(m, n, seed).sign()

    def function(f):
        return torch.nn.functional.softplus(-signs * f).sum()

    return AutogradLoss(function), function


LOSSES = [squared, masked, few_samples, many_samples, white, logistic]


@pytest.mark.parametrize("make", LOSSES)
@given(m=st.integers(1, 6), n=st.integers(1, 6), seed=seeds)
def test_value_and_gradient_are_autograds(make, m, n, seed):
    loss, definition = make(m, n, seed)
    f = gaussian(m, n, seed + 7).requires_grad_()
    expected = definition(f)
    value, G = loss.value_and_gradient(f.detach())
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-11, abs=1e-11)
    assert torch.allclose(G, torch.autograd.grad(expected, f)[0], rtol=1e-10, atol=1e-10)
    assert not value.requires_grad
    assert not G.requires_grad


@pytest.mark.parametrize("orthonormal", [True, False])
@pytest.mark.parametrize("sides", ["both", "left", "right", "none"])
@pytest.mark.parametrize("make", LOSSES)
def test_the_core_s_loss_is_the_loss_of_the_whole_matrix(make, sides, orthonormal):
    m, n, w = 7, 6, 3
    loss, definition = make(m, n, 3)
    stretch = 1.0 if orthonormal else 1.7
    U = stretch * frame(m, w, 11) if sides in ("both", "left") else None
    V = stretch * frame(n, w, 12) if sides in ("both", "right") else None
    C = gaussian(m if U is None else w, n if V is None else w, 5).requires_grad_()
    f = C if U is None else U @ C
    expected = definition(f if V is None else f @ V.mT)
    core = loss.project(U, V)
    value, G = core.value_and_gradient(C.detach())
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert torch.allclose(G, torch.autograd.grad(expected, C)[0], rtol=1e-11, atol=1e-11)
    assert core.at_zero == pytest.approx(loss.at_zero, rel=1e-12) if loss.at_zero is not None else core.at_zero is None


@pytest.mark.parametrize("make", [squared, masked, few_samples, many_samples, white])
def test_the_unit_of_the_tolerance_is_the_loss_at_zero(make):
    loss, definition = make(5, 4, 0)
    assert loss.at_zero == pytest.approx(float(definition(torch.zeros(5, 4, dtype=F64))), rel=1e-12)


def test_what_the_frames_cannot_reach_is_kept_to_the_last_digit():
    """A target of norm 1e6 whose part outside the frames is 1e-4: the difference of squares, 1e12·(1 − 1), has no digit of it."""
    inside = planted(9, 8, [1e6, 5e5]).matrix
    U, _, Vh = torch.linalg.svd(inside)
    outside = 1e-4 * torch.outer(U[:, 5], Vh[5])
    core = SquaredLoss(inside + outside).project(U[:, :3].contiguous(), Vh[:3].mT)
    value, _ = core.value_and_gradient(U[:, :3].mT @ inside @ Vh[:3].mT)
    assert float(value) == pytest.approx(0.5e-8, rel=1e-4)


def test_many_samples_are_reduced_to_as_many_as_inputs():
    loss, _ = many_samples(3, 4, 0)
    assert loss.inputs.shape == (4, 4)
    assert loss.outputs.shape == (3, 4)


def test_white_inputs_make_regression_the_squared_loss_of_y_xt():
    X, Y = whitened(gaussian(5, 12, 0)), gaussian(3, 12, 1)
    f = gaussian(3, 5, 2)
    plain, G = SquaredLoss(Y @ X.mT).value_and_gradient(f)
    value, H = RegressionLoss(X, Y).value_and_gradient(f)
    assert torch.allclose(G, H, rtol=1e-12, atol=1e-12)
    rest = 0.5 * float(Y.square().sum() - (Y @ X.mT).square().sum())
    assert float(value - plain) == pytest.approx(rest, rel=1e-10)


def test_whitening_is_symmetric():
    """(XXᵀ)^{-1/2}X, not merely some white turn of it."""
    X = gaussian(4, 9, 0)
    root = whitened(X) @ torch.linalg.pinv(X)
    assert torch.allclose(root, root.mT, rtol=0, atol=1e-12)
    assert torch.allclose(root @ X @ X.mT @ root, torch.eye(4, dtype=F64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("X", [torch.ones(3, 7), torch.eye(4)[:, :3], torch.zeros(2, 5)])
def test_inputs_that_cannot_be_white_are_refused(X):
    with pytest.raises(ValueError, match="full row rank"):
        whitened(X)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_targets_that_are_not_finite_are_refused_by_place(bad):
    target = torch.ones(4, 5)
    target[2, 3] = target[3, 0] = bad
    with pytest.raises(ValueError, match=r"the target has 2 entries that are not finite \(first at \[2, 3\]\).*Masked"):
        SquaredLoss(target)
    with pytest.raises(ValueError, match="the observed part of the target has 2 entries"):
        MaskedSquaredLoss(target, torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="the matrix of inputs has 2"):
        RegressionLoss(target, torch.ones(3, 5))
    with pytest.raises(ValueError, match="the matrix of outputs has 2"):
        RegressionLoss(torch.ones(3, 5), target)


def test_targets_of_other_kinds_are_refused(unchecked_shapes):
    with pytest.raises(ValueError, match=r"matrix of floats, got torch.int64 of shape \(2, 2\)"):
        SquaredLoss(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"matrix of floats, got torch.float32 of shape \(2,\)"):
        SquaredLoss(torch.ones(2))
    with pytest.raises(ValueError, match=r"the target's shape \(2, 3\), got \(3, 2\)"):
        MaskedSquaredLoss(torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="inputs have 4 samples and outputs 5"):
        RegressionLoss(torch.ones(2, 4), torch.ones(2, 5))


def test_an_empty_mask_is_refused():
    with pytest.raises(ValueError, match="observes no entry"):
        MaskedSquaredLoss(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))
