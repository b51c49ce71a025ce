"""The base rules at full size against torch's own optimizers and the formulas; their moments carried between subspaces."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rankwise.optimizers import GaLoreAdafactor, GaLoreAdamW, GaLoreSGD
from rankwise.optimizers.base_rules import SGD, Adafactor, AdamW, carried_second_moment
from tests.spectral.planted import frame

F64 = torch.float64
SHAPES = [(5, 3), (4,), (2, 3, 4)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def beside_a_projected_one(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Groups of which the first is stepped at full size; the second is there since something has to be projected."""
    return [{"params": parameters}, {"params": [nn.Parameter(torch.zeros(3, 3, dtype=F64))], "rank": 1}]


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (GaLoreAdamW, torch.optim.AdamW, {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}),
        (GaLoreAdamW, torch.optim.AdamW, {"lr": 0.1, "betas": (0.0, 0.5), "weight_decay": 0.0}),
        (GaLoreSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (GaLoreSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        # without momentum torch's coupled decay is decoupled decay
        (GaLoreSGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.3}),
    ],
)
@pytest.mark.parametrize("maximize", [False, True])
def test_what_is_not_projected_is_stepped_as_by_torch(
    ours: Any, theirs: Any, settings: dict[str, Any], maximize: bool
) -> None:
    mine = [nn.Parameter(normal(*shape, seed=9)) for shape in SHAPES]
    other = [nn.Parameter(parameter.detach().clone()) for parameter in mine]
    first = ours(beside_a_projected_one(mine), **settings, maximize=maximize)
    second = theirs(other, **settings, maximize=maximize)
    for number in range(8):
        for a, b in zip(mine, other, strict=True):
            a.grad = b.grad = normal(*a.shape, seed=number)
        first.step()
        second.step()
    for a, b in zip(mine, other, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("beta1", [0.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES)
def test_adafactor_is_the_formula(shape: tuple[int, ...], beta1: float) -> None:
    """Shazeer & Stern's Algorithm 4, matrix by matrix of a stack, written with outer products."""
    W = nn.Parameter(normal(*shape, seed=9))
    expected = W.detach().clone()
    optimizer = GaLoreAdafactor(beside_a_projected_one([W]), lr=0.1, beta1=beta1, eps=1e-4, clip_threshold=0.8)
    V = torch.zeros(shape, dtype=F64)
    rows, columns, momentum = 0.0, 0.0, torch.zeros(shape, dtype=F64)
    for t in range(1, 7):
        W.grad = G = normal(*shape, seed=t)
        optimizer.step()
        beta2, squares = 1 - t**-0.8, G**2 + 1e-4
        if len(shape) == 1:
            V = beta2 * V + (1 - beta2) * squares
        else:
            rows = beta2 * rows + (1 - beta2) * squares.sum(-1)
            columns = beta2 * columns + (1 - beta2) * squares.sum(-2)
            V = torch.einsum("...i,...j->...ij", rows, columns) / rows.sum(-1)[..., None, None]
        U = G / V.sqrt()
        U = U / max(1.0, float((U**2).mean().sqrt()) / 0.8)
        momentum = beta1 * momentum + (1 - beta1) * U
        expected -= 0.1 * momentum
    assert torch.allclose(W, expected, rtol=0, atol=1e-13)


def test_adafactor_keeps_rows_and_columns_of_the_projected_gradient() -> None:
    W = nn.Parameter(torch.zeros(30, 50))
    W.grad = torch.randn(30, 50)
    optimizer = GaLoreAdafactor([W], rank=4)
    optimizer.step()
    moments = {name: value.shape for name, value in optimizer.state[W].items() if isinstance(value, Tensor)}
    assert moments == {"basis": (30, 4), "row_moment": (4,), "column_moment": (50,)}


# -- moments between subspaces -----------------------------------------------------------------------------------

RULES = [
    (AdamW(), {"betas": (0.9, 0.99), "eps": 1e-8}),
    (SGD(), {"momentum": 0.9, "nesterov": False}),
    (Adafactor(), {"beta1": 0.9, "beta2_decay": -0.8, "eps": 1e-30, "clip_threshold": 1.0}),
]


def after_steps(rule: Any, settings: dict[str, Any], steps: int, seed: int = 0) -> dict[str, Tensor]:
    moments = rule.start(torch.zeros(3, 5, dtype=F64), settings)
    for age in range(1, steps + 1):
        rule.directions([moments], [normal(3, 5, seed=seed + age)], [age], settings)
    return moments


@pytest.mark.parametrize(("rule", "settings"), RULES, ids=lambda value: type(value).__name__)
def test_the_same_subspace_in_another_order_carries_moments_exactly(rule: Any, settings: dict[str, Any]) -> None:
    """A permutation with signs: second moments go with their coordinates, and nothing is new."""
    C = torch.tensor([[0.0, -1, 0], [0, 0, 1], [1, 0, 0]], dtype=F64)
    moments = after_steps(rule, settings, 4)
    carried = rule.carry(moments, C, normal(3, 5, seed=50), 4, settings)
    for name, expected in moments.items():
        got = carried[name]
        if name == "momentum":
            assert torch.equal(got, C @ expected)
        elif name != "column_moment":
            assert torch.allclose(got, expected[[1, 2, 0]], rtol=0, atol=1e-15)
        else:
            assert torch.equal(got, expected)


def test_a_turned_coordinate_has_the_second_moments_in_the_shares_of_its_energy() -> None:
    """cos²·v₁ + sin²·v₂: what many independent gradients have, and not the rotated cos·v₁ − sin·v₂, which is negative here."""
    turn = torch.tensor(0.5, dtype=F64)
    C = torch.stack([torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])])
    V = torch.tensor([[1.0], [4.0]], dtype=F64)
    assert (C @ V)[0] < 0
    carried = carried_second_moment(V, C, torch.zeros(2, 1, dtype=F64), 1.0)
    drawn = C @ (V.sqrt() * normal(2, 100_000))
    assert torch.allclose(carried, drawn.square().mean(1, keepdim=True), rtol=0.02)


@given(seed=st.integers(0, 10_000), new=st.integers(1, 6), old=st.integers(1, 6), scale=st.floats(1e-12, 1e12))
def test_a_carried_second_moment_is_never_negative(seed: int, new: int, old: int, scale: float) -> None:
    P, Q = frame(8, new, seed), frame(8, old, seed + 1)
    V = scale * normal(old, 5, seed=seed).square()
    carried = carried_second_moment(V, P.mT @ Q, normal(new, 5, seed=seed + 1).square(), 0.5)
    assert (carried >= 0).all()
    assert torch.isfinite(carried).all()


def test_a_direction_that_the_old_subspace_did_not_see_starts_from_the_first_gradient() -> None:
    """Without it Adam's first step there is (1−β₁)/√(1−β₂) long: three times a usual one."""
    (rule, settings), age = RULES[0], 400
    moments = after_steps(rule, settings, age)
    new = torch.eye(4, dtype=F64)[:, 1:]  # coordinates 2 and 3 were seen before, 4 was not
    C = new.mT @ torch.eye(4, dtype=F64)[:, :3]
    R = normal(3, 5, seed=3)
    carried = rule.carry(moments, C, R, age, settings)
    assert torch.allclose(carried["second_moment"][:2], moments["second_moment"][1:], atol=1e-15)
    assert torch.allclose(carried["second_moment"][2], (1 - 0.99**age) * R[2].square(), atol=1e-15)
    assert torch.equal(carried["momentum"][2], torch.zeros(5, dtype=F64))
    (direction,) = rule.directions([carried], [R], [age + 1], settings)
    assert float(direction[2].abs().max()) == pytest.approx(0.1, rel=0.1)


def test_rotating_keeps_what_the_moments_say_of_the_whole_matrix() -> None:
    """Gradients of one fixed direction: rotated, its momentum goes on; the projected old moment is in the new subspace."""
    W = nn.Parameter(torch.zeros(6, 8, dtype=F64))
    optimizer = GaLoreSGD([W], lr=0.1, momentum=0.9, rank=2, refresh_every=2, moments="rotate")
    G = torch.outer(normal(6, seed=1), normal(8, seed=2))
    full, buffer = torch.zeros(6, 8, dtype=F64), torch.zeros(6, 8, dtype=F64)
    for _ in range(7):
        W.grad = G
        optimizer.step()
        buffer = 0.9 * buffer + G
        full -= 0.1 * buffer
    assert optimizer.state[W]["refreshes"] == 4
    assert torch.allclose(W, full, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "settings", "message"),
    [
        (GaLoreAdamW, {"betas": (1.0, 0.9)}, r"\[0, 1\)"),
        (GaLoreAdamW, {"betas": (0.9,)}, "a pair of numbers"),
        (GaLoreAdamW, {"betas": 0.9}, "a pair of numbers"),
        (GaLoreAdamW, {"betas": (0.9, math.nan)}, "a pair of numbers"),
        (GaLoreAdamW, {"eps": math.nan}, "eps cannot be negative"),
        (GaLoreAdamW, {"eps": -1.0}, "eps cannot be negative"),
        (GaLoreAdamW, {"lr": -1.0}, "maximize=True"),
        (GaLoreAdamW, {"weight_decay": -1.0}, "cannot be negative"),
        (GaLoreSGD, {"momentum": 1.0}, r"\[0, 1\)"),
        (GaLoreSGD, {"momentum": math.nan}, r"\[0, 1\)"),
        (GaLoreAdafactor, {"beta2_decay": math.nan}, "exponent"),
        (GaLoreAdafactor, {"clip_threshold": math.nan}, "positive"),
        (GaLoreAdafactor, {"eps": math.inf}, "eps cannot be negative"),
        (GaLoreSGD, {"nesterov": True}, "momentum above 0"),
        (GaLoreAdafactor, {"beta2_decay": 0.5}, "exponent"),
        (GaLoreAdafactor, {"clip_threshold": 0.0}, "positive"),
        (GaLoreAdafactor, {"beta1": 1.0}, r"\[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(optimizer: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer([nn.Parameter(torch.zeros(4, 4))], rank=2, **settings)


@pytest.mark.parametrize("optimizer", [GaLoreAdamW, GaLoreAdafactor])
@pytest.mark.parametrize("shape", [(4, 6), (4,)])
def test_without_eps_an_entry_of_which_nothing_was_seen_stays(optimizer: Any, shape: tuple[int, ...]) -> None:
    """0/0 is 0: at a gradient of zeros, and where rows and columns of one are zero."""
    W, other = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(4, 4))
    made = optimizer([W, other], rank=4, eps=0.0, lr=0.1, foreach=False)
    W.grad = torch.zeros(shape)
    made.step()
    assert torch.equal(W, torch.ones(shape))
    W.grad[0] = 1.0
    made.step()
    assert torch.isfinite(W).all()
    assert bool((W[0] != 1).all())


def test_adafactor_bears_a_row_of_zeros_beside_a_large_one() -> None:
    """The quotient of their second moments, 1e-30/1e10, is 0 in float32."""
    W = nn.Parameter(torch.zeros(3, 3))
    other = nn.Parameter(torch.zeros(4, 4))
    optimizer = GaLoreAdafactor([{"params": [W], "rank": None}, {"params": [other], "rank": 2}], lr=0.1)
    W.grad = torch.diag(torch.tensor([1e5, 1e5, 0.0]))
    optimizer.step()
    assert torch.allclose(W, -0.1 * 2**0.5 * W.grad.sign())


@pytest.mark.parametrize(("optimizer", "setting"), [(GaLoreSGD, {"momentum": 0.9}), (GaLoreAdafactor, {"beta1": 0.9})])
@pytest.mark.parametrize("moments", ["keep", "rotate"])
def test_a_momentum_that_is_asked_for_later_starts_then(
    optimizer: Any, setting: dict[str, float], moments: str
) -> None:
    W, bias = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(6))
    made = optimizer([W, bias], rank=2, refresh_every=2, moments=moments)
    for number in range(4):
        if number == 2:
            made.param_groups[0].update(setting)
        for parameter in (W, bias):
            generator = torch.Generator().manual_seed(number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        made.step()
    assert made.state[W]["momentum"].shape == (2, 6)
    assert bool(made.state[bias]["momentum"].any())
