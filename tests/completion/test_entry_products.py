"""Every kernel against dense float64 algebra."""

from types import SimpleNamespace

import numpy as np
import pytest

from rankwise.completion import entry_products as module
from rankwise.completion.entry_products import EntryProducts, entry_products
from rankwise.completion.observations import Observations

KERNELS = [module.numpy_chunks, module.numba_serial, module.numba_threads]


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.__name__)
def kernel(request):
    if request.param is not module.numpy_chunks:
        pytest.importorskip("numba")
    return request.param


def problem(dtype, width=5, shape=(23, 17), seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.4
    mask[3] = False
    mask[:, 6] = False
    full = rng.standard_normal(shape)
    rows, columns = np.nonzero(mask)
    seen = Observations.from_coordinates(rows, columns, full[mask], shape, dtype)
    left, right = (rng.standard_normal((size, width)).astype(dtype) for size in shape)
    return seen, mask, full, left, right


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("width", [1, 5, 16])
@pytest.mark.parametrize("shape", [(23, 17), (9, 40)])
def test_residual_and_both_products(kernel, dtype, width, shape, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 7)
    seen, mask, full, left, right = problem(dtype, width, shape)
    got = entry_products(seen, left, right, kernel=kernel)
    A, B = left.astype(np.float64), right.astype(np.float64)
    E = np.where(mask, A @ B.T - full, 0)
    tolerance = {"rtol": 0, "atol": (1e-12 if dtype == np.float64 else 2e-5) * max(1, np.abs(E).max()) * 30}
    np.testing.assert_allclose(got.residual, E[mask], **tolerance)
    np.testing.assert_allclose(got.left, E @ B, **tolerance)
    np.testing.assert_allclose(got.right, E.T @ A, **tolerance)
    assert got.squared_norm == pytest.approx(float(np.sum(E**2)), rel=1e-4 if dtype == np.float32 else 1e-12)


def test_given_arrays_are_filled_whatever_they_held(kernel):
    seen, _, _, left, right = problem(np.float64)
    fresh = entry_products(seen, left, right, kernel=kernel)
    out = EntryProducts.empty(seen, left.shape[1])
    for array in (out.residual, out.left, out.right, out.row_squares):
        array[:] = np.nan
    again = entry_products(seen, left, right, out=out, kernel=kernel)
    assert again is out
    for name in ("residual", "left", "right", "row_squares"):
        np.testing.assert_array_equal(getattr(again, name), getattr(fresh, name))


def test_a_factor_that_is_not_finite_shows(kernel):
    seen, _, _, left, right = problem(np.float64)
    left[5, 2] = np.inf
    assert not np.isfinite(entry_products(seen, left, right, kernel=kernel).squared_norm)


def test_threads_agree_with_one_to_rounding():
    pytest.importorskip("numba")
    seen, _, _, left, right = problem(np.float64, 8, (300, 200))
    one, several = (entry_products(seen, left, right, kernel=k) for k in (module.numba_serial, module.numba_threads))
    np.testing.assert_allclose(one.right, several.right, atol=1e-11)


def test_what_does_not_fit_is_refused():
    seen, _, _, left, right = problem(np.float64)
    with pytest.raises(ValueError, match="shapes"):
        entry_products(seen, left[:-1], right)
    with pytest.raises(ValueError, match="float64"):
        entry_products(seen, left.astype(np.float32), right.astype(np.float32))
    with pytest.raises(ValueError, match="out was made"):
        entry_products(seen, left, right, out=EntryProducts.empty(seen, 2))


def test_the_fastest_kernel_is_chosen_by_what_is_installed_and_how_much_there_is(monkeypatch):
    seen, *_ = problem(np.float64)

    def with_threads(threads):
        return SimpleNamespace(get_num_threads=lambda: threads)

    monkeypatch.setattr(module, "_ONE_THREAD_BELOW", seen.count)
    for numba, expected in (
        (None, module.numpy_chunks),
        (with_threads(1), module.numba_serial),
        (with_threads(4), module.numba_threads),
    ):
        monkeypatch.setattr(module, "numba", numba)
        assert module.fastest_kernel(seen) is expected
    monkeypatch.setattr(module, "_ONE_THREAD_BELOW", seen.count + 1)
    assert module.fastest_kernel(seen) is module.numba_serial
