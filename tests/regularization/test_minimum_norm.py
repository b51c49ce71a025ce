"""The minimum-norm solution against pseudo-inverses, and the subspace that descent stays in."""

import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.regularization import minimum_norm_solution
from tests.regularization.minimizing import F64, gaussians
from tests.spectral.planted import frame, planted

seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(1, 8)


def row_space_projector(X: torch.Tensor) -> torch.Tensor:
    return torch.linalg.pinv(X) @ X


def descent(X: torch.Tensor, y: torch.Tensor, start: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Every iterate of gradient descent on ½‖y − Xw‖² (eq. 8)."""
    lr = 1 / float(torch.linalg.matrix_norm(X, 2)) ** 2
    iterates = [start]
    for _ in range(steps):
        iterates.append(iterates[-1] - lr * X.mT @ (X @ iterates[-1] - y))
    return iterates


@given(n=sizes, d=sizes, rank=sizes, k=st.sampled_from([None, 1, 3]), reachable=st.booleans(), seed=seeds)
def test_it_is_the_pseudo_inverse_solution(n, d, rank, k, reachable, seed):
    """Wide, tall, deficient; one right-hand side or several; within reach of X or not."""
    X = planted(n, d, [2.0 / (i + 1) for i in range(min(n, d, rank))], seed).matrix
    columns = () if k is None else (k,)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(n, *columns, dtype=F64, generator=generator)
    if reachable:
        y = X @ torch.randn(d, *columns, dtype=F64, generator=generator)
    w = minimum_norm_solution(X, y)
    assert w.shape == (d, *columns)
    assert torch.allclose(w, torch.linalg.pinv(X) @ y, rtol=0, atol=1e-12)


@given(n=st.integers(1, 5), seed=seeds)
def test_no_solution_is_shorter_and_none_is_nearer_to_the_start(n, seed):
    d = n + 3
    X, y, start = gaussians([(n, d), (n, 2), (d, 2)], seed)
    w, nearest = minimum_norm_solution(X, y), minimum_norm_solution(X, y, start=start)
    unseen = gaussians([(d, 2)], seed + 1)[0]
    unseen -= row_space_projector(X) @ unseen
    for solution, centre in ((w, torch.zeros_like(w)), (nearest, start)):
        assert torch.allclose(X @ solution, y, atol=1e-9)
        assert float((solution - centre).norm()) <= float((solution + unseen - centre).norm())
        assert abs(float(((solution - centre) * unseen).sum())) < 1e-9


def test_the_transpose_that_the_overview_leaves_out():
    """w* = X(XXᵀ)⁻¹y, as printed, does not even have the shape; on a square X it is not a solution."""
    X, y = gaussians([(4, 4), (4, 1)], seed=3)
    printed = X @ torch.linalg.solve(X @ X.mT, y)
    assert float((X @ minimum_norm_solution(X, y) - y).norm()) < 1e-12
    assert float((X @ printed - y).norm()) > 0.1


def test_ill_conditioned_rows_keep_the_digits_that_forming_XXt_loses():
    # κ = 1e10, so XXᵀ has 1e20, beyond float64
    X, _, _, V = planted(4, 30, [1.0, 1e-3, 1e-7, 1e-10])
    truth = V @ torch.ones(4, 1, dtype=F64)
    y = X @ truth
    error = float((minimum_norm_solution(X, y) - truth).norm() / truth.norm())
    squared = X.mT @ (torch.linalg.pinv(X @ X.mT, hermitian=True) @ y)
    assert error < 1e-4  # κ roundings
    assert float((squared - truth).norm() / truth.norm()) > 0.1


def test_every_iterate_of_descent_from_zero_is_in_the_row_space_and_the_last_is_the_solution():
    X, y = planted(5, 40, [2.0, 1.5, 1.2, 1.0, 0.8]).matrix, gaussians([(5, 1)], seed=1)[0]
    P = row_space_projector(X)
    iterates = descent(X, y, torch.zeros(40, 1, dtype=F64), steps=300)
    assert max(float((w - P @ w).norm()) for w in iterates) < 1e-14
    assert torch.allclose(iterates[-1], minimum_norm_solution(X, y), rtol=0, atol=1e-12)


def test_a_start_off_the_row_space_keeps_that_part_at_every_iterate():
    X = planted(5, 40, [2.0, 1.5, 1.2, 1.0, 0.8]).matrix
    y, start = gaussians([(5, 1), (40, 1)], seed=1)
    outside = torch.eye(40, dtype=F64) - row_space_projector(X)
    iterates = descent(X, y, start, steps=300)
    assert max(float((outside @ (w - start)).norm()) for w in iterates) < 1e-13
    assert torch.allclose(iterates[-1], minimum_norm_solution(X, y, start=start), rtol=0, atol=1e-12)
    assert float((iterates[-1] - minimum_norm_solution(X, y)).norm()) > 1


def test_descent_on_n_numbers_is_descent_on_d():
    """Eq. 10: z ← z − η(Xw(0) + XXᵀz − y) with w = w(0) + Xᵀz gives the iterates of eq. 8."""
    X = planted(5, 40, [2.0, 1.5, 1.2, 1.0, 0.8]).matrix
    y, start = gaussians([(5, 1), (40, 1)], seed=2)
    lr, z, gram, offset = 0.25, torch.zeros(5, 1, dtype=F64), X @ X.mT, X @ start - y
    for w in descent(X, y, start, steps=50):
        assert torch.allclose(start + X.mT @ z, w, rtol=0, atol=1e-13)
        z = z - lr * (offset + gram @ z)


def test_n_numbers_are_solved_for_much_faster_than_d():
    X, y = gaussians([(20, 600), (20, 1)], seed=0)

    def seconds(solve, times):
        best = math.inf
        for _ in range(times):
            before = time.perf_counter()
            solve()
            best = min(best, time.perf_counter() - before)
        return best

    narrow = seconds(lambda: minimum_norm_solution(X, y), 5)
    wide = seconds(lambda: torch.linalg.pinv(X.mT @ X, hermitian=True) @ (X.mT @ y), 2)
    assert wide > 20 * narrow  # measured: 220 times here, 900 at d = 1000, 1,200 at n = 50, d = 2000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_input_is_solved_in_float32(dtype):
    X = torch.eye(3, 5, dtype=dtype)
    w = minimum_norm_solution(X, torch.tensor([1.0, 2.0, 3.0], dtype=dtype))
    assert w.dtype == torch.float32
    assert w.tolist() == [1.0, 2.0, 3.0, 0.0, 0.0]
    assert minimum_norm_solution(X, torch.ones(3, dtype=F64)).dtype == F64


def test_a_zero_matrix_has_the_zero_solution():
    assert torch.equal(minimum_norm_solution(torch.zeros(3, 4), torch.ones(3)), torch.zeros(4))


def test_the_solution_turns_with_the_features():
    X, y = gaussians([(3, 7), (3, 1)], seed=5)
    Q = frame(7, 7, 30)
    assert torch.allclose(minimum_norm_solution(X @ Q, y), Q.mT @ minimum_norm_solution(X, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("X", "y", "start", "message"),
    [
        (torch.ones(3, 5), torch.ones(2), None, r"\(3,\) or \(3, k\).*got shape \(2,\)"),
        (torch.ones(3, 5), torch.ones(3, 1, 1), None, "a row for every row of X"),
        (torch.ones(3, 5), torch.ones(3, 0), None, "a row for every row of X"),
        (torch.ones(3, 5), torch.ones(3, 2), torch.ones(5), r"start must have the solution's shape \(5, 2\)"),
        (torch.ones(0, 5), torch.ones(0), None, "non-empty X"),
        (torch.ones(5), torch.ones(5), None, "X to be 2-D"),
        (torch.full((3, 5), math.nan), torch.ones(3), None, "X of shape .* NaN"),
        (torch.ones(3, 5), torch.full((3,), math.inf), None, "y of shape .* infinite"),
        (torch.ones(3, 5), torch.ones(3), torch.full((5,), math.nan), "start of shape .* NaN"),
    ],
)
def test_what_does_not_go_together_is_refused(X, y, start, message, unchecked_shapes):
    with pytest.raises(ValueError, match=message):
        minimum_norm_solution(X, y, start=start)
