"""Angles between subspaces against SciPy and against angles that were planted."""

import math

import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.spectral import orthonormal_basis, principal_angles, smallest_angle_cosine, subspace_alignment
from tests.spectral.planted import F64_EPS, frame, planted, projector

seeds = st.integers(0, 2**31 - 1)
angle_lists = st.lists(st.floats(0.0, math.pi / 2), min_size=1, max_size=4).map(sorted)


def at_angles(angles: list[float], seed: int = 0, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Bases of two subspaces with the given principal angles; the second has ``extra`` orthogonal directions more.

    Both are mixed by an invertible triangle, so that neither basis is orthonormal or aligned with the other.
    """
    k = len(angles)
    axes = frame(2 * k + extra + 2, 2 * k + extra, seed)
    theta = torch.tensor(angles, dtype=torch.float64)
    A = axes[:, :k]
    B = torch.cat([A * theta.cos() + axes[:, k : 2 * k] * theta.sin(), axes[:, 2 * k :]], dim=1)
    mix = lambda size: torch.eye(size, dtype=torch.float64) + 0.3 * torch.ones(size, size, dtype=torch.float64).triu(1)  # noqa: E731
    return A @ mix(k), B @ mix(k + extra)


@given(angles=angle_lists, extra=st.integers(0, 3), seed=seeds)
def test_planted_angles_are_found_smallest_first(angles, extra, seed):
    A, B = at_angles(angles, seed, extra)
    for found in (principal_angles(A, B), principal_angles(B, A)):
        assert found.shape == (len(angles),)
        # bases that are conditioned below 10 carry a few eps of angle
        assert torch.allclose(found, torch.tensor(angles, dtype=torch.float64), rtol=0, atol=100 * F64_EPS)


@given(m=st.integers(2, 12), j=st.integers(1, 12), k=st.integers(1, 12), seed=seeds)
def test_agrees_with_scipy(m, j, k, seed):
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(m, min(c, m), dtype=torch.float64, generator=generator) for c in (j, k))
    expected = scipy.linalg.subspace_angles(A.numpy(), B.numpy())[::-1].copy()
    condition = max(float(torch.linalg.cond(X)) for X in (A, B))
    assert torch.allclose(
        principal_angles(A, B), torch.from_numpy(expected), rtol=0, atol=100 * m * F64_EPS * condition
    )


@pytest.mark.parametrize("tiny", [1e-4, 1e-7, 1e-10, 1e-12])
def test_tiny_angles_keep_their_digits(tiny):
    """arccos cannot tell an angle below 1.5e-8 from 0."""
    A, B = at_angles([tiny, 0.3])
    found = principal_angles(A, B)
    # an absolute error of a few eps, relative to the angle
    assert float(found[0]) == pytest.approx(tiny, rel=20 * F64_EPS / tiny)
    assert float(found[1]) == pytest.approx(0.3, rel=100 * F64_EPS)


@pytest.mark.parametrize("tiny", [1e-7, 1e-10])
def test_angles_near_a_right_angle_keep_their_distance_to_it(tiny):
    A, B = at_angles([math.pi / 2 - tiny])
    assert math.pi / 2 - float(principal_angles(A, B)[0]) == pytest.approx(tiny, rel=20 * F64_EPS / tiny)


@given(angles=angle_lists, seed=seeds)
def test_angles_depend_on_the_subspaces_alone(angles, seed):
    A, B = at_angles(angles, seed)
    rotation = frame(len(A), len(A), seed + 1)
    mixed = A @ frame(A.shape[1], A.shape[1], seed + 2) * 7.0
    original = principal_angles(A, B)
    assert torch.allclose(principal_angles(rotation @ A, rotation @ B), original, rtol=0, atol=200 * F64_EPS)
    assert torch.allclose(principal_angles(mixed, B), original, rtol=0, atol=200 * F64_EPS)
    assert torch.allclose(principal_angles(torch.cat([A, A[:, :1]], dim=1), B), original, rtol=0, atol=200 * F64_EPS)


@given(angles=angle_lists, extra=st.integers(0, 3), seed=seeds)
def test_alignment_is_the_mean_squared_cosine(angles, extra, seed):
    A, B = at_angles(angles, seed, extra)
    expected = math.fsum(math.cos(a) ** 2 for a in angles) / len(angles)
    assert subspace_alignment(A, B) == pytest.approx(expected, abs=200 * F64_EPS)
    overlap = torch.trace(projector(orthonormal_basis(A)) @ projector(orthonormal_basis(B)))
    assert subspace_alignment(A, B) == pytest.approx(float(overlap) / len(angles), abs=200 * F64_EPS)


@given(angles=angle_lists, seed=seeds)
def test_smallest_angle_cosine_is_that_of_the_first_angle(angles, seed):
    assert smallest_angle_cosine(*at_angles(angles, seed)) == pytest.approx(math.cos(angles[0]), abs=200 * F64_EPS)


def test_one_shared_direction_saturates_the_smallest_angle_but_not_the_alignment():
    eye = torch.eye(5, dtype=torch.float64)
    assert smallest_angle_cosine(eye[:, :3], eye[:, 2:]) == 1.0
    assert subspace_alignment(eye[:, :3], eye[:, 2:]) == pytest.approx(1 / 3)


def test_narrow_dtypes_are_measured_in_float32():
    A, B = at_angles([0.2, 0.9])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        low, low_b = A.to(dtype), B.to(dtype)
        found = principal_angles(low, low_b)
        assert found.dtype == torch.float32
        exact = principal_angles(low.double(), low_b.double())
        assert torch.allclose(found.double(), exact, rtol=0, atol=100 * torch.finfo(torch.float32).eps)
    assert principal_angles(A.float(), B).dtype == torch.float64


@given(m=st.integers(3, 10), rank=st.integers(1, 3), columns=st.integers(3, 6), seed=seeds)
def test_basis_spans_the_column_space_and_drops_dependent_columns(m, rank, columns, seed):
    A, U, _, _ = planted(m, columns, [3.0, 2.0, 1.0][:rank], seed)
    basis = orthonormal_basis(A)
    assert basis.shape == (m, rank)
    assert torch.allclose(projector(basis), projector(U), rtol=0, atol=100 * F64_EPS)


@pytest.mark.parametrize("measure", [principal_angles, subspace_alignment, smallest_angle_cosine])
def test_what_spans_no_subspace_is_refused(measure):
    good = torch.eye(3)[:, :2]
    with pytest.raises(ValueError, match="spans no subspace"):
        measure(good, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="NaN or infinite"):
        measure(torch.full((3, 1), math.nan), good)
    with pytest.raises(ValueError, match="non-empty"):
        measure(good, torch.zeros(3, 0))


def test_different_numbers_of_rows_are_refused(unchecked_shapes):
    with pytest.raises(ValueError, match="3 and 4 rows"):
        principal_angles(torch.eye(3), torch.eye(4))
