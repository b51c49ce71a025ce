"""Both sets of kernels against dense float64 algebra, row by row."""

import numpy as np
import pytest

from rankwise.completion import kernels, kernels_without_numba
from rankwise.completion.observations import Observations

NAMES = (
    "ridge_rows",
    "project_out_rows",
    "gather_columns",
    "block_sums",
    "factor_blocks",
    "solve_blocks",
    "expected_moments",
    "posteriors",
    "entries_at",
)


@pytest.fixture(params=["as installed", "without numba"])
def implementation(request, monkeypatch):
    if request.param == "without numba":
        for name in NAMES:
            monkeypatch.setattr(kernels, f"_{name}", getattr(kernels_without_numba, name))
        monkeypatch.setattr(kernels_without_numba, "_BATCH_ENTRIES", 40)  # several batches even here
    return request.param


@pytest.fixture(params=[np.float64, np.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


def problem(dtype, k=3, rows=9, columns=7, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, columns)) < 0.6
    mask[4] = False  # a row without any entry
    mask[:, 2] = False  # and a column
    r, c = np.nonzero(mask)
    seen = Observations.from_coordinates(r, c, rng.standard_normal(len(r)), mask.shape, dtype)
    left, right = (rng.standard_normal((n, k)).astype(dtype) for n in mask.shape)
    return seen, left, right, rng


def symmetric(rng, k, dtype):
    root = rng.standard_normal((k, k))
    return (root @ root.T + np.eye(k)).astype(dtype)


def close(got, expected, dtype):
    np.testing.assert_allclose(
        got, expected, rtol=0, atol=(1e-10 if dtype == np.float64 else 2e-4) * max(1.0, np.abs(expected).max(initial=0))
    )


def test_ridge_rows_solves_every_row(implementation, dtype):
    seen, _, right, rng = problem(dtype)
    P, Q, h = symmetric(rng, 3, dtype), symmetric(rng, 3, dtype), rng.standard_normal(3).astype(dtype)
    solution, triangles, residual = kernels.ridge_rows(seen.row_starts, seen.columns, seen.values, right, P, Q, h)
    for i in range(seen.shape[0]):
        at = slice(seen.row_starts[i], seen.row_starts[i + 1])
        X, y = right[seen.columns[at]].astype(np.float64), seen.values[at].astype(np.float64)
        H = X.T @ X + P + len(y) * Q
        close(solution[i], np.linalg.solve(H, X.T @ y + len(y) * h), dtype)
        close(np.tril(triangles[i]) @ np.tril(triangles[i]).T, H, dtype)
        close(residual[at], y - X @ solution[i], dtype)


def test_project_out_rows_is_the_derivative_of_the_residual(implementation):
    seen, _, right, rng = problem(np.float64)
    zero = np.zeros((3, 3))
    penalty = 0.3 * np.eye(3)
    direction = rng.standard_normal(right.shape)

    def fit(at):
        return kernels.ridge_rows(seen.row_starts, seen.columns, seen.values, at, penalty, zero, zero[0])

    left, triangles, residual = fit(right)
    change = kernels.project_out_rows(seen.row_starts, seen.columns, left, right, triangles, direction)
    # Kaufman's form drops the term in the residual: exact where the residual is orthogonal to it, so compare gradients
    for i in range(seen.shape[0]):
        at = slice(seen.row_starts[i], seen.row_starts[i + 1])
        X, b = right[seen.columns[at]], direction[seen.columns[at]]
        z = b @ left[i]
        close(change[at], z - X @ np.linalg.solve(X.T @ X + penalty, X.T @ z), np.float64)
    step = 1e-6
    objective = [
        float(r @ r + 0.3 * np.sum(w**2)) for w, _, r in (fit(right + step * direction), fit(right - step * direction))
    ]
    slope = (objective[0] - objective[1]) / (2 * step)
    gradient = -2 * kernels.gather_columns(seen.column_starts, seen.rows, seen.order, left, residual)
    assert slope == pytest.approx(float(np.sum(gradient * direction)), rel=1e-6)


def test_gather_columns_is_the_transposed_product(implementation, dtype):
    seen, left, _, _ = problem(dtype)
    got = kernels.gather_columns(seen.column_starts, seen.rows, seen.order, left, seen.values)
    close(got, seen.matrix().toarray().T.astype(np.float64) @ left, dtype)


def test_blocks_factor_and_solve(implementation, dtype):
    seen, _, right, rng = problem(dtype)
    penalty = np.array([0.5, 1.0, 2.0], dtype)
    triangles = kernels.factor_blocks(kernels.block_sums(seen.row_starts, seen.columns, right), penalty)
    sides = rng.standard_normal((seen.shape[0], 3)).astype(dtype)
    solution = kernels.solve_blocks(triangles, sides)
    for i in range(seen.shape[0]):
        X = right[seen.columns[seen.row_starts[i] : seen.row_starts[i + 1]]].astype(np.float64)
        close((X.T @ X + np.diag(penalty)) @ solution[i], sides[i], dtype)


def test_posteriors_are_the_gaussian_posterior(implementation, dtype):
    """The expectations over uncertain columns, by the Gaussian's own moments, dense."""
    seen, _, _, rng = problem(dtype)
    k = 3
    means = rng.standard_normal((seen.shape[1], k)).astype(dtype)
    covariances = np.stack([0.1 * symmetric(rng, k, dtype) for _ in range(seen.shape[1])])
    prior, precision = np.array([0.5, 1.0, 2.0], dtype), 1.7
    moments = kernels.expected_moments(seen.row_starts, seen.columns, seen.values, means, covariances)
    mean, covariance, squares = kernels.posteriors(moments, prior, precision)
    for i in range(seen.shape[0]):
        at = slice(seen.row_starts[i], seen.row_starts[i + 1])
        S, h, power = np.zeros((k, k)), np.zeros(k), 0.0
        for j, y in zip(seen.columns[at], seen.values[at].astype(np.float64), strict=True):
            m, C = means[j].astype(np.float64), covariances[j].astype(np.float64)
            x, Cx = np.append(1.0, m[1:]), C.copy()
            Cx[0], Cx[:, 0] = 0, 0
            S += np.outer(x, x) + Cx
            h += (y - m[0]) * x - np.append(0.0, C[1:, 0])
            power += (y - m[0]) ** 2 + C[0, 0]
        V = np.linalg.inv(precision * S + np.diag(prior))
        w = precision * V @ h
        close(mean[i], w, dtype)
        close(covariance[i], V, dtype)
        close(squares[i], power - 2 * w @ h + np.trace(S @ (np.outer(w, w) + V)), dtype)


def test_entries_at_gathers_nothing_wrong(implementation, dtype):
    seen, left, right, _ = problem(dtype)
    got = kernels.entries_at(seen.row_of_each(), seen.columns, left, right)
    close(got, (left.astype(np.float64) @ right.T)[seen.row_of_each(), seen.columns], dtype)


@pytest.mark.skipif(kernels.numba is None, reason="numba is not installed")
def test_threads_do_not_change_a_bit(monkeypatch):
    monkeypatch.setattr(kernels, "_FEW_OPERATIONS", 0)
    seen, _, right, _ = problem(np.float64, rows=400, columns=300)
    zero = np.zeros((3, 3))

    def run():
        return kernels.ridge_rows(seen.row_starts, seen.columns, seen.values, right, np.eye(3), zero, zero[0])

    with kernels.threads(1):
        one = run()
    with kernels.threads(2):
        two = run()
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
