"""Haar frames: orthonormal, reproducible, and uniformly distributed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.spectral import haar_frame
from tests.spectral.planted import frame, projector

seeds = st.integers(0, 2**31 - 1)
DRAWS = 250


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(rows: int, columns: int, **options) -> torch.Tensor:
    generator = seeded(0)
    return torch.stack(
        [haar_frame(rows, columns, generator=generator, dtype=torch.float64, **options) for _ in range(DRAWS)]
    )


@given(rows=st.integers(1, 20), columns=st.integers(0, 20), scale=st.sampled_from([1e-3, 1.0, 7.5]), seed=seeds)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_are_orthogonal_and_have_the_asked_length(dtype, rows, columns, scale, seed):
    columns = min(columns, rows)
    Q = haar_frame(rows, columns, scale=scale, generator=seeded(seed), dtype=dtype)
    assert Q.shape == (rows, columns)
    assert Q.dtype == dtype
    eye = torch.eye(columns, dtype=dtype)
    assert torch.allclose(Q.mT @ Q / scale**2, eye, rtol=0, atol=50 * torch.finfo(dtype).eps)


@given(rows=st.integers(2, 16), taken=st.integers(1, 8), columns=st.integers(1, 8), seed=seeds)
def test_a_complement_frame_avoids_what_is_taken(rows, taken, columns, seed):
    taken = min(taken, rows - 1)
    columns = min(columns, rows - taken)
    F = frame(rows, taken, seed)
    Q = haar_frame(rows, columns, complement_of=F, generator=seeded(seed + 1), dtype=torch.float64)
    # leakage is eps times the condition of a Gaussian matrix, which a square one can push to a few thousand
    assert float((F.mT @ Q).abs().max()) < 1e-11
    assert torch.allclose(Q.mT @ Q, torch.eye(columns, dtype=torch.float64), atol=1e-14)


def test_a_full_complement_is_the_orthogonal_complement(generator):
    F = frame(9, 4, 3)
    Q = haar_frame(9, 5, complement_of=F, generator=generator, dtype=torch.float64)
    assert torch.allclose(projector(F) + projector(Q), torch.eye(9, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_frames_are_rounded_float32_frames(dtype):
    narrow = haar_frame(10, 4, generator=seeded(1), dtype=dtype)
    assert torch.equal(narrow, haar_frame(10, 4, generator=seeded(1)).to(dtype))


def test_the_generator_decides_the_frame():
    assert torch.equal(haar_frame(6, 3, generator=seeded(1)), haar_frame(6, 3, generator=seeded(1)))
    assert not torch.equal(haar_frame(6, 3, generator=seeded(1)), haar_frame(6, 3, generator=seeded(2)))
    torch.manual_seed(4)
    first = haar_frame(6, 3)
    torch.manual_seed(4)
    assert torch.equal(haar_frame(6, 3), first)


@pytest.mark.parametrize(("rows", "columns"), [(3, 2), (3, 3), (1, 1)])
def test_the_signs_are_fair(rows, columns):
    """LAPACK's Q alone has diagonal entries of one sign, with mean −1/2 for the first one in R³."""
    mean = draws(rows, columns).mean(0)
    # entries have variance 1/rows; five standard errors
    assert float(mean.abs().max()) < 5 / math.sqrt(rows * DRAWS)


def test_second_and_fourth_moments_are_those_of_the_uniform_distribution():
    """E q² = 1/m and E q⁴ = 3/(m(m+2)) for every entry of a Haar frame in R^m."""
    m = 4
    entries = draws(m, 3)
    # var q² = 2(m−1)/(m²(m+2)) = 1/16, var q⁴ < 0.05 at m = 4
    assert float((entries.square().mean(0) - 1 / m).abs().max()) < 5 * math.sqrt(1 / 16 / DRAWS)
    assert float((entries.pow(4).mean(0) - 3 / (m * (m + 2))).abs().max()) < 5 * math.sqrt(0.05 / DRAWS)


def test_both_orientations_of_a_full_frame_are_equally_likely():
    determinants = torch.linalg.det(draws(3, 3))
    assert torch.allclose(determinants.abs(), torch.ones(DRAWS, dtype=torch.float64))
    assert abs(float(determinants.mean())) < 5 / math.sqrt(DRAWS)


def test_a_complement_frame_is_uniform_in_the_complement():
    F = frame(4, 2, 0)
    frames = draws(4, 1, complement_of=F)
    second_moment = (frames @ frames.mT).mean(0)
    expected = (torch.eye(4, dtype=torch.float64) - projector(F)) / 2
    assert float((second_moment - expected).abs().max()) < 5 * math.sqrt(0.125 / DRAWS)
    assert float(frames.mean(0).abs().max()) < 5 * math.sqrt(0.5 / DRAWS)


@pytest.mark.parametrize(("rows", "columns"), [(3, 4), (0, 0), (-1, 0), (3, -1)])
def test_impossible_sizes_are_refused(rows, columns):
    with pytest.raises(ValueError, match="ask for at most"):
        haar_frame(rows, columns)


def test_a_frame_too_wide_for_the_complement_is_refused_with_the_room_left():
    with pytest.raises(ValueError, match="less the 2 taken; ask for at most 3"):
        haar_frame(5, 4, complement_of=torch.eye(5)[:, :2])
