"""Networks with an activation: their formula, Figure 9's spectrum, and their compression where theory and limits pin it."""

import math

import pytest
import torch

from rankwise.factorizations import (
    CompressedNetwork,
    DeepLinear,
    DeepNetwork,
    gradient_spectrum,
    invariant_bases,
    network_gradients,
    rho_trajectory,
    trajectory_gap,
)
from rankwise.factorizations.nonlinear import ACTIVATIONS
from tests.spectral.planted import planted, projector

F64 = torch.float64
D, RANK = 24, 2
TARGET = planted(D, D, [1.0, 0.7], seed=3).matrix


def network(activation, init_scale=0.4, depth=3, width=D, seed=0):
    generator = torch.Generator().manual_seed(10**9 + seed)
    return DeepNetwork(
        DeepLinear.orthogonal(width, depth, init_scale, generator=generator, dtype=F64).weights, activation
    )


def test_the_paper_s_formula_for_three_layers():
    """f(Θ) = W_3 σ(W_2 σ(W_1)), and ∇_{W_2} = [h(W_2σ(W_1)) ⊙ (W_3ᵀE)] σ(W_1)ᵀ with h the unit step (§5)."""
    net = network("relu")
    W1, W2, W3 = (w.detach() for w in net.weights)
    hidden = (W2 @ W1.clamp_min(0)).clamp_min(0)
    f = W3 @ hidden
    assert torch.allclose(net(torch.eye(D, dtype=F64)), f, rtol=0, atol=1e-14)
    expected = ((hidden > 0) * (W3.mT @ (f - TARGET))) @ W1.clamp_min(0).mT
    assert torch.allclose(network_gradients(net, TARGET)[1], expected, rtol=0, atol=1e-13)
    spectrum = gradient_spectrum(net, TARGET, layer=2)
    assert torch.allclose(spectrum, torch.linalg.svdvals(expected), rtol=0, atol=1e-13)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_samples_are_columns_and_layers_may_differ_in_width(activation):
    net = DeepNetwork(DeepLinear.gaussian([3, 5, 2], init_scale=1.0, dtype=F64).weights, activation)
    X = torch.randn(3, 7, dtype=F64)
    sigma = ACTIVATIONS[activation]
    one = torch.cat([net.weights[1] @ sigma(net.weights[0] @ X[:, j : j + 1]) for j in range(7)], dim=1)
    assert torch.allclose(net(X), one, atol=1e-14)
    grads = network_gradients(net, torch.ones(2, 7, dtype=F64), X)
    assert [g.shape for g in grads] == [w.shape for w in net.weights]


def test_an_activation_may_be_a_function_and_a_wrong_name_is_refused():
    net = DeepNetwork([torch.ones(1, 1), torch.ones(1, 1)], lambda x: x + 1)
    assert net(torch.zeros(1, 1)).item() == 1
    with pytest.raises(ValueError, match="unknown activation 'swish': expected identity, relu, gelu, tanh"):
        DeepNetwork([torch.ones(1, 1)], "swish")
    with pytest.raises(ValueError, match="from 1 to 3, got 0"):
        gradient_spectrum(network("relu"), TARGET, layer=0)


@pytest.mark.parametrize(("activation", "gap"), [("relu", 1.3), ("gelu", 100.0), ("tanh", 100.0)])
def test_at_a_small_start_the_target_s_rank_shows_in_the_gradient(activation, gap):
    """Figure 9 at d = 150: σ_r over σ_{r+1}. Smooth activations are linear there; ReLU's mask leaves a tail."""
    d, r = 150, 3
    net = network(activation, 1e-3, width=d)
    target = planted(d, d, [20.0, 19.0, 18.0], seed=3).matrix
    for layer in (1, 2, 3):
        spectrum = gradient_spectrum(net, target, layer)
        assert float(spectrum[r - 1] / spectrum[r]) > gap


def test_the_frames_span_theorem_2_1_s_block_in_the_linear_case():
    """orth[A, W B] and orth[B, WᵀA], each layer by itself, are the U_{l,1} and V_{l,1} of the theorem."""
    net = network("identity")
    bases = invariant_bases(DeepLinear(net.weights), -TARGET, RANK)
    small = CompressedNetwork(net, TARGET, RANK)
    for l in range(3):  # noqa: E741
        assert torch.allclose(projector(small.left[l].detach()), projector(bases.left[l][:, :4]), rtol=0, atol=1e-9)
        assert torch.allclose(projector(small.right[l].detach()), projector(bases.right[l][:, :4]), rtol=0, atol=1e-9)


def test_a_linear_network_is_followed_up_to_what_rho_moves():
    """‖f − f_C‖² = (d − 2r)(∏ρ(t) − ∏ε)² at every iterate: W_l(0) stays beside the block, only ρ's change is missing."""
    scales, lr, steps = [0.4, 0.5, 0.45], 0.1, 150
    generator = torch.Generator().manual_seed(10**9)
    deep = DeepLinear.orthogonal(D, 3, scales, generator=generator, dtype=F64)
    run = trajectory_gap(DeepNetwork(deep.weights, "identity"), TARGET, RANK, lr=lr, steps=steps)
    rho = rho_trajectory(scales, lr, 0.0, steps)
    expected = math.sqrt(D - 2 * RANK) * (rho.prod(1) - math.prod(scales)).abs() / float(TARGET.norm())
    assert torch.allclose(run.gap, expected, rtol=0, atol=1e-11)
    assert float(run.full_loss[-1]) < 0.3
    assert float(expected[-1]) > 0.05


@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_smooth_activations_at_a_small_scale_are_followed_and_random_frames_are_not(activation):
    net = network(activation, 0.2)
    target = 0.3 * TARGET
    kind = {"lr": 0.4, "steps": 1200 if activation == "gelu" else 400}
    ours = trajectory_gap(net, target, RANK, **kind)
    random = trajectory_gap(net, target, RANK, subspaces="random", generator=torch.Generator().manual_seed(1), **kind)
    assert float(ours.full_loss[-1]) < 0.2
    assert ours.largest < 0.1
    assert random.largest > 5 * ours.largest
    assert min(ours.captured) > 0.9 > 0.5 > max(random.captured)


def test_relu_is_not_followed_with_fixed_frames():
    """The open end: half of the mask's energy lies outside any 2r directions, and the compressed run parts from the full."""
    net = network("relu", 0.4)
    run = trajectory_gap(net, TARGET, RANK, lr=0.1, steps=500)
    assert float(run.full_loss[-1]) < 0.3
    assert run.largest > 0.2
    assert min(run.captured) < 0.9


def test_gamma_moves_the_frames_and_the_network_given_is_left_alone():
    net = network("tanh", 0.3)
    before = [w.detach().clone() for w in net.weights]
    fixed = trajectory_gap(net, TARGET, 1, lr=0.1, steps=150)
    moving = trajectory_gap(net, TARGET, 1, lr=0.1, steps=150, outer_lr_ratio=0.5)
    assert float((fixed.compressed_loss[-1] - moving.compressed_loss[-1]).abs()) > 1e-4
    assert torch.equal(fixed.full_loss, moving.full_loss)
    assert all(torch.equal(a, b) for a, b in zip(before, net.weights, strict=True))
    assert torch.equal(fixed.gap[:1], torch.zeros(1, dtype=F64))


def test_slowdown_counts_iterations_to_a_loss():
    run = trajectory_gap(network("identity"), TARGET, RANK, lr=0.1, steps=150)
    reached = int((run.full_loss <= 0.5).nonzero()[0, 0])
    there = int((run.compressed_loss <= 0.5).nonzero()[0, 0])
    assert run.slowdown(0.5) == there / reached
    assert math.isnan(run.slowdown(1e-12))


def test_what_does_not_fit_is_refused(unchecked_shapes):
    net = network("relu")
    with pytest.raises(ValueError, match="26 columns do not fit"):
        CompressedNetwork(net, TARGET, 13)
    with pytest.raises(ValueError, match="unknown subspaces"):
        CompressedNetwork(net, TARGET, 2, subspaces="best")
    with pytest.raises(ValueError, match=r"diverged after .* lower lr from 500"):
        trajectory_gap(net, TARGET, 2, lr=500.0, steps=200)
