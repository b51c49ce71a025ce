"""How closely one descent follows another: measures where they are known, and problems of the size that they claim."""

from typing import Any

import pytest
import torch

from rankwise.factorizations import DeepLinear, DeepNetwork, trajectory_gap
from rankwise.factorizations.compressed_network import descent_outputs
from reproduction.beyond.nonlinear_compression.following import (
    FullDescent,
    compressed,
    first_frames,
    late_start,
    movement_frames,
    renewed,
)
from reproduction.beyond.nonlinear_compression.problems import Problem

SETTINGS: dict[str, Any] = {
    "width": 16,
    "rank": 2,
    "depth": 3,
    "relative_init_scale": 0.15,
    "relative_lr": 0.5,
    "target_scale": 1.0,
}
PATIENCE = 3
DIGITS = {"samples": 60, "components": 20, "ridge": 1e-3}


def descent(activation: str, seed: int = 0, **changed: Any) -> FullDescent:
    return FullDescent.run(
        Problem.planted(SETTINGS | changed, activation, seed), stop_at_loss=0.02, patience=PATIENCE, max_iter=5000
    )


@pytest.mark.parametrize("subspaces", ["gradient", "lookahead"])
def test_gap_slowdown_and_share_are_the_library_s(subspaces: Any) -> None:
    full = descent("gelu")
    problem, rank = full.problem, SETTINGS["rank"]
    outputs, captured = compressed(full, first_frames(problem, subspaces, rank, seed=0))
    measured = full.followed_by(outputs, slowdown_at=0.1)
    kind: dict[str, Any] = {"lr": problem.lr, "subspaces": subspaces}
    on_the_way = trajectory_gap(problem.start, problem.target, rank, steps=full.steps, **kind)
    longer = trajectory_gap(problem.start, problem.target, rank, steps=full.limit, **kind)
    assert measured["gap"] == pytest.approx(on_the_way.largest, rel=1e-9)
    assert measured["loss_at_T"] == pytest.approx(float(on_the_way.compressed_loss[-1]), rel=1e-9)
    assert measured["slowdown"] == pytest.approx(longer.slowdown(0.1))
    assert list(captured.values()) == pytest.approx(on_the_way.captured, rel=1e-9)


def test_the_same_path_at_half_the_pace_has_a_gap_but_no_path_gap() -> None:
    full = descent("relu", relative_lr=0.1)
    problem = full.problem
    slow = descent_outputs(
        DeepNetwork(problem.start.weights, "relu"), problem.target, lr=problem.lr / 2, steps=full.limit
    )
    measured = full.followed_by(slow, slowdown_at=0.1)
    assert measured["gap"] > 0.4
    assert measured["path_gap"] < 0.03
    assert measured["slowdown"] == pytest.approx(2, rel=0.03)
    assert measured["arrived"] == 1


def test_who_does_not_arrive_is_counted_until_given_up() -> None:
    full = descent("identity")
    measured = full.followed_by([torch.zeros_like(full.problem.target)] * (full.limit + 1), slowdown_at=0.1)
    assert measured["arrived"] == 0
    assert 3 <= measured["slowdown"] < 3.5
    assert measured["gap"] == pytest.approx(measured["path_gap"], rel=0.03)
    assert measured["loss_at_end"] == 1


def test_who_diverges_is_given_up_there() -> None:
    full = descent("identity")
    problem = full.problem
    wild = descent_outputs(
        DeepNetwork(problem.start.weights, "identity"), problem.target, lr=20 * problem.lr, steps=full.limit
    )
    measured = full.followed_by(wild, slowdown_at=0.1)
    assert measured["loss_at_end"] == 10
    assert measured["gap"] < 5


def test_renewed_and_late_frames_change_nothing_in_the_linear_case() -> None:
    """Theorem 2.1's block is found at any time; only what ρ moves, (d − 2r)(∏ρ − ∏ε)², is lost."""
    full = descent("identity", relative_init_scale=0.03)
    for outputs in (renewed(full, 7, 2), late_start(full, 0.4, 2)):
        taken = list(outputs)
        assert len(taken) == full.limit + 1
        assert full.followed_by(taken, slowdown_at=0.1)["gap"] < 1e-3


def test_no_frames_of_their_width_hold_more_of_a_layer_than_the_movement_s_own() -> None:
    full = descent("relu")
    held = {}
    for name, frames in (
        ("first", first_frames(full.problem, "lookahead", 2, seed=0)),
        ("half", movement_frames(full, 0.5, 2)),
        ("best", movement_frames(full, 1.0, 2)),
    ):
        held[name] = compressed(full, frames)[1]
    for layer, moved in enumerate(full.movement, start=1):
        S = torch.linalg.svdvals(moved).square()
        assert held["best"][str(layer)] == pytest.approx(float(S[:4].sum() / S.sum()), rel=1e-9)
        assert max(held["first"][str(layer)], held["half"][str(layer)]) < held["best"][str(layer)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_rate_is_in_units_of_the_curvature_at_the_solution(depth: int) -> None:
    """The largest eigenvalue of the Hessian at balanced factors, by autograd."""
    problem = Problem.planted(SETTINGS | {"width": 5, "depth": depth}, "identity", seed=0)
    U, S, Vh = torch.linalg.svd(problem.target)
    root = torch.diag(S ** (1 / depth))
    factors = [root @ Vh, *[root] * (depth - 2), U @ root] if depth > 1 else [problem.target]

    def loss(*weights: torch.Tensor) -> torch.Tensor:
        f = weights[0]
        for weight in weights[1:]:
            f = weight @ f
        return 0.5 * (f - problem.target).square().sum()

    blocks = torch.autograd.functional.hessian(loss, tuple(factors))
    hessian = torch.cat([torch.cat([block.reshape(25, 25) for block in row], dim=1) for row in blocks])
    assert problem.lr * float(torch.linalg.eigvalsh(hessian)[-1]) == pytest.approx(SETTINGS["relative_lr"], rel=1e-9)
    for weight in problem.start.weights:
        scales = torch.linalg.svdvals(weight.detach())
        assert torch.allclose(scales, 0.15 * S[0] ** (1 / depth) * torch.ones_like(scales))


@pytest.mark.parametrize("whitened", [True, False])
def test_digits_are_components_and_nine_outputs_in_all(whitened: bool) -> None:
    problem = Problem.digits(SETTINGS | DIGITS | {"whitened": whitened, "width": 24}, "relu", seed=0)
    assert problem.target.shape == (24, 60)
    S = torch.linalg.svdvals(problem.target)
    assert float(S[8]) > 1e-3 * float(S[0])
    assert float(S[9]) < 1e-12 * float(S[0])
    spectrum = torch.linalg.svdvals(problem.inputs) / 60**0.5
    assert float(spectrum[0]) == pytest.approx(1)
    assert (float(spectrum[-1]) == pytest.approx(1)) == whitened


def test_another_start_is_as_large_and_elsewhere() -> None:
    problem = Problem.planted(SETTINGS, "tanh", seed=0)
    other = problem.started_elsewhere(5)
    for mine, theirs in zip(problem.start.weights, other.start.weights, strict=True):
        assert torch.allclose(torch.linalg.svdvals(mine.detach()), torch.linalg.svdvals(theirs.detach()))
        assert float((mine - theirs).detach().norm()) > float(mine.detach().norm())
    assert torch.equal(problem.target, other.target)


@pytest.mark.parametrize(("activation", "expected"), [("identity", 0.0), ("relu", 0.5**0.5)])
def test_nonlinearity_of_known_activations_on_symmetric_inputs(activation: str, expected: float) -> None:
    """σ(h) = h/2 + |h|/2 for ReLU, halves that are orthogonal on inputs that come with both signs."""
    Z = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    X = torch.cat([Z, -Z], dim=1)
    start = DeepNetwork(
        DeepLinear.orthogonal(4, 2, 1.0, generator=torch.Generator().manual_seed(1), dtype=torch.float64).weights,
        activation,
    )
    problem = Problem(start, torch.ones(4, 18, dtype=torch.float64), X, rank=1, lr=1e-9)
    still = FullDescent(problem, 1.0, PATIENCE, [start(X).detach()], [torch.zeros(4, 4)] * 2, start)
    assert still.nonlinearity() == pytest.approx(expected, abs=1e-12)


def test_a_descent_that_does_not_arrive_is_told() -> None:
    with pytest.raises(ValueError, match=r"a loss of 0.02 is not reached in 3 steps"):
        FullDescent.run(Problem.planted(SETTINGS, "identity", 0), stop_at_loss=0.02, patience=PATIENCE, max_iter=3)
