"""A nonlinear network trained inside small subspaces of its factors, and how far it then is from the whole.

Beyond the paper, which leaves this open (ICML 2024, §5). An activation acts on coordinates, so unlike the linear product
the network cannot be narrowed: what is compressed is what *trains*, not what is multiplied.
"""

import math
from collections.abc import Callable, Sequence
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

Subspaces = Literal["gradient", "random"]


class CompressedNetwork(nn.Module):
    """W_l = W_l(0) + U_l M_l V_lᵀ with M_l, (2k, 2k), trained from zero in frames that the first gradient suggests.

    From ∇_{W_l} ≈ A_l S B_lᵀ, its k leading triplets, and each layer by itself,

        U_l = orth[A_l, W_l(0)B_l],     V_l = orth[B_l, W_l(0)ᵀA_l].

    For a linear network with orthogonal start this is the block of Theorem 2.1: U_l and V_l span what it trains there, and
    since W_l(0) stays beside it the error is only what ρ_l moves, (d − 2r)(∏ρ_l(t) − ∏ε_l)².

    Args:
        network: the start; its factors are kept as they are and not trained.
        target: Φ of ½‖f(X) − Φ‖².
        rank: k.
        inputs: X; the identity unless given.
        subspaces: "gradient" as above, or "random" frames of the same width, which any use of the gradient has to beat.
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
        super().__init__()
        start = [weight.detach().clone() for weight in network.weights]
        smallest = min(min(weight.shape) for weight in start)
        if not 2 <= 2 * rank <= smallest:
            raise ValueError(
                f"frames of 2·rank = {2 * rank} columns do not fit factors whose smallest side is {smallest}"
            )
        if subspaces not in _FRAMES:
            raise ValueError(f"unknown subspaces {subspaces!r}: expected {' or '.join(_FRAMES)}")
        gradients = network_gradients(network, target, inputs)
        frames = [_FRAMES[subspaces](W, G, rank, generator) for W, G in zip(start, gradients, strict=True)]
        self.left = nn.ParameterList([nn.Parameter(left) for left, _ in frames])
        self.right = nn.ParameterList([nn.Parameter(right) for _, right in frames])
        self.inner = nn.ParameterList([nn.Parameter(torch.zeros(2 * rank, 2 * rank).to(weight)) for weight in start])
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
    X = identity_inputs(network) if inputs is None else inputs
    full = DeepNetwork(list(network.weights), network.activation)
    small = CompressedNetwork(network, target, rank, inputs=inputs, subspaces=subspaces, generator=generator)
    frames = [*small.left, *small.right]
    for frame in frames:
        frame.requires_grad_(outer_lr_ratio > 0)
    at_start = [
        (left.detach().clone(), right.detach().clone()) for left, right in zip(small.left, small.right, strict=True)
    ]
    full_rates = [(weight, lr) for weight in full.weights]
    small_rates = [(inner, lr) for inner in small.inner]
    small_rates += [(frame, lr * outer_lr_ratio) for frame in frames if outer_lr_ratio > 0]

    unit = float(target.norm())
    gaps: list[float] = []
    full_losses: list[float] = []
    small_losses: list[float] = []
    for step in range(steps + 1):
        f, f_C = full(X), small(X)
        gaps.append(float((f - f_C).detach().norm()) / unit)
        for losses, output in ((full_losses, f), (small_losses, f_C)):
            losses.append(float((output - target).detach().square().sum()) / unit**2)
        if not math.isfinite(gaps[-1]):
            raise ValueError(f"descent diverged after {step} steps; lower lr from {lr:.3g}")
        if step < steps:
            _descend(0.5 * (f - target).square().sum(), full_rates)
            _descend(0.5 * (f_C - target).square().sum(), small_rates)
    moved = [(end - start).detach() for end, start in zip(full.weights, small.start, strict=True)]
    captured = [
        float((left.mT @ step @ right).square().sum() / step.square().sum())
        for step, (left, right) in zip(moved, at_start, strict=True)
    ]
    gap, full_loss, compressed_loss = (torch.tensor(v, dtype=torch.float64) for v in (gaps, full_losses, small_losses))
    return TrajectoryGap(gap, full_loss, compressed_loss, captured)


def _descend(loss: Tensor, rates: Sequence[tuple[nn.Parameter, float]]) -> None:
    """One simultaneous step of gradient descent."""
    gradients = torch.autograd.grad(loss, [parameter for parameter, _ in rates])
    with torch.no_grad():
        for (parameter, rate), gradient in zip(rates, gradients, strict=True):
            parameter.sub_(gradient, alpha=rate)


def _gradient_frames(
    W: Float[Tensor, "m n"], G: Float[Tensor, "m n"], rank: int, generator: torch.Generator | None
) -> tuple[Float[Tensor, "m w"], Float[Tensor, "n w"]]:
    svd = truncated_svd(G, rank, generator=generator, estimate_error=False)
    A, B = svd.U.to(W.dtype), svd.Vh.mT.to(W.dtype)
    left = torch.cat([A, residual_frame(A, W @ B)], dim=1)
    right = torch.cat([B, residual_frame(B, W.mT @ A)], dim=1)
    return left.contiguous(), right.contiguous()


def _random_frames(
    W: Float[Tensor, "m n"], G: Float[Tensor, "m n"], rank: int, generator: torch.Generator | None
) -> tuple[Float[Tensor, "m w"], Float[Tensor, "n w"]]:
    left, right = (haar_frame(side, 2 * rank, generator=generator, dtype=W.dtype, device=W.device) for side in W.shape)
    return left, right


_FRAMES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"gradient": _gradient_frames, "random": _random_frames}
