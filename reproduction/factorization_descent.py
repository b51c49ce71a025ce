"""Gradient descent on ½‖W_L ⋯ W_1 − Φ‖² beside what Theorem 2.1 and Proposition 2.2 say about it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankwise.factorizations import (
    CompressedDeepLinear,
    DeepLinear,
    SquaredLoss,
    fit_factorization,
    invariant_bases,
    rho_trajectory,
    trajectory_error,
)
from reproduction.planted import low_rank_target
from reproduction.svd_evolution import WeightRecorder, block_errors, gaps


@dataclass(frozen=True)
class FactorizationDescent:
    """A descent at full width, its own compression from the same start, and how far both are from the theory.

    Attributes:
        recorder: the full-width factors at recorded times.
        rho: ρ_l(t) of the recursion at every iteration, (T + 1, L).
        blocks: leakage and ρ error at the recorded times, largest over the factors.
        gaps: ‖f − f_C‖_F at the recorded times.
        exact_gaps: √((d − 2r)∏ρ_l²) there.
    """

    recorder: WeightRecorder
    rho: Tensor
    blocks: dict[str, list[float]]
    gaps: list[float]
    exact_gaps: list[float]

    @classmethod
    def run(cls, settings: dict[str, Any], seed: int) -> "FactorizationDescent":
        """Settings: size, rank, depth, init_scale, learning_rate, steps, and weight_decay and momentum where not 0."""
        size, rank, depth = settings["size"], settings["rank"], settings["depth"]
        eta, steps, scales = settings["learning_rate"], settings["steps"], [settings["init_scale"]] * depth
        decay, momentum = settings.get("weight_decay", 0.0), settings.get("momentum", 0.0)
        target = low_rank_target(size, rank, seed)
        loss = SquaredLoss(target)
        generator = torch.Generator().manual_seed(seed)
        deep = DeepLinear.orthogonal(size, depth, scales, generator=generator, dtype=torch.float64)
        bases = invariant_bases(deep, -target, rank)
        narrow = CompressedDeepLinear.from_full_width(deep, -target, rank)
        recorder, compressed = WeightRecorder(steps), WeightRecorder(steps)
        for model, callback in ((deep, recorder), (narrow, compressed)):
            fit_factorization(
                model, loss, lr=eta, weight_decay=decay, momentum=momentum, steps=steps, tol=0.0, callbacks=[callback]
            )
        rho = rho_trajectory(scales, eta, decay, steps, momentum=momentum)
        exact = trajectory_error(rho, size, rank).sqrt()
        return cls(
            recorder,
            rho,
            block_errors(recorder, bases, rho),
            gaps(recorder, compressed),
            [float(exact[at]) for at in recorder.iterations],
        )

    def summary(self) -> dict[str, Any]:
        """The numbers of the figures' tables; gaps in units of ‖f(T)‖_F."""
        return {
            "rho_at_end": float(self.rho[self.recorder.iterations[-1], 0]),
            "leakage": max(self.blocks["leakage"]),
            "rho_error": max(self.blocks["rho_error"]),
            "gap_at_start": self.gaps[0],
            "gap_at_end": self.gaps[-1],
            "largest_deviation_of_gap_from_exact": max(
                abs(gap - exact) for gap, exact in zip(self.gaps, self.exact_gaps, strict=True)
            ),
            "loss_at_start": self.recorder.losses[0],
            "loss_at_end": self.recorder.losses[-1],
        }
