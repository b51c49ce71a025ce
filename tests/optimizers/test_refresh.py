"""Subspaces of gradients: as good as the SVD's where there is something to find, from products alone, whatever the scale."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rankwise.optimizers.refresh import (
    Subspace,
    rayleigh_ritz,
    sketch,
    subspace_by_energy,
    subspace_by_iteration,
    subspace_by_svd,
)
from rankwise.optimizers.sharding import Whole
from rankwise.spectral import subspace_alignment
from tests.spectral.planted import frame, planted, projector, spectral_norm

F64 = torch.float64


def iterated(A: Tensor, rank: int, previous: Tensor | None = None, **changes: Any) -> Subspace:
    settings = {"oversample": 8, "iterations": 2, "seed": 0, "number": 0}
    shape = (A.shape[0], A.shape[1])
    found = subspace_by_iteration(A, rank, previous, **{**settings, **changes}, pieces=Whole(), whole_shape=shape)
    assert found is not None
    return found


def captured(found: Subspace, A: Tensor) -> float:
    return float(found.projected.square().sum() / A.square().sum())


@pytest.mark.parametrize("shape", [(200, 300), (300, 200)])
def test_a_gap_is_found_by_a_cold_start(shape: tuple[int, int]) -> None:
    made = planted(*shape, [2.0, 1.9, 1.8, 1.7, 1.6] + [0.1] * 150)
    found = iterated(made.matrix, 5)
    assert found.basis.shape == (shape[0], 5)
    assert spectral_norm(projector(found.basis) - projector(made.U[:, :5])) < 1e-6
    assert torch.allclose(found.basis.mT @ found.basis, torch.eye(5, dtype=F64), atol=1e-14)
    assert torch.allclose(found.projected, found.basis.mT @ made.matrix, atol=1e-13)
    assert torch.allclose(found.energies, made.S[:5].square(), rtol=1e-6)


def test_directions_come_in_the_order_of_what_they_hold() -> None:
    A = torch.randn(60, 80, dtype=F64)
    found = rayleigh_ritz(A, frame(60, 10, 4), Whole())
    assert torch.allclose(found.energies, found.projected.square().sum(1))
    assert (found.energies.diff() <= 0).all()
    gram = found.projected @ found.projected.mT
    assert torch.allclose(gram, torch.diag(torch.diagonal(gram)), atol=1e-11), (
        "uncorrelated, as singular directions are"
    )


def test_a_warm_start_follows_a_subspace_that_turns() -> None:
    """An average of a hundred small turns, one iteration each, ends where the SVD does; without the old basis it does not."""
    left, right = frame(150, 6, 1), frame(200, 6, 2)
    # a spectrum without a gap: what a cold iteration cannot tell apart, a hundred warm ones can
    tail = planted(150, 200, [0.5 * 0.97**k for k in range(150)], seed=3).matrix
    generator = torch.Generator().manual_seed(0)
    basis = None
    for number in range(100):
        left = torch.linalg.qr(left + 0.01 * torch.randn(150, 6, dtype=F64, generator=generator)).Q
        A = left @ torch.diag(torch.tensor([1.0, 0.95, 0.9, 0.85, 0.8, 0.75], dtype=F64)) @ right.mT + tail
        basis = iterated(A, 6, basis, iterations=1, oversample=2, number=number).basis
    exact = subspace_by_svd(A, 6)
    assert exact is not None
    assert subspace_alignment(basis, exact.basis) > 0.999
    assert subspace_alignment(iterated(A, 6, frame(150, 6, 9), iterations=1, oversample=2).basis, exact.basis) < 0.9


def test_a_new_direction_is_found_though_the_old_basis_does_not_see_it() -> None:
    """Orthogonal to all that was: only the random columns can find it. An iteration of the old basis alone is blind."""
    old, new = planted(100, 120, [1.0, 0.9], seed=1), planted(100, 120, [5.0], seed=2)
    u = new.U - old.U @ (old.U.mT @ new.U)
    v = new.V - old.V @ (old.V.mT @ new.V)
    A = old.matrix + 5 * (u / u.norm()) @ (v / v.norm()).mT
    assert captured(iterated(A, 2, old.U, iterations=1), A) > 0.95
    assert captured(iterated(A, 2, old.U, iterations=1, oversample=0), A) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("warm", [False, True])
def test_the_scale_of_a_gradient_does_not_matter(scale: float, dtype: torch.dtype, warm: bool) -> None:
    """Squares of 1e-30 are zero in float32, and those of 1e30 infinite."""
    made = planted(40, 50, [1.0, 0.5, 0.25, 0.01])
    A = made.matrix.to(dtype) * scale
    found = iterated(A, 3, frame(40, 3, 8).to(dtype) if warm else None)
    assert spectral_norm(projector(found.basis) - projector(made.U[:, :3])) < 1e-3
    share = float((found.projected.double() / scale).square().sum() / (1.0 + 0.25 + 0.0625))
    assert share == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_of_nothing_and_of_no_number_there_is_no_subspace(value: float) -> None:
    A = torch.zeros(40, 50) if value == 0 else torch.randn(40, 50)
    A[17, 3] = value
    settings: dict[str, Any] = {"seed": 0, "number": 0, "pieces": Whole(), "whole_shape": (40, 50)}
    for previous in (None, frame(40, 4, 0).float()):
        assert subspace_by_iteration(A, 4, previous, oversample=4, iterations=1, **settings) is None
        assert subspace_by_energy(A, 0.9, 4, previous, oversample=4, iterations=1, **settings) is None
    assert subspace_by_svd(A, 4) is None


def test_fewer_directions_than_asked_for_are_filled_up_orthonormally() -> None:
    """A gradient of one sample has rank 1; the basis must still be one."""
    A = torch.outer(torch.arange(1.0, 31), torch.ones(50))
    found = iterated(A, 8)
    assert torch.allclose(found.basis.mT @ found.basis, torch.eye(8), atol=1e-5)
    assert captured(found, A) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("columns", [3, 10, 64])
def test_a_side_shorter_than_the_sketch_is_no_trouble(columns: int) -> None:
    A = torch.randn(64, columns, dtype=F64)
    found = iterated(A, 3, oversample=100)
    exact = subspace_by_svd(A, 3)
    assert exact is not None
    assert captured(found, A) == pytest.approx(captured(exact, A), rel=1e-6)


def test_the_sketch_follows_from_seed_and_number_alone() -> None:
    like = torch.zeros(1)
    state = torch.get_rng_state()
    first = sketch(5, 3, like, seed=1, number=2)
    assert torch.equal(first, sketch(5, 3, like, seed=1, number=2))
    assert torch.equal(torch.get_rng_state(), state), "the user's random numbers are the user's"
    drawn = [sketch(5, 3, like, *key) for key in [(1, 2, 0), (1, 3, 0), (2, 2, 0), (1, 2, 1), (0, 0, 0)]]
    assert all(not torch.equal(a, b) for k, a in enumerate(drawn) for b in drawn[:k])


def test_on_noise_it_holds_nearly_what_the_svd_holds() -> None:
    """The hardest spectrum, without any gap: the share of the SVD's energy that the docs give."""
    A = torch.randn(256, 512, dtype=F64, generator=torch.Generator().manual_seed(0))
    exact = subspace_by_svd(A, 32)
    assert exact is not None
    share = captured(iterated(A, 32, frame(256, 32, 0)), A) / captured(exact, A)
    assert share > 0.75
    assert captured(iterated(A, 32, frame(256, 32, 0), iterations=8), A) / captured(exact, A) > 0.95
