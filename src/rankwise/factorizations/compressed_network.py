"""A nonlinear network trained inside small subspaces of its factors, and how far it then is from the whole.

Beyond the paper, which leaves this open (ICML 2024, §5). An activation acts on coordinates, so unlike the linear product
the network cannot be narrowed: what is compressed is what *trains*, not what is multiplied.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.factorizations.nonlinear import (
    DeepNetwork,
    identity_inputs,
    network_gradients,
    network_output,
)
from rankwise.spectral import haar_frame, truncated_svd
from rankwise.spectral.orthogonal import residual_frame

Subspaces = Literal["gradient", "lookahead", "random"]
Frames = tuple[Tensor, Tensor]


class NetworkInFrames(nn.Module):
    """W_l = W_l(0) + U_l M_l V_lᵀ with M_l trained from zero in frames that are given.

    Args:
        network: the start; its factors are kept as they are and not trained.
        frames: (U_l, V_l) for every factor, first applied first: (m, a) and (n, b) for W_l of (m, n), with orthonormal columns. M_l
            is then (a, b), and two identities train a factor whole.

    Raises:
        ValueError: another number of frames than factors, or a frame of another height than its factor.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import DeepNetwork
        >>> from rankwise.factorizations.compressed_network import NetworkInFrames
        >>> net = DeepNetwork([torch.eye(3), torch.eye(3)], "relu")
        >>> whole_and_one_direction = [(torch.eye(3), torch.eye(3)), (torch.eye(3)[:, :1], torch.eye(3)[:, :1])]
        >>> [tuple(inner.shape) for inner in NetworkInFrames(net, whole_and_one_direction).inner]
        [(3, 3), (1, 1)]
    """

    def __init__(self, network: DeepNetwork, frames: Sequence[Frames]):
        super().__init__()
        start = [weight.detach().clone() for weight in network.weights]
        if len(frames) != len(start):
            raise ValueError(f"expected one pair of frames for each of {len(start)} factors, got {len(frames)}")
        for weight, (left, right) in zip(start, frames, strict=True):
            if (left.shape[0], right.shape[0]) != tuple(weight.shape):
                raise ValueError(
                    f"frames of {left.shape[0]} and {right.shape[0]} rows do not fit a factor of {tuple(weight.shape)}; "
                    "the left one has as many rows as the factor, the right one as many as it has columns"
                )
        self.left = nn.ParameterList([nn.Parameter(left.detach().clone()) for left, _ in frames])
        self.right = nn.ParameterList([nn.Parameter(right.detach().clone()) for _, right in frames])
        self.inner = nn.ParameterList(
            [
                nn.Parameter(torch.zeros(left.shape[1], right.shape[1]).to(weight))
                for weight, (left, right) in zip(start, frames, strict=True)
            ]
        )
        self.start = nn.ParameterList([nn.Parameter(weight, requires_grad=False) for weight in start])
        self.activation = network.activation

    def weights(self) -> list[Float[Tensor, "_ _"]]:
        """W_l(0) + U_l M_l V_lᵀ, dense."""
        return [
            start + left @ inner @ right.mT
            for start, left, inner, right in zip(self.start, self.left, self.inner, self.right, strict=True)
        ]

    def forward(self, X: Float[Tensor, "n N"]) -> Float[Tensor, "m N"]:
        """Samples are columns, as in :class:`DeepNetwork`."""
        return network_output(self.weights(), self.activation, X)


class CompressedNetwork(NetworkInFrames):
    """W_l = W_l(0) + U_l M_l V_lᵀ with M_l, (2k, 2k), trained from zero in frames that the first gradient suggests.

    From ∇_{W_l} ≈ A_l S B_lᵀ, its k leading triplets, and each layer by itself,

        U_l = orth[A_l, W_l(0)B_l],     V_l = orth[B_l, W_l(0)ᵀA_l].

    For a linear network with orthogonal start this is the block of Theorem 2.1: U_l and V_l span what it trains there, and
    since W_l(0) stays beside it the error is only what ρ_l moves, (d − 2r)(∏ρ_l(t) − ∏ε_l)².

    With ReLU the network does not turn its directions as W_l(0) does. "lookahead" asks the network itself, for one gradient
    more: A'_l and B'_l lead the gradient at W_l(0) − (‖W_l(0)‖₂/‖∇_{W_l}‖₂)∇_{W_l}, one step down that is as long as the start, and

        U_l = orth[A_l, A'_l],     V_l = orth[B_l, B'_l],

    which for the linear network of square factors spans the same block.

    Args:
        network: the start; its factors are kept as they are and not trained.
        target: Φ of ½‖f(X) − Φ‖².
        rank: k.
        inputs: X; the identity unless given.
        subspaces: "gradient" or "lookahead" as above, or "random" frames of the same width, which any use of the gradient has to
            beat. :class:`NetworkInFrames` takes frames from elsewhere.
        generator: of the sketch and the random frames.

    Raises:
        ValueError: frames wider than a factor.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import CompressedNetwork, DeepLinear, DeepNetwork
        >>> net = DeepNetwork(DeepLinear.orthogonal(8, 3, 0.1, generator=torch.Generator().manual_seed(0)).weights, "tanh")
        >>> small = CompressedNetwork(net, torch.eye(8), rank=2)
        >>> bool(torch.equal(small(torch.eye(8)), net(torch.eye(8)))), small.inner[0].shape
        (True, torch.Size([4, 4]))
    """

    def __init__(
        self,
        network: DeepNetwork,
        target: Float[Tensor, "m N"],
        rank: int,
        *,
        inputs: Float[Tensor, "n N"] | None = None,
        subspaces: Subspaces = "gradient",
        generator: torch.Generator | None = None,
    ):
        smallest = min(min(weight.shape) for weight in network.weights)
        if not 2 <= 2 * rank <= smallest:
            raise ValueError(
                f"frames of 2·rank = {2 * rank} columns do not fit factors whose smallest side is {smallest}"
            )
        if subspaces not in _FRAMES:
            raise ValueError(f"unknown subspaces {subspaces!r}: expected {', '.join(_FRAMES)}")
        super().__init__(network, _FRAMES[subspaces](network, target, inputs, rank, generator))


def gradient_frames(
    weight: Float[Tensor, "m n"],
    gradient: Float[Tensor, "m n"],
    rank: int,
    *,
    generator: torch.Generator | None = None,
) -> Frames:
    """U = orth[A, W B] and V = orth[B, WᵀA] of a layer from the k leading triplets A S Bᵀ of its gradient.

    Args:
        weight: W.
        gradient: of the loss by W, at the start or later.
        rank: k, at most half of W's smaller side.
        generator: of the sketch.

    Returns:
        (m, 2k) and (n, 2k), orthonormal columns.

    Example:
        >>> import torch
        >>> from rankwise.factorizations.compressed_network import gradient_frames
        >>> left, right = gradient_frames(torch.eye(4).roll(1, 0), torch.diag(torch.tensor([1.0, 0, 0, 0])), rank=1)
        >>> left.abs().argmax(0).tolist(), right.abs().argmax(0).tolist()
        ([0, 1], [0, 3])
    """
    A, B = _leading(gradient, rank, generator)
    left = torch.cat([A, residual_frame(A, weight @ B)], dim=1)
    right = torch.cat([B, residual_frame(B, weight.mT @ A)], dim=1)
    return left.contiguous(), right.contiguous()


@dataclass(frozen=True)
class TrajectoryGap:
    """How far the compressed network follows the full one.

    Attributes:
        gap: ‖f(t) − f_C(t)‖_F/‖Φ‖_F at every iterate, (T + 1,).
        full_loss: ‖f(t) − Φ‖²/‖Φ‖², (T + 1,).
        compressed_loss: the same for f_C.
        captured: for each layer, ‖U_lᵀ(W_l(T) − W_l(0))V_l‖²/‖W_l(T) − W_l(0)‖² of the full network: the share of its
            movement that lies in the frames chosen at the start.
    """

    gap: Float[Tensor, " t"]
    full_loss: Float[Tensor, " t"]
    compressed_loss: Float[Tensor, " t"]
    captured: list[float]

    @property
    def largest(self) -> float:
        """The largest gap on the way."""
        return float(self.gap.max())

    def slowdown(self, loss: float) -> float:
        """Iterations that the compressed network needs to reach ``loss`` over those of the full one; inf if it does not."""
        reached = [(losses <= loss).nonzero() for losses in (self.full_loss, self.compressed_loss)]
        if any(len(times) == 0 for times in reached):
            return math.nan if len(reached[0]) == 0 else math.inf
        return float(reached[1][0, 0]) / max(float(reached[0][0, 0]), 1.0)


def trajectory_gap(
    network: DeepNetwork,
    target: Float[Tensor, "m N"],
    rank: int,
    *,
    lr: float,
    steps: int,
    outer_lr_ratio: float = 0.0,
    inputs: Float[Tensor, "n N"] | None = None,
    subspaces: Subspaces = "gradient",
    generator: torch.Generator | None = None,
) -> TrajectoryGap:
    """Train a network and its compression side by side by gradient descent on ½‖f(X) − Φ‖²; ``network`` is not changed.

    Args:
        network: the start.
        target: Φ, not zero.
        rank: k.
        lr: η.
        steps: T.
        outer_lr_ratio: γ, rate of the frames over that of the inner factors; 0 keeps them.
        inputs: X; the identity unless given.
        subspaces: see :class:`CompressedNetwork`.
        generator: as there.

    Raises:
        ValueError: sizes that do not fit, or a step at which either loss leaves the finite numbers.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import DeepLinear, DeepNetwork, trajectory_gap
        >>> net = DeepNetwork(DeepLinear.orthogonal(8, 2, 0.1, generator=torch.Generator().manual_seed(0)).weights, "tanh")
        >>> run = trajectory_gap(net, torch.diag(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])), rank=1, lr=0.2, steps=60)
        >>> bool(run.largest < 0.01), bool(run.full_loss[-1] < 0.1)
        (True, True)
    """
    full = DeepNetwork(list(network.weights), network.activation)
    small = CompressedNetwork(network, target, rank, inputs=inputs, subspaces=subspaces, generator=generator)
    at_start = [
        (left.detach().clone(), right.detach().clone()) for left, right in zip(small.left, small.right, strict=True)
    ]
    unit = float(target.norm())
    gaps: list[float] = []
    full_losses: list[float] = []
    small_losses: list[float] = []
    both = zip(
        descent_outputs(full, target, lr=lr, steps=steps, inputs=inputs),
        descent_outputs(small, target, lr=lr, steps=steps, outer_lr_ratio=outer_lr_ratio, inputs=inputs),
        strict=True,
    )
    for step, (f, f_C) in enumerate(both):
        gaps.append(float((f - f_C).norm()) / unit)
        for losses, output in ((full_losses, f), (small_losses, f_C)):
            losses.append(float((output - target).square().sum()) / unit**2)
        if not math.isfinite(gaps[-1]):
            raise ValueError(f"descent diverged after {step} steps; lower lr from {lr:.3g}")
    captured = [
        captured_share(frames, (end - start).detach())
        for frames, end, start in zip(at_start, full.weights, small.start, strict=True)
    ]
    gap, full_loss, compressed_loss = (torch.tensor(v, dtype=torch.float64) for v in (gaps, full_losses, small_losses))
    return TrajectoryGap(gap, full_loss, compressed_loss, captured)


def descent_outputs(
    model: DeepNetwork | NetworkInFrames,
    target: Float[Tensor, "m N"],
    *,
    lr: float,
    steps: int,
    outer_lr_ratio: float = 0.0,
    inputs: Float[Tensor, "n N"] | None = None,
) -> Iterator[Float[Tensor, "m N"]]:
    """f(X) at the steps + 1 iterates of gradient descent on ½‖f(X) − Φ‖², which trains ``model`` in place as it is asked for them.

    Args:
        model: a network, or one in frames.
        target: Φ.
        lr: η.
        steps: updates.
        outer_lr_ratio: γ, rate of the frames over that of the inner factors; 0 keeps them. Of no meaning for a network without.
        inputs: X; the identity unless given.

    Yields:
        f(X), detached, before every update and after the last.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import DeepNetwork
        >>> from rankwise.factorizations.compressed_network import descent_outputs
        >>> path = descent_outputs(DeepNetwork([torch.ones(1, 1)], "relu"), torch.zeros(1, 1), lr=0.5, steps=2)
        >>> [f.item() for f in path]
        [1.0, 0.5, 0.25]
    """
    if isinstance(model, NetworkInFrames):
        X = torch.eye(model.start[0].shape[1]).to(model.start[0]) if inputs is None else inputs
        rates = [(inner, lr) for inner in model.inner]
        rates += [(frame, lr * outer_lr_ratio) for frame in (*model.left, *model.right) if outer_lr_ratio > 0]
    else:
        X = identity_inputs(model) if inputs is None else inputs
        rates = [(weight, lr) for weight in model.weights]
    for step in range(steps + 1):
        with torch.enable_grad():
            f = model(X)
            if step < steps:
                gradients = torch.autograd.grad(
                    0.5 * (f - target).square().sum(), [parameter for parameter, _ in rates]
                )
        yield f.detach()
        if step < steps:
            with torch.no_grad():
                for (parameter, rate), gradient in zip(rates, gradients, strict=True):
                    parameter.sub_(gradient, alpha=rate)


def captured_share(frames: Frames, movement: Float[Tensor, "m n"]) -> float:
    """‖UᵀDV‖²/‖D‖², the share of a movement D that lies in orthonormal frames; of a gradient likewise.

    Example:
        >>> import torch
        >>> from rankwise.factorizations.compressed_network import captured_share
        >>> captured_share((torch.eye(2)[:, :1], torch.eye(2)), torch.tensor([[3.0, 4.0], [0.0, 5.0]]))
        0.5
    """
    left, right = frames
    return float((left.mT @ movement @ right).square().sum() / movement.square().sum())


def _leading(matrix: Float[Tensor, "m n"], rank: int, generator: torch.Generator | None) -> Frames:
    svd = truncated_svd(matrix, rank, generator=generator, estimate_error=False)
    return svd.U.to(matrix.dtype), svd.Vh.mT.to(matrix.dtype)


def _first_gradients(
    network: DeepNetwork, target: Tensor, inputs: Tensor | None, rank: int, generator: torch.Generator | None
) -> list[Frames]:
    gradients = network_gradients(network, target, inputs)
    return [
        gradient_frames(W.detach(), G, rank, generator=generator)
        for W, G in zip(network.weights, gradients, strict=True)
    ]


def _lookahead(
    network: DeepNetwork, target: Tensor, inputs: Tensor | None, rank: int, generator: torch.Generator | None
) -> list[Frames]:
    gradients = network_gradients(network, target, inputs)
    ahead = [_step_as_long_as(W.detach(), G) for W, G in zip(network.weights, gradients, strict=True)]
    gradients_ahead = network_gradients(DeepNetwork(ahead, network.activation), target, inputs)
    frames: list[Frames] = []
    for here, there in zip(gradients, gradients_ahead, strict=True):
        A, B = _leading(here, rank, generator)
        A_ahead, B_ahead = _leading(there, rank, generator)
        left, right = (torch.cat([a, residual_frame(a, b)], dim=1) for a, b in ((A, A_ahead), (B, B_ahead)))
        frames.append((left.contiguous(), right.contiguous()))
    return frames


def _step_as_long_as(W: Float[Tensor, "m n"], G: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    length = torch.linalg.matrix_norm(G, 2)
    # a layer without a gradient, as behind dead units, stays where it is
    return W - torch.where(length > 0, torch.linalg.matrix_norm(W, 2) / length, 0.0) * G


def _random(
    network: DeepNetwork, target: Tensor, inputs: Tensor | None, rank: int, generator: torch.Generator | None
) -> list[Frames]:
    return [
        (
            haar_frame(W.shape[0], 2 * rank, generator=generator, dtype=W.dtype, device=W.device),
            haar_frame(W.shape[1], 2 * rank, generator=generator, dtype=W.dtype, device=W.device),
        )
        for W in network.weights
    ]


_FRAMES: dict[str, Callable[..., list[Frames]]] = {
    "gradient": _first_gradients,
    "lookahead": _lookahead,
    "random": _random,
}
