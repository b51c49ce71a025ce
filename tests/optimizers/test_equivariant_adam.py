"""EquivariantAdam: torch's citizen by the contract, its formula by hand, its symmetry by turning the problem."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from rankwise.optimizers import EquivariantAdam
from rankwise.testing.optimizer_contract import OptimizerContract
from tests.spectral.planted import frame

F64 = torch.float64


class TestContract(OptimizerContract):
    def make_optimizer(self, params: Any, **changes: Any) -> EquivariantAdam:
        return EquivariantAdam(params, **{"lr": 0.05, "weight_decay": 0.01, **changes})


def gradient(shape, number):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(number))


def by_hand(start, gradients, lr, betas, eps, decay):
    """M, v and W of the docstring, one matrix, written out."""
    W, M, v = start.clone(), torch.zeros_like(start), 0.0
    for t, G in enumerate(gradients, start=1):
        M = betas[0] * M + (1 - betas[0]) * G
        v = betas[1] * v + (1 - betas[1]) * float((G * G).sum())
        M_hat, v_hat = M / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        W = (1 - lr * decay) * W - lr * M_hat / (math.sqrt(v_hat) + eps)
    return W


@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 3, 2, 2), ()])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.5, 0.0)])
def test_steps_are_those_of_the_formula(shape, betas):
    start = gradient(shape, 99)
    W = nn.Parameter(start.clone())
    optimizer = EquivariantAdam([W], lr=0.1, betas=betas, eps=1e-3, weight_decay=0.2)
    gradients = [gradient(shape, number) for number in range(6)]
    for G in gradients:
        W.grad = G
        optimizer.step()
    assert torch.allclose(W, by_hand(start, gradients, 0.1, betas, 1e-3, 0.2), rtol=0, atol=1e-13)


@pytest.mark.parametrize("stacked", [True, False])
def test_a_stack_has_a_second_moment_for_every_matrix_unless_told(stacked):
    shape = (3, 4, 2)
    start, gradients = (
        gradient(shape, 99),
        [gradient(shape, n) * torch.tensor([1.0, 10.0, 0.1])[:, None, None] for n in range(4)],
    )
    W = nn.Parameter(start.clone())
    optimizer = EquivariantAdam([W], lr=0.1, stacked=stacked)
    for G in gradients:
        W.grad = G
        optimizer.step()
    settings = (0.1, (0.9, 0.999), 1e-8, 0.0)
    apart = torch.stack([by_hand(start[l], [G[l] for G in gradients], *settings) for l in range(3)])  # noqa: E741
    together = by_hand(start, gradients, *settings)
    assert torch.allclose(W, apart if stacked else together, rtol=0, atol=1e-13)
    assert float((apart - together).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("shape", [(6, 4), (50, 30)])
def test_a_first_step_has_frobenius_norm_lr_whatever_the_size(shape):
    W = nn.Parameter(torch.zeros(shape, dtype=F64))
    W.grad = gradient(shape, 0)
    EquivariantAdam([W], lr=0.3, eps=0.0).step()
    assert float(W.detach().norm()) == pytest.approx(0.3, rel=1e-12)


def turned(optimizer_class, **settings):
    """max |U W(t) Vᵀ − W'(t)| where W' descends the same loss of UᵀW'V, from U W(0) Vᵀ."""
    U, V, target = frame(5, 5, 1), frame(4, 4, 2), gradient((5, 4), 3)
    W, T = nn.Parameter(gradient((5, 4), 4)), nn.Parameter(U @ gradient((5, 4), 4) @ V.mT)
    first, second = optimizer_class([W], **settings), optimizer_class([T], **settings)
    for _ in range(30):
        W.grad = (W.detach() - target) ** 3
        T.grad = U @ (U.mT @ T.detach() @ V - target) ** 3 @ V.mT
        first.step()
        second.step()
    return float((U @ W.detach() @ V.mT - T.detach()).abs().max())


def test_turning_the_problem_turns_the_trajectory():
    settings = {"lr": 0.05, "weight_decay": 0.1}
    assert turned(EquivariantAdam, **settings) < 1e-13
    assert turned(torch.optim.AdamW, **settings) > 1e-2, "the control: elementwise Adam does not"


def test_bfloat16_keeps_its_second_moment_in_float32():
    """1e-3 of a new square is lost when it is added to the old sum in eight bits: v would stop growing at once."""
    W = nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    optimizer = EquivariantAdam([W], lr=0.0)
    for _ in range(600):
        W.grad = torch.ones_like(W)
        optimizer.step()
    state = optimizer.state[W]
    assert state["second_moment"].dtype == torch.float32
    assert float(state["second_moment"]) == pytest.approx(16 * (1 - 0.999**600), rel=1e-3)
    fresh = EquivariantAdam([W], lr=0.0)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.state[W]["second_moment"].dtype == torch.float32
    assert fresh.state[W]["momentum"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, "maximize=True"),
        ({"eps": -1.0}, "cannot be negative"),
        ({"weight_decay": -1.0}, "cannot be negative"),
        ({"betas": (1.0, 0.9)}, r"\[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"\[0, 1\)"),
        ({"betas": (0.9, 0.9, 0.9)}, "a pair of numbers"),
        ({"eps": float("nan")}, "cannot be negative"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EquivariantAdam([nn.Parameter(torch.zeros(2, 2))], **settings)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = EquivariantAdam(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False in the embedding"):
        optimizer.step()
