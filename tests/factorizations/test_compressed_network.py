"""Networks that train in frames: descent beside a closed form and a torch optimizer, and the frames that one look ahead gives."""

import pytest
import torch

from rankwise.factorizations import CompressedNetwork, DeepLinear, DeepNetwork, invariant_bases, trajectory_gap
from rankwise.factorizations.compressed_network import (
    NetworkInFrames,
    captured_share,
    descent_outputs,
    gradient_frames,
)
from rankwise.factorizations.nonlinear import ACTIVATIONS
from rankwise.spectral import haar_frame
from tests.spectral.planted import planted, projector

F64 = torch.float64
D, RANK = 24, 2
TARGET = planted(D, D, [1.0, 0.7], seed=3).matrix


def network(activation, init_scale=0.4, width=D, seed=0):
    generator = torch.Generator().manual_seed(10**9 + seed)
    return DeepNetwork(DeepLinear.orthogonal(width, 3, init_scale, generator=generator, dtype=F64).weights, activation)


def drawn_frames(net, left, right, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(
            haar_frame(side, width, generator=generator, dtype=F64)
            for side, width in zip(weight.shape, (left, right), strict=True)
        )
        for weight in net.weights
    ]


def test_one_linear_factor_descends_as_its_closed_form():
    """f(t) − Φ = (1 − η)^t (f(0) − Φ)."""
    start = planted(5, 5, [2.0, 1.0], seed=1).matrix
    target = planted(5, 5, [1.5], seed=2).matrix
    path = list(descent_outputs(DeepNetwork([start], "tanh"), target, lr=0.3, steps=7))
    assert len(path) == 8
    for t, f in enumerate(path):
        assert torch.allclose(f, target + 0.7**t * (start - target), rtol=0, atol=1e-14)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_whole_frames_the_network_is_the_network(activation):
    """Rotations on either side of M change nothing under gradient descent."""
    net = network(activation)
    whole = NetworkInFrames(net, drawn_frames(net, D, D))
    free = descent_outputs(DeepNetwork(net.weights, activation), TARGET, lr=0.1, steps=60)
    framed = descent_outputs(whole, TARGET, lr=0.1, steps=60)
    for f, f_C in zip(free, framed, strict=True):
        assert torch.allclose(f, f_C, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_descent_in_frames_is_sgd_with_two_rates(gamma):
    net, lr, steps = network("gelu"), 0.2, 12
    X = torch.randn(D, 9, dtype=F64, generator=torch.Generator().manual_seed(1))
    target = TARGET @ X
    ours, theirs = (NetworkInFrames(net, drawn_frames(net, 5, 3)) for _ in range(2))
    *_, last = descent_outputs(ours, target, lr=lr, steps=steps, outer_lr_ratio=gamma, inputs=X)
    sgd = torch.optim.SGD(
        [
            {"params": list(theirs.inner), "lr": lr},
            {"params": [*theirs.left, *theirs.right], "lr": lr * gamma},
        ]
    )
    for _ in range(steps):
        sgd.zero_grad()
        (0.5 * (theirs(X) - target).square().sum()).backward()
        sgd.step()
    assert torch.allclose(last, theirs(X), rtol=0, atol=1e-12)
    moved = max(float((a.detach() - b[0]).norm()) for a, b in zip(ours.left, drawn_frames(net, 5, 3), strict=True))
    assert (moved > 1e-4) == (gamma > 0)


def test_a_gap_counts_from_the_same_descents():
    net = network("relu")
    run = trajectory_gap(net, TARGET, RANK, lr=0.1, steps=40)
    full = DeepNetwork(net.weights, "relu")
    outputs = list(descent_outputs(full, TARGET, lr=0.1, steps=40))
    small = CompressedNetwork(net, TARGET, RANK)
    frames = [
        (left.detach().clone(), right.detach().clone()) for left, right in zip(small.left, small.right, strict=True)
    ]
    for t, (f, f_C) in enumerate(zip(outputs, descent_outputs(small, TARGET, lr=0.1, steps=40), strict=True)):
        assert float(run.gap[t]) == pytest.approx(float((f - f_C).norm() / TARGET.norm()), abs=1e-14)
    for share, (left, right), end, start in zip(run.captured, frames, full.weights, net.weights, strict=True):
        D_ = (end - start).detach()
        kept = projector(left) @ D_ @ projector(right)
        assert share == pytest.approx(float(kept.square().sum() / D_.square().sum()), rel=1e-10)


def test_shares_of_complementary_frames_sum_to_one():
    movement = torch.randn(6, 4, dtype=F64, generator=torch.Generator().manual_seed(2))
    left, right = haar_frame(6, 6, dtype=F64), haar_frame(4, 4, dtype=F64)
    lefts, rights = (left[:, :2], left[:, 2:]), (right[:, :1], right[:, 1:])
    shares = [captured_share((a, b), movement) for a in lefts for b in rights]
    assert sum(shares) == pytest.approx(1, abs=1e-13)
    assert min(shares) > 0


def test_looking_ahead_finds_theorem_2_1_s_block_in_the_linear_case():
    net = network("identity")
    bases = invariant_bases(DeepLinear(net.weights), -TARGET, RANK)
    ahead = CompressedNetwork(net, TARGET, RANK, subspaces="lookahead")
    for layer in range(3):
        for frames, blocks in ((ahead.left, bases.left), (ahead.right, bases.right)):
            block = projector(blocks[layer][:, : 2 * RANK])
            assert torch.allclose(projector(frames[layer].detach()), block, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_relu_looking_ahead_holds_more_of_the_movement_and_is_faster(seed):
    net = network("relu", 0.15, width=48, seed=seed)
    target = planted(48, 48, [1.0, 0.8], seed=7 + seed).matrix
    runs = [
        trajectory_gap(net, target, RANK, lr=0.25, steps=300, subspaces=subspaces)
        for subspaces in ("gradient", "lookahead")
    ]
    gradient, ahead = runs
    assert ahead.captured[1] > gradient.captured[1] + 0.1
    assert ahead.slowdown(0.5) < gradient.slowdown(0.5)


def test_a_layer_without_a_gradient_has_frames_too():
    """W_1 = −I sends everything to zero: no gradient anywhere, now or one step on."""
    dead = DeepNetwork([-torch.eye(6, dtype=F64), torch.eye(6, dtype=F64)], "relu")
    small = CompressedNetwork(dead, torch.ones(6, 6, dtype=F64), 1, subspaces="lookahead")
    for frame in (*small.left, *small.right):
        assert torch.allclose(frame.mT @ frame, torch.eye(2, dtype=F64), atol=1e-12)


def test_gradient_frames_hold_the_gradient_and_where_the_layer_takes_it():
    W = haar_frame(D, D, scale=0.3, generator=torch.Generator().manual_seed(4), dtype=F64)
    gradient = planted(D, D, [3.0, 2.0], seed=9).matrix
    left, right = gradient_frames(W, gradient, 2)
    assert captured_share((left, right), gradient) == pytest.approx(1, abs=1e-12)
    assert captured_share((left, torch.eye(D, dtype=F64)), W @ gradient.mT) == pytest.approx(1, abs=1e-12)
    assert captured_share((torch.eye(D, dtype=F64), right), gradient.mT @ W) == pytest.approx(1, abs=1e-12)


def test_frames_that_do_not_fit_are_refused(unchecked_shapes):
    net = network("relu")
    frames = drawn_frames(net, 3, 3)
    with pytest.raises(ValueError, match="one pair of frames for each of 3 factors, got 2"):
        NetworkInFrames(net, frames[:2])
    with pytest.raises(ValueError, match=r"frames of 23 and 24 rows do not fit a factor of \(24, 24\)"):
        NetworkInFrames(net, [(frames[0][0][1:], frames[0][1]), *frames[1:]])
