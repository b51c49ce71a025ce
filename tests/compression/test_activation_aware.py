"""With calibration data a pair is the best of its rank for the inputs that the layer gets."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from rankwise.compression import LowRankLinear, SecondMoments, factorize_model, rank_profile
from rankwise.compression.factors import balanced_factors, output_directions
from rankwise.compression.model_layers import layers_of
from tests.tiny_models import tiny_bert, tiny_llama, token_batch

F64 = torch.float64


def skewed_inputs(rows: int, n: int, generator: torch.Generator) -> Tensor:
    """Rows whose directions differ a thousandfold in size."""
    mixing = torch.randn(n, n, dtype=F64, generator=generator)
    return torch.randn(rows, n, dtype=F64, generator=generator) * torch.logspace(0, -3, n, dtype=F64) @ mixing


def cut(W: Tensor, C: Tensor | None, rank: int, damping: float) -> Tensor:
    U, _ = output_directions(W, C, damping)
    left, right = balanced_factors(W, U[:, :rank])
    return left @ right


@pytest.mark.parametrize(("m", "n"), [(7, 11), (11, 7)])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_it_is_the_closed_form_optimum(m, n, damping, generator):
    """[W R]_k R⁻¹ with the symmetric root R of C + ridge, which the code never forms."""
    W, X = torch.randn(m, n, dtype=F64, generator=generator), skewed_inputs(200, n, generator)
    C = X.mT @ X / len(X)
    damped = C + damping * C.diagonal().mean() * torch.eye(n, dtype=F64)
    values, vectors = torch.linalg.eigh(damped)
    root, inverse = (vectors * values**power @ vectors.mT for power in (0.5, -0.5))
    U, S, Vh = torch.linalg.svd(W @ root, full_matrices=False)
    optimum = (U[:, :3] * S[:3]) @ Vh[:3] @ inverse
    torch.testing.assert_close(cut(W, C, 3, damping), optimum, rtol=1e-6, atol=1e-8)


def test_no_descent_on_the_factors_finds_a_better_pair(generator):
    """Alternating least squares from many starts: each half is solved exactly, so that it ends in a minimum."""
    W, X = torch.randn(5, 6, dtype=F64, generator=generator), skewed_inputs(50, 6, generator)
    C = X.mT @ X / len(X)

    def error(approximation: Tensor) -> float:
        return float(((W - approximation) @ X.mT).square().mean())

    best = float("inf")
    for _ in range(20):
        right = torch.randn(2, 6, dtype=F64, generator=generator)
        for _ in range(200):
            left = W @ C @ right.mT @ torch.linalg.pinv(right @ C @ right.mT)
            right = torch.linalg.pinv(left.mT @ left) @ left.mT @ W
        best = min(best, error(left @ right))
    ours = error(cut(W, C, 2, 0.0))
    assert ours == pytest.approx(best, rel=1e-6)
    assert ours < 0.9 * error(cut(W, None, 2, 0.0))  # the problem tells the two apart


@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("rows", [3, 40])
def test_whatever_the_damping_it_is_never_worse_on_the_calibration_data(damping, rows, generator):
    """Also with fewer rows than inputs, where C is singular."""
    for seed in range(20):
        generator.manual_seed(seed)
        W, X = torch.randn(8, 12, dtype=F64, generator=generator), skewed_inputs(rows, 12, generator)
        C = X.mT @ X / rows
        for rank in (1, 2, 4, 7):
            aware, plain = (((W - cut(W, c, rank, damping)) @ X.mT).norm() for c in (C, None))
            assert aware <= plain * (1 + 1e-9) + 1e-9 * (W @ X.mT).norm()


def test_inputs_that_span_few_directions_are_served_exactly(generator):
    W = torch.randn(8, 12, dtype=F64, generator=generator)
    X = torch.randn(30, 3, dtype=F64, generator=generator) @ torch.randn(3, 12, dtype=F64, generator=generator)
    outputs = X @ W.mT
    torch.testing.assert_close(X @ cut(W, X.mT @ X / 30, 3, 0.0).mT, outputs, rtol=1e-6, atol=1e-6)
    assert (X @ cut(W, None, 3, 0.0).mT - outputs).norm() > 0.1 * outputs.norm()


def test_the_spectrum_says_the_error_of_the_outputs(generator):
    W, X = torch.randn(8, 12, dtype=F64, generator=generator), skewed_inputs(100, 12, generator)
    C = X.mT @ X / len(X)
    _, S = output_directions(W, C, 0.0)
    measured = ((W - cut(W, C, 3, 0.0)) @ X.mT).square().sum(0).mean()
    torch.testing.assert_close(S[3:].square().sum(), measured, rtol=1e-8, atol=0)


def test_zero_inputs_leave_the_plain_pair(generator):
    W = torch.randn(5, 6, dtype=F64, generator=generator)
    assert torch.equal(cut(W, torch.zeros(6, 6, dtype=F64), 2, 1e-3), cut(W, None, 2, 1e-3))


def moments_by_hand(model: nn.Module, name: str, batches: list) -> Tensor:
    """E[xxᵀ] of what a layer is called with, padding left out."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    rows = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, batches, strict=True)]).double()
    return rows.mT @ rows / len(rows)


def padded_batches() -> list[dict[str, Tensor]]:
    first, second = token_batch(rows=3, tokens=9), token_batch(rows=2, tokens=5)
    first["attention_mask"][1, 4:] = 0
    return [first, second]


@pytest.mark.parametrize("memory", [1, 40_000, 2**31])
def test_second_moments_are_those_of_real_tokens_whatever_the_groups(memory):
    model, batches = tiny_bert(), padded_batches()
    layers = [layer for layer in layers_of(model).layers if "pooler" not in layer.name]
    moments = SecondMoments(model, layers, batches, memory)
    assert (len(moments.groups) == 1) == (memory == 2**31)
    for layer in layers:
        torch.testing.assert_close(moments.of(layer), moments_by_hand(model, layer.name, batches), rtol=1e-5, atol=1e-7)
        held = sum(8 * len(C) ** 2 for C in moments.moments.values())
        assert held <= max(memory, 8 * layer.shape[1] ** 2)


def test_a_group_is_dropped_before_the_next_is_gathered():
    held = []

    class Watched:
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            held.append(len(moments.moments))
            return iter(padded_batches())

    model = tiny_bert()
    layers = layers_of(model).layers[:3]
    moments = SecondMoments(model, layers, Watched(), memory=1)
    assert all(moments.of(layer) is not None for layer in layers)
    assert held == [0, 0, 0]


def test_a_layer_that_is_called_twice_and_a_generator_of_batches_are_counted_whole(generator):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6, dtype=F64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer(2 * x)

    X = torch.randn(4, 6, dtype=F64, generator=generator)
    model = Twice()
    (layer,) = layers_of(model).layers
    moments = SecondMoments(model, [layer], (batch for batch in X.split(2)))
    torch.testing.assert_close(moments.of(layer), (X.mT @ X + 4 * X.mT @ X) / 8, rtol=1e-12, atol=0)


def test_a_convolution_is_calibrated_on_its_patches(generator):
    """The error of the outputs is the one that the spectrum of weighed patches promises, below plain truncation's."""
    torch.manual_seed(0)
    x = torch.randn(4, 5, 9, 9, dtype=F64, generator=generator) * torch.logspace(0, -3, 5, dtype=F64)[:, None, None]
    errors = {}
    for name, calibration in (("plain", None), ("aware", [x])):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(5, 12, 3, padding=1, stride=2, dtype=F64))
        before = model(x)
        done = factorize_model(model, ranks=3, calibration=calibration)
        outputs = before - model[0].left.bias[:, None, None]
        errors[name] = ((model(x) - before).norm() / outputs.norm()).item()
        if calibration is not None:  # what the profile promised; damping moves it a little
            assert done.layers[0].relative_error == pytest.approx(errors["aware"], rel=0.02)
    assert errors["aware"] < errors["plain"]


def test_the_model_is_left_as_it_was_and_in_its_mode():
    model = tiny_llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rank_profile(model, [token_batch(labels="tokens")])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_that_no_batch_reaches_are_cut_by_their_weights_and_named(generator):
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    torch.manual_seed(0)
    model = Idle()
    plain = LowRankLinear.from_linear(model.idle, 3).weight
    done = factorize_model(model, ranks=3, calibration=[torch.randn(30, 20, generator=generator)])
    assert done.unseen == ("idle",)
    torch.testing.assert_close(model.idle.weight, plain)


def test_data_that_cannot_calibrate_is_refused():
    model = nn.Sequential(nn.Linear(20, 20))
    with pytest.raises(ValueError, match="holds no batch"):
        factorize_model(model, ranks=2, calibration=[])
    with pytest.raises(ValueError, match="inputs of 0 have NaN"):
        factorize_model(model, ranks=2, calibration=[torch.full((2, 20), float("nan"))])
    assert type(model[0]) is nn.Linear
