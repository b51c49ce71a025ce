"""Dropout networks, their spectra, and what is predicted of them, against enumeration, dense algebra and other routes."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankwise.regularization import dropout_minimizer
from reproduction.image_data import Samples
from reproduction.overview25.masked_training import (
    SYNTHETIC,
    MaskedNetwork,
    bounding_last_layer,
    equal_shares,
    linear_samples,
    masked_run,
    predicted_last_layer,
    settle_batch_norm,
    spectrum,
)


def _mean_loss_over_all_masks(A: Tensor, weights: list[Tensor], rate: float) -> Tensor:
    """E‖A x − W_L D_{L−1} ⋯ D_1 W_1 x‖² for white x, over every mask there is."""
    size, hidden = len(A), len(weights) - 1
    masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=size * hidden)), dtype=A.dtype)
    chances = (masks * (1 - rate) + (1 - masks) * rate).prod(1)
    product = weights[0].expand(len(masks), size, size)
    for mask, weight in zip(masks.split(size, dim=1), weights[1:], strict=True):
        product = weight @ (mask.unsqueeze(-1) * product) / (1 - rate)
    return (chances * (A - product).square().sum((1, 2))).sum()


def _unrestricted_minimum(A: Tensor, layers: int, rate: float, seed: int) -> tuple[Tensor, float]:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(A.shape, generator=generator, dtype=A.dtype).requires_grad_() for _ in range(layers)]
    search = torch.optim.LBFGS(
        weights, max_iter=800, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        loss = _mean_loss_over_all_masks(A, weights, rate)
        loss.backward()
        return loss

    search.step(closure)
    with torch.no_grad():
        product = weights[0]
        for weight in weights[1:]:
            product = weight @ product
        return torch.linalg.svdvals(product), float(_mean_loss_over_all_masks(A, weights, rate))


@pytest.mark.parametrize("spread", [(2.0, 1.5, 1.4), (2.0, 1.0, 0.1)])
def test_no_descent_on_all_factors_does_better_than_equal_shares(spread: tuple[float, ...]) -> None:
    """Three layers of three units, 64 masks; the second target loses a direction to dropout."""
    target, rate = torch.tensor(spread, dtype=torch.float64), 0.4
    kept, value = equal_shares(target, 3, rate, width=3)
    best, lowest = min(
        (_unrestricted_minimum(torch.diag(target), 3, rate, seed) for seed in range(4)), key=lambda end: end[1]
    )
    assert lowest == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(best, kept.sort(descending=True).values, atol=2e-3, rtol=0)
    assert (kept[-1] < 1e-4) == (spread[-1] < 1)


@pytest.mark.parametrize("rate", [0.2, 0.6, 0.9])
def test_with_two_layers_equal_shares_are_the_closed_form(rate: float) -> None:
    target = torch.tensor([3.0, 2.0, 0.7, 0.1], dtype=torch.float64)
    best = dropout_minimizer(torch.eye(4).double(), torch.diag(target), width=6, keep_rate=1 - rate)
    kept, value = equal_shares(target, 2, rate, width=6)
    torch.testing.assert_close(kept, best.outputs.diag(), atol=1e-5, rtol=0)
    assert value == pytest.approx(best.value, rel=1e-9)


@pytest.fixture(scope="module")
def correlated() -> Samples:
    """Inputs of unequal, correlated coordinates: a prediction that took them for white would be off."""
    generator = torch.Generator().manual_seed(3)
    mix, A = (torch.randn(5, 5, generator=generator) for _ in range(2))
    X, T = (torch.randn(n, 5, generator=generator) @ mix for n in (400, 300))
    return Samples(X, X @ A.T, T, T @ A.T)


def test_at_two_layers_the_bound_and_the_closed_form_agree_on_correlated_inputs(correlated: Samples) -> None:
    exact, bound = (predict(correlated, 2, 0.5) for predict in (predicted_last_layer, bounding_last_layer))
    assert exact["singular_values"] == pytest.approx(bound["singular_values"], abs=1e-4 * exact["singular_values"][0])


@pytest.mark.parametrize("layers", [2, 3])
def test_without_dropout_the_held_out_targets_are_predicted(layers: int, correlated: Samples) -> None:
    predicted = predicted_last_layer(correlated, layers, 0.0)
    targets = torch.linalg.svdvals(correlated.held_out_targets) / 300**0.5
    assert predicted["singular_values"] == pytest.approx(targets.tolist(), rel=1e-4)


def test_three_layers_keep_no_more_than_the_bound_says() -> None:
    samples = linear_samples(20, 15, 2000, 500, seed=0)
    ranks = [
        [predict(samples, layers, 0.6)["visible"] for predict in (predicted_last_layer, bounding_last_layer)]
        for layers in (2, 3)
    ]
    assert ranks[0][0] == ranks[0][1] > ranks[1][1] > ranks[1][0]


def test_the_synthetic_data_are_the_documents() -> None:
    samples = linear_samples(20, 15, 5000, 100, seed=0)
    S = torch.linalg.svdvals(samples.targets)
    assert S[14] > 1e-2 * S[0]
    assert S[15] < 1e-5 * S[0]
    assert samples.targets.var() == pytest.approx(1, rel=0.3)
    # held out: other inputs, the same map
    A = torch.linalg.lstsq(samples.inputs, samples.targets).solution
    torch.testing.assert_close(samples.held_out_inputs @ A, samples.held_out_targets, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "perceptron"])
def test_the_chain_is_three_layers_with_dropout_between(kind: str) -> None:
    network = getattr(MaskedNetwork, kind)(6, 3, 0.25)
    W1, W2, W3 = (module.weight for module in network.modules() if isinstance(module, nn.Linear))
    assert [module.p for module in network.modules() if isinstance(module, nn.Dropout)] == [0.25, 0.25]
    X = torch.randn(50, 6)
    act = torch.relu if kind == "perceptron" else (lambda Z: Z)
    network.eval()
    first = network.first(X)
    torch.testing.assert_close(first, act(X @ W1.T))
    torch.testing.assert_close(network(X), act(first @ W2.T) @ W3.T)
    assert torch.equal(network.rest(first), network(X))


def test_the_residual_network_is_a_resnet18() -> None:
    """11,173,962 parameters is what the usual CIFAR ResNet-18 has."""
    network = MaskedNetwork.residual(64, 0.6)
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_173_962
    assert [module.p for module in network.modules() if isinstance(module, nn.Dropout)] == [0.6] * 9
    small = MaskedNetwork.residual(4, 0.0)
    first = small.first(torch.randn(2, 3, 32, 32))
    assert first.shape == (2, 4, 32, 32)
    assert small.rest(first).shape == (2, 32)


def test_the_spectrum_of_maps_takes_every_place_for_a_sample() -> None:
    maps = torch.randn(7, 3, 4, 5)
    dense = torch.stack([maps[:, channel].flatten() for channel in range(3)])
    expected = torch.linalg.svdvals(dense.double()) / (7 * 20) ** 0.5
    assert spectrum(maps)["singular_values"] == pytest.approx(expected.tolist(), rel=1e-6)


def test_ranks_of_a_known_spectrum() -> None:
    seen = spectrum(torch.diag(torch.tensor([4.0, 4.0, 0.02])))
    assert seen["visible"] == 2
    assert 2 < seen["energy_rank"] < seen["effective_rank"] < 2.1


def test_batch_norm_is_settled_without_dropout() -> None:
    network = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(2, momentum=0.3), nn.Dropout(0.5)).train()
    inputs = 3 + 2 * torch.randn(40, 2, 5, 5)
    for _ in range(20):
        network(inputs)
    norm: Any = network[1]
    assert norm.running_var.min() > 20  # the averages that dropout left
    settle_batch_norm(network, inputs, count=40, batch=10)
    torch.testing.assert_close(norm.running_mean, inputs.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, inputs.var((0, 2, 3)), rtol=0.05, atol=0)
    assert norm.momentum == 0.3


def test_the_seed_alone_fixes_a_run() -> None:
    settings = SYNTHETIC | {"samples": 64, "held_out": 32, "batch": 16, "epochs": 2}
    samples = linear_samples(20, 15, 64, 32, seed=0)
    torch.manual_seed(5)
    untouched = torch.rand(3)
    ends = []
    for drawn_before, seed in ((5, 1), (6, 1), (6, 2)):
        torch.manual_seed(drawn_before)
        ends.append(masked_run("linear", settings, samples, 0.5, seed, [0, 2]))
        if drawn_before == 5:
            assert torch.equal(torch.rand(3), untouched)
    assert [look["epoch"] for look in ends[0]] == [0, 2]
    assert ends[0] == ends[1] != ends[2]
