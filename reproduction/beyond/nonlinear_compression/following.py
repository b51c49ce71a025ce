"""A network's descent, and how closely another one, from the same start, follows it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankwise.factorizations import CompressedNetwork, DeepNetwork, network_gradients
from rankwise.factorizations.compressed_network import (
    Frames,
    NetworkInFrames,
    captured_share,
    descent_outputs,
    gradient_frames,
)
from rankwise.spectral import truncated_svd
from reproduction.beyond.nonlinear_compression.problems import Problem
from reproduction.trajectories import Path

# of ‖Φ‖: how finely paths are kept for their distance
_PATH_STEP = 0.01
# of ‖Φ‖²: the loss at f = 0 is 1, and a descent that is stable never exceeds it by much
_DIVERGED = 10.0


@dataclass(frozen=True)
class FullDescent:
    """Every factor trained, until the loss is a given share of ‖Φ‖².

    Attributes:
        problem: what is learned.
        stop_at_loss: that share.
        patience: how many times T steps others get.
        outputs: f(X) at the T + 1 iterates.
        movement: W_l(T) − W_l(0).
        end: the network at T.
    """

    problem: Problem
    stop_at_loss: float
    patience: int
    outputs: list[Tensor]
    movement: list[Tensor]
    end: DeepNetwork

    @classmethod
    def run(cls, problem: Problem, stop_at_loss: float, patience: int, max_iter: int) -> "FullDescent":
        network = DeepNetwork(problem.start.weights, problem.start.activation)
        outputs = []
        for f in _descent(problem, network, max_iter):
            outputs.append(f)
            if _loss(problem, f) <= stop_at_loss:
                break
        else:
            raise ValueError(f"a loss of {stop_at_loss:g} is not reached in {max_iter:,} steps")
        movement = [(end - start).detach() for end, start in zip(network.weights, problem.start.weights, strict=True)]
        return cls(problem, stop_at_loss, patience, outputs, movement, network)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.outputs) - 1

    @property
    def limit(self) -> int:
        """Steps after which another descent is given up."""
        return self.patience * self.steps

    def prolonged(self, steps: int) -> Iterator[Tensor]:
        """f(X) at the iterates up to ``steps``, the last one repeated from T on."""
        for step in range(steps + 1):
            yield self.outputs[min(step, self.steps)]

    def at(self, share: float) -> DeepNetwork:
        """The network after this share of the T steps, trained again up to there."""
        network = DeepNetwork(self.problem.start.weights, self.problem.start.activation)
        for _ in _descent(self.problem, network, round(share * self.steps)):
            pass
        return network

    def nonlinearity(self) -> float:
        """‖σ(H) − cH‖/‖σ(H)‖ at the best c: how far σ is from a multiple of what it acts on; the largest over layers and the way.

        1/√2 for ReLU on a symmetric H; 0 where σ is linear at the scale of H.
        """
        stations = (self.problem.start, *(self.at(share) for share in (0.25, 0.5, 0.75)), self.end)
        return max(share for network in stations for share in _nonlinearities(self.problem, network))

    def followed_by(self, outputs: Iterable[Tensor], slowdown_at: float) -> dict[str, float]:
        """How far another descent is from this one.

        Args:
            outputs: its f(X), ``limit`` + 1 of them; no more are asked for once it has got as far as this one after T steps, or diverges.
            slowdown_at: the loss to which iterations are counted.

        Returns:
            ``gap``: the largest ‖f(t) − f_C(t)‖/‖Φ‖ up to T; ``path_gap``: the largest distance of an f(t) to the nearest f_C(t') at
            whatever t', in the same unit and to within 2 %; ``slowdown``: iterations to the loss over those of this one, and if it
            does not get there the ratio at which it was given up; ``arrived``: 1 if it does, else 0; ``loss_at_T`` and ``loss_at_end``.
        """
        problem, unit = self.problem, float(self.problem.target.norm())
        losses, gap = [], 0.0
        path = Path(_PATH_STEP, floor=unit)
        for t, f_C in enumerate(outputs):
            losses.append(_loss(problem, f_C))
            if not losses[-1] < _DIVERGED:
                break
            if t <= self.steps:
                gap = max(gap, float((self.outputs[t] - f_C).norm()) / unit)
            path.add(f_C.numpy())
            if t >= self.steps and losses[-1] <= self.stop_at_loss:
                break
        own_path = Path(_PATH_STEP, floor=unit)
        for f in self.outputs:
            own_path.add(f.numpy())
        own_time = _first_below(slowdown_at, [_loss(problem, f) for f in self.outputs])
        time = _first_below(slowdown_at, losses)
        if own_time is None:
            raise ValueError(f"the full network stopped at {self.stop_at_loss:g}, above the loss {slowdown_at:g}")
        return {
            "gap": gap,
            "path_gap": _furthest_from(path.points, own_path.points) / unit,
            "slowdown": (self.limit if time is None else time) / own_time,
            "arrived": float(time is not None),
            "loss_at_T": min(losses[min(self.steps, len(losses) - 1)], _DIVERGED),
            "loss_at_end": min(losses[-1], _DIVERGED),
        }


def compressed(
    full: FullDescent, frames: list[Frames], outer_lr_ratio: float = 0.0
) -> tuple[Iterator[Tensor], dict[str, float]]:
    """A descent in frames, and the share of the full network's movement in each layer's."""
    captured = {
        str(layer): captured_share(pair, moved)
        for layer, (pair, moved) in enumerate(zip(frames, full.movement, strict=True), start=1)
    }
    small = NetworkInFrames(full.problem.start, frames)
    return _descent(full.problem, small, full.limit, outer_lr_ratio), captured


def first_frames(problem: Problem, subspaces: Any, rank: int, seed: int) -> list[Frames]:
    """The library's, from the start alone."""
    small = CompressedNetwork(
        problem.start,
        problem.target,
        rank,
        inputs=problem.inputs,
        subspaces=subspaces,
        generator=torch.Generator().manual_seed(seed),
    )
    return [(left.detach(), right.detach()) for left, right in zip(small.left, small.right, strict=True)]


def later_frames(full: FullDescent, share: float, rank: int) -> list[Frames]:
    """As the first gradient's, from the gradient that the full network has after a share of its steps."""
    problem = full.problem
    gradients = network_gradients(full.at(share), problem.target, problem.inputs)
    return [gradient_frames(W.detach(), G, rank) for W, G in zip(problem.start.weights, gradients, strict=True)]


def movement_frames(full: FullDescent, share: float, rank: int) -> list[Frames]:
    """The 2k leading directions of the sum of all gradients up to a share of the steps; of them all, the best frames there are."""
    moved = [
        (now - start).detach() for now, start in zip(full.at(share).weights, full.problem.start.weights, strict=True)
    ]
    triplets = [truncated_svd(D, 2 * rank, estimate_error=False) for D in moved]
    return [(svd.U, svd.Vh.mT.contiguous()) for svd in triplets]


def first_layer_whole(full: FullDescent, rank: int, seed: int) -> list[Frames]:
    """Frames of the first gradient, but for the first factor, which trains in full."""
    rows, columns = full.problem.start.weights[0].shape
    whole = (torch.eye(rows, dtype=torch.float64), torch.eye(columns, dtype=torch.float64))
    return [whole, *first_frames(full.problem, "gradient", rank, seed)[1:]]


def late_start(full: FullDescent, share: float, rank: int) -> Iterator[Tensor]:
    """Full width for a share of the steps, then compressed to the frames of the gradient there."""
    before = round(share * full.steps)
    yield from full.outputs[:before]
    yield from _compressed_from(full.problem, full.at(share), rank, full.limit - before)[1]


def renewed(full: FullDescent, times: int, rank: int) -> Iterator[Tensor]:
    """Frames chosen anew, and what was learned put into the factors, so many times in T steps."""
    network, left = full.problem.start, full.limit
    every = max(1, full.steps // times)
    while left > 0:
        small, outputs = _compressed_from(full.problem, network, rank, min(every, left))
        # the last output of a stretch is the first of the next
        yield from islice(outputs, min(every, left))
        last = next(outputs)
        network, left = DeepNetwork([W.detach() for W in small.weights()], network.activation), left - every
    yield last


def _compressed_from(
    problem: Problem, network: DeepNetwork, rank: int, steps: int
) -> tuple[CompressedNetwork, Iterator[Tensor]]:
    small = CompressedNetwork(network, problem.target, rank, inputs=problem.inputs)
    return small, _descent(problem, small, steps)


def _descent(
    problem: Problem, model: DeepNetwork | NetworkInFrames, steps: int, outer_lr_ratio: float = 0.0
) -> Iterator[Tensor]:
    return descent_outputs(
        model, problem.target, lr=problem.lr, steps=steps, outer_lr_ratio=outer_lr_ratio, inputs=problem.inputs
    )


def _loss(problem: Problem, f: Tensor) -> float:
    return float((f - problem.target).square().sum() / problem.target.square().sum())


def _furthest_from(path: list[NDArray[np.float64]], others: list[NDArray[np.float64]]) -> float:
    """The largest distance of one of the others to the nearest point of a path."""
    there, here = (np.stack([f.ravel() for f in points]) for points in (path, others))
    # by products: all differences at once would be gigabytes, and eight digits are more than enough
    squares = (here**2).sum(1)[:, None] + (there**2).sum(1) - 2 * here @ there.T
    return float(np.sqrt(squares.min(1).clip(min=0).max()))


def _first_below(loss: float, losses: list[float]) -> int | None:
    return next((t for t, value in enumerate(losses) if value <= loss), None)


def _nonlinearities(problem: Problem, network: DeepNetwork) -> Iterator[float]:
    sigma: Callable[[Tensor], Tensor] = network.activation
    weights = [weight.detach() for weight in network.weights]
    hidden = weights[0] @ problem.inputs
    for weight in weights[1:]:
        out = sigma(hidden)
        multiple = (out * hidden).sum() / hidden.square().sum()
        yield float((out - multiple * hidden).norm() / out.norm())
        hidden = weight @ out
