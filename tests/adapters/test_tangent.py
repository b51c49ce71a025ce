"""The ridge start against dense float64 algebra, explicit refits and autograd."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn

from rankwise.adapters import DeepLoraConfig, save_as_lora, solve_deeplora_weights
from rankwise.adapters.tangent import PENALTIES, ridge_in_dual


def problem(n: int, features: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    X = torch.randn(n, features, generator=draw, dtype=torch.float64)
    f0 = torch.randn(n, generator=draw, dtype=torch.float64)
    y = 0.7 * f0 + 0.3 + X[:, 0] + 0.3 * torch.randn(n, generator=draw, dtype=torch.float64)
    return X, f0, y


def primal(X: Tensor, f0: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """(a, b), h of the same problem by its normal equations, the calibration unpenalized."""
    F = torch.stack([f0, torch.ones_like(f0)], dim=1)
    Z = torch.cat([F, X], dim=1)
    penalty = torch.diag(torch.tensor([0.0, 0.0] + [ridge] * X.shape[1], dtype=torch.float64))
    solution = torch.linalg.solve(Z.mT @ Z + penalty, Z.mT @ y)
    return solution[:2], solution[2:]


@settings(deadline=None, max_examples=25)
@given(n=st.integers(6, 14), features=st.integers(1, 20), seed=st.integers(0, 2**16))
def test_leave_one_out_is_that_of_explicit_refits(n: int, features: int, seed: int) -> None:
    X, f0, y = problem(n, features, seed)
    K = X @ X.mT
    penalty = 0.3
    fit = ridge_in_dual(K, f0, y, [penalty])
    ridge = penalty * float(K.diagonal().mean())
    errors, without = [], []
    for left_out in range(n):
        rest = [i for i in range(n) if i != left_out]
        (a, b), h = primal(X[rest], f0[rest], y[rest], ridge)
        errors.append(float((a * f0[left_out] + b + X[left_out] @ h - y[left_out]) ** 2))
        (a, b), _ = primal(X[rest, :0], f0[rest], y[rest], 1.0)
        without.append(float((a * f0[left_out] + b - y[left_out]) ** 2))
    with_change, reference = sum(errors) / n, sum(without) / n
    assert fit.reference == pytest.approx(reference, rel=1e-6)
    assert fit.error == pytest.approx(min(with_change, reference), rel=1e-6)
    assert fit.abstains == (with_change >= reference)


@pytest.mark.parametrize("features", [3, 40])
def test_dual_and_primal_solutions_agree(features: int) -> None:
    X, f0, y = problem(30, features, 1)
    fit = ridge_in_dual(X @ X.mT, f0, y, [0.01])
    (a, b), h = primal(X, f0, y, 0.01 * float((X @ X.mT).diagonal().mean()))
    assert not fit.abstains
    assert torch.allclose(X.mT @ fit.coefficients, h, atol=1e-9)
    assert (fit.scale, fit.offset) == pytest.approx((float(a), float(b)), abs=1e-9)


def test_the_best_penalty_is_chosen_and_noise_is_left_alone() -> None:
    X, f0, y = problem(40, 60, 2)
    errors = {p: ridge_in_dual(X @ X.mT, f0, y, [p]).error for p in PENALTIES}
    fit = ridge_in_dual(X @ X.mT, f0, y)
    assert fit.error == pytest.approx(min(*errors.values(), fit.reference))
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(400, 60, generator=draw, dtype=torch.float64)
    fitted = [
        ridge_in_dual(noise[i : i + 40] @ noise[i : i + 40].mT, noise[i : i + 40, 0] * 0, noise[i : i + 40, 1] * 0 + r)
        for i in range(0, 400, 40)
        for r in [torch.randn(40, generator=draw, dtype=torch.float64)]
    ]
    assert sum(fit.abstains or fit.penalty > 0.3 for fit in fitted) >= 8  # pure noise: no change, or hardly any


def test_shifting_and_stretching_targets_changes_only_the_calibration() -> None:
    X, f0, y = problem(25, 10, 4)
    K = X @ X.mT
    one, two = ridge_in_dual(K, f0, y, [0.1]), ridge_in_dual(K, f0, 3 * y - 7, [0.1])
    assert torch.allclose(3 * one.coefficients, two.coefficients, atol=1e-10)
    assert two.scale == pytest.approx(3 * one.scale)
    assert two.offset == pytest.approx(3 * one.offset - 7)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(10, 14), nn.Linear(14, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).square().sum(-1)


def adapted(model: nn.Module, r: int = 4, **changes: Any) -> nn.Module:
    return get_peft_model(model, DeepLoraConfig(r=r, target_modules=["first", "second"], **changes))


def rows(n: int, seed: int = 5) -> Tensor:
    return torch.randn(n, 3, 10, generator=torch.Generator().manual_seed(seed))  # three tokens a row


def output(model: nn.Module, row: Tensor) -> Tensor:
    return model(row).mean()


def test_the_update_is_the_truncated_dense_solution() -> None:
    base = Net()
    x = rows(60)
    with torch.no_grad():
        f0 = torch.stack([output(base, row) for row in x]).double()
    jacobian: dict[str, list[Tensor]] = {name: [] for name in ("first", "second")}
    for row in x:
        base.zero_grad()
        output(base, row).backward()
        for name in jacobian:
            jacobian[name].append(getattr(base, name).weight.grad.double().clone())
    base.zero_grad()
    change = torch.randn(14, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = 0.8 * (f0 + torch.stack([(change * gradient).sum() for gradient in jacobian["first"]])) + 0.1
    grams, solutions = {}, {}
    for name, gradients in jacobian.items():
        flat = torch.stack(gradients).flatten(1)
        grams[name] = flat @ flat.mT
    K = sum(gram / gram.trace() for gram in grams.values())
    fit = ridge_in_dual(K, f0, y, [0.05])
    assert not fit.abstains
    for name, gradients in jacobian.items():
        weight = 1 / grams[name].trace() / fit.scale
        solutions[name] = weight * sum(c * g for c, g in zip(fit.coefficients, gradients, strict=True))

    model = adapted(base, inner_depth=3)
    summary = solve_deeplora_weights(model, x.split(1), y, outputs_fn=output, penalties=[0.05])
    assert summary.fit.error == pytest.approx(fit.error, rel=1e-4)
    kept = total = 0.0
    for name, dense in solutions.items():
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
        expected = (U[:, :4] * S[:4]) @ Vh[:4]
        found = getattr(model.base_model.model, name).get_delta_weight("default").double()
        assert torch.linalg.matrix_norm(found - expected) < 1e-3 * torch.linalg.matrix_norm(expected)
        kept, total = kept + float(S[:4].square().sum()), total + float(S.square().sum())
    assert summary.captured == pytest.approx(kept / total, abs=1e-4)
    assert summary.update_norm == pytest.approx(math.sqrt(kept), rel=1e-3)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_solved_adapter_predicts_better_on_new_rows_and_exports(depth: int, tmp_path: Any) -> None:
    base, x, new = Net(), rows(40), rows(60, seed=6)
    teacher = Net()
    with torch.no_grad():
        teacher.first.weight.add_(0.05 * torch.outer(torch.ones(14), torch.randn(10)))
        y = torch.stack([output(teacher, row) for row in x])
        wanted = torch.stack([output(teacher, row) for row in new])
        before = torch.stack([output(base, row) for row in new])
    model = adapted(base, inner_depth=depth)
    assert not solve_deeplora_weights(model, x.split(1), y, outputs_fn=output).fit.abstains
    with torch.no_grad():
        after = torch.stack([output(model, row) for row in new])
    correlation = lambda a: float(torch.corrcoef(torch.stack([a, wanted]))[0, 1])  # noqa: E731
    assert correlation(after) > correlation(before)
    save_as_lora(model, tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


def test_labels_that_support_nothing_leave_an_exact_no_op() -> None:
    base, x = Net(), rows(12)
    with torch.no_grad():
        f0 = torch.stack([output(base, row) for row in x])
    model = adapted(base)
    summary = solve_deeplora_weights(model, x.split(1), 2 * f0 - 1, outputs_fn=output)  # calibration explains it all
    assert summary.fit.abstains or summary.update_norm < 1e-3
    with torch.no_grad():
        assert torch.allclose(torch.stack([output(model, row) for row in x]), f0, atol=1e-4)
    forced = solve_deeplora_weights(model, x.split(1), f0, outputs_fn=output, penalties=[])
    assert forced.fit.abstains and "no change" in str(forced)
    with torch.no_grad():
        assert torch.equal(torch.stack([output(model, row) for row in x]), f0)


def test_nothing_else_is_touched() -> None:
    model = adapted(Net())
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "deeplora_" not in n}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    solve_deeplora_weights(model, rows(8).split(1), torch.arange(8.0), outputs_fn=output)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@pytest.mark.parametrize(
    ("n", "targets", "outputs", "message"),
    [
        (2, torch.arange(2.0), output, "at least 3"),
        (5, torch.arange(4.0), output, "5 examples but 4 targets"),
        (5, torch.full((5,), float("nan")), output, "finite"),
        (5, torch.arange(5.0), lambda m, row: m(row), "single number"),
        (5, torch.arange(5.0), lambda m, row: output(m, row) * float("inf"), "points nowhere"),
        (
            5,
            torch.arange(5.0),
            lambda m, row: m.base_model.model.second(row.new_ones(3, 14)).mean(),
            "does not depend on",
        ),
    ],
)
def test_bad_input_is_one_readable_error(n: int, targets: Tensor, outputs: Any, message: str) -> None:
    model = adapted(Net())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        solve_deeplora_weights(model, rows(n).split(1), targets, outputs_fn=outputs)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 4])
def test_set_update_makes_the_update_asked_for(depth: int, k: int) -> None:
    model = adapted(Net(), inner_depth=depth)
    layer = model.base_model.model.first
    draw = torch.Generator().manual_seed(8)
    left, right = (torch.linalg.qr(torch.randn(d, k, generator=draw))[0] for d in (14, 10))
    values = torch.linspace(2.0, 0.1, k)
    layer.set_update("default", left, values, right)
    assert torch.allclose(layer.get_delta_weight("default"), (left * values) @ right.mT, atol=1e-5)
    inner = layer.factors("default").inner
    assert all(torch.equal(factor, inner[0]) for factor in inner)  # balanced
