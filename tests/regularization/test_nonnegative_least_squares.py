"""Nonnegative least squares against scipy's, and against the conditions that characterize a minimum."""

import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from rankwise.regularization import nonnegative_least_squares
from tests.regularization.minimizing import F64, gaussians

seeds = st.integers(0, 2**31 - 1)


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), scale=st.sampled_from([1e-6, 1.0, 1e6]), seed=seeds)
def test_it_reaches_the_minimum_that_scipy_reaches(rows, columns, scale, seed):
    A, v = gaussians([(rows, columns), (rows, 1)], seed)
    A, v = scale * A, v.squeeze(1)
    alpha = nonnegative_least_squares(A.mT @ A, A.mT @ v)
    assert bool((alpha >= 0).all())
    # a residual of zero is reached to the root of a rounding: K holds its square
    assert float((A @ alpha - v).norm()) == pytest.approx(nnls(A.numpy(), v.numpy())[1], rel=1e-7, abs=1e-7)


@given(columns=st.integers(1, 15), seed=seeds)
def test_no_unknown_wants_to_move(columns, seed):
    """KKT: slopes are zero where α > 0 and do not point up where α = 0."""
    A, v = gaussians([(columns + 3, columns), (columns + 3, 1)], seed)
    K, b = A.mT @ A, (A.mT @ v).squeeze(1)
    alpha = nonnegative_least_squares(K, b)
    slope = b - K @ alpha
    assert float(slope.max()) <= 1e-11
    assert float((slope * alpha).abs().max()) <= 1e-11


@given(seed=seeds)
def test_repeated_columns_share_what_one_would_have(seed):
    """Duplicates make K singular; the fit is unique all the same."""
    A, v = gaussians([(8, 4), (8, 1)], seed)
    v = v.squeeze(1)
    once = nonnegative_least_squares(A.mT @ A, A.mT @ v)
    A3 = torch.cat([A, A, A], dim=1)
    thrice = nonnegative_least_squares(A3.mT @ A3, A3.mT @ v)
    assert torch.allclose(A3 @ thrice, A @ once, atol=1e-9)


def test_hundreds_of_unknowns_take_a_handful_of_solves():
    """Lawson and Hanson's method, one unknown at a time, took seconds here; scipy's agrees on the answer."""
    A, v = gaussians([(900, 600), (900, 1)], seed=0)
    v = v.squeeze(1)
    before = time.perf_counter()
    alpha = nonnegative_least_squares(A.mT @ A, A.mT @ v)
    assert time.perf_counter() - before < 1  # measured: 0.03 s
    assert int((alpha > 0).sum()) > 200
    assert float((A @ alpha - v).norm()) == pytest.approx(nnls(A.numpy(), v.numpy())[1], rel=1e-10)


def test_nothing_to_gain_and_nothing_at_all():
    assert torch.equal(nonnegative_least_squares(torch.eye(3), -torch.ones(3)), torch.zeros(3))
    assert nonnegative_least_squares(torch.zeros(0, 0), torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize(
    ("K", "b", "message"),
    [
        (torch.ones(2, 3), torch.ones(2), r"\(m, m\).*got \(2, 3\)"),
        (torch.eye(2), torch.ones(3), r"\(m,\), got .* \(3,\)"),
        (torch.full((2, 2), math.nan, dtype=F64), torch.ones(2, dtype=F64), "must be finite"),
    ],
)
def test_bad_input_is_refused(K, b, message, unchecked_shapes):
    with pytest.raises(ValueError, match=message):
        nonnegative_least_squares(K, b)
