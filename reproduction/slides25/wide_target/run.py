"""The 2025 slides: the SVD of W_1 in regression on wide or low-rank targets, and without white inputs."""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from rankwise.factorizations import (
    CompressedDeepLinear,
    DeepLinear,
    InvariantBases,
    RegressionLoss,
    compress_wide_target,
    fit_factorization,
    rho_trajectory,
    trajectory_error,
    whitened,
)
from reproduction.planted import low_rank_target
from reproduction.style import GREEN, PURPLE, figure_style
from reproduction.svd_evolution import WeightRecorder, block_errors, draw_evolution, followed, gaps, name_lines

TITLE = "evolution of the SVD of W₁ in regression: wide targets, low-rank ones, inputs that are not white"
_PAPER: dict[str, Any] = {
    "size": 30,
    "depth": 3,
    "init_scale": 1.0,
    "weight_decay": 0.05,
    "learning_rate": 5e-3,
    "steps": 400,
    "cases": {
        "wide": {"rows": 3, "rank": 3, "samples": 60, "white": True},
        "wide_low_rank": {"rows": 5, "rank": 2, "samples": 60, "white": True},
        "low_rank": {"rows": 30, "rank": 3, "samples": 60, "white": True},
        "not_white": {"rows": 3, "rank": 3, "samples": 60, "white": False},
        "less_white": {"rows": 3, "rank": 3, "samples": 600, "white": False},
        "nearly_white": {"rows": 3, "rank": 3, "samples": 60_000, "white": False},
    },
}
_SMALL: dict[str, Any] = {
    **_PAPER,
    "size": 16,
    "steps": 200,
    "cases": {
        "wide": {"rows": 2, "rank": 2, "samples": 32, "white": True},
        "wide_low_rank": {"rows": 4, "rank": 2, "samples": 32, "white": True},
        "low_rank": {"rows": 16, "rank": 2, "samples": 32, "white": True},
        "not_white": {"rows": 2, "rank": 2, "samples": 32, "white": False},
        "nearly_white": {"rows": 2, "rank": 2, "samples": 3200, "white": False},
    },
}
SCALES = {"paper": _PAPER, "small": _SMALL}
COMMITTED = "paper"

_DRAWN = {
    "wide": "wide Y, k = {rows}",
    "low_rank": "square Y of rank {rank}",
    "not_white": "wide Y, k = {rows}, XXᵀ ≠ I",
}


def measure(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Each case by itself, from one seed."""
    results, curves = {}, {}
    for name, case in settings["cases"].items():
        results[name], curves[name] = _case(case, settings, seed)
        print(f"{name}: {results[name]}", flush=True)
    tangled = curves["not_white"]  # where all move, a third of the right ones shows it
    tangled["right_degrees"]["moving"] = tangled["right_degrees"]["moving"][::3]
    del tangled["left_degrees"]
    return {"results": results, "curves": {name: curves[name] for name in _DRAWN}}


def _case(case: dict[str, Any], settings: dict[str, Any], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    d, rows, rank = settings["size"], case["rows"], case["rank"]
    eta, decay, steps = settings["learning_rate"], settings["weight_decay"], settings["steps"]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(d, case["samples"], generator=generator, dtype=torch.float64)
    X = whitened(drawn) if case["white"] else drawn / case["samples"] ** 0.5  # white on average only
    # a k × d target's singular values are about √d + √k: to the scale of the square one, 2√d
    target = low_rank_target(d, rank, seed, rows) * (2 / (1 + (rows / d) ** 0.5))
    loss = RegressionLoss(X, target @ X)
    deep, compressed, bases, rho = _start(rows, rank, target @ X @ X.mT, settings, generator)

    full, narrow = WeightRecorder(steps), WeightRecorder(steps)
    for model, recorder in ((deep, full), (compressed, narrow)):
        fit_factorization(model, loss, lr=eta, weight_decay=decay, steps=steps, tol=0.0, callbacks=[recorder])
    evolution = followed(full.of_layer(1))
    blocks, apart = block_errors(full, bases, rho), gaps(full, narrow)
    exact = [0.0] * len(apart)
    if rows == d:
        law = trajectory_error(rho, d, rank).sqrt()
        exact = [float(law[at]) for at in full.iterations]
    still = evolution.sigma[-1][~evolution.moved()]
    length = float(full.products[-1].norm())
    results = evolution.summary() | {
        "invariant_width": bases.width,
        "rho_at_end": float(rho[-1, 0]),
        "spread_of_middle_at_end": float(np.ptp(np.sort(evolution.sigma[-1])[bases.width : d - bases.width])),
        "leakage": max(blocks["leakage"]),
        "rho_error": max(blocks["rho_error"]),
        "relative_gap_of_compression": max(apart) / length,
        "relative_deviation_of_gap_from_law": max(abs(a - b) for a, b in zip(apart, exact, strict=True)) / length,
        "condition_of_inputs": float(torch.linalg.cond(X)),
        "loss_at_start": full.losses[0],
        "loss_at_end": full.losses[-1],
        "compressed_loss_at_end": narrow.losses[-1],
    }
    return results, evolution.curves(full.iterations, 45 if still.size else 15)


def _start(
    rows: int, rank: int, target_on_inputs: Tensor, settings: dict[str, Any], generator: torch.Generator
) -> tuple[DeepLinear, CompressedDeepLinear, InvariantBases, Tensor]:
    """A full-width start with its compression, and the bases and ρ(t) of the factors that keep them.

    For a wide target the last factor is any matrix and has no ρ: W_1 … W_{L−1} do, ρ_l(t) = ε_l(1 − ηλ)^t.
    """
    d, depth, epsilon = settings["size"], settings["depth"], settings["init_scale"]
    eta, decay, steps = settings["learning_rate"], settings["weight_decay"], settings["steps"]
    deep = DeepLinear.orthogonal(d, depth, epsilon, generator=generator, dtype=torch.float64)
    if rows == d:
        compressed = CompressedDeepLinear.from_full_width(deep, -target_on_inputs, rank)
        layers, rho = depth, rho_trajectory([epsilon] * depth, eta, decay, steps)
    else:
        last = epsilon * torch.randn(rows, d, generator=generator, dtype=torch.float64) / d**0.5
        deep = DeepLinear([*(weight.detach() for weight in deep.weights[:-1]), last])
        compressed = compress_wide_target(deep, -target_on_inputs, rank)
        layers = depth - 1
        powers = (1 - eta * decay) ** torch.arange(steps + 1, dtype=torch.float64)
        rho = epsilon * powers[:, None].expand(-1, layers)
    block = compressed.right.detach()
    chain = [torch.cat([block, torch.linalg.qr(block, mode="complete").Q[:, block.shape[1] :]], dim=1)]
    for weight in deep.weights[:layers]:
        chain.append(weight.detach() @ chain[-1] / epsilon)
    return deep, compressed, InvariantBases(chain[1:], chain[:-1], block.shape[1]), rho


def draw(record: dict[str, Any]) -> Figure:
    """A row for wide Y and one for low-rank Y; then what inputs that are not white do, and how much."""
    settings, results, curves = record["settings"], record["results"], record["curves"]
    cases = settings["cases"]
    with figure_style():
        figure = Figure(figsize=(8.4, 5.6))
        rows = figure.subplots(3, 3)
        for panels, (name, title) in zip(rows, _DRAWN.items(), strict=True):
            if name == "not_white":
                draw_evolution(panels[:2], curves[name])
            else:
                draw_evolution(panels, curves[name])
            panels[0].set_title(title.format(**cases[name]))
            name_lines(panels[0], results[name]["moving"], results[name]["still"], "center right")
        for axes in np.ravel(rows[1:, 1:]):
            axes.set_title("")
        rows[2, 1].set_title("every third one")
        for axes in np.ravel(rows[:2]):
            axes.set_xlabel("")

        last = rows[2, 2]
        off = sorted((result["condition_of_inputs"] - 1, name) for name, result in results.items() if "white" in name)
        for key, colour, label in (
            ("leakage", GREEN, "leakage"),
            ("relative_gap_of_compression", PURPLE, "‖f − f_C‖/‖f‖, largest"),
        ):
            last.loglog([by for by, _ in off], [results[name][key] for _, name in off], "o-", color=colour, label=label)
        last.set(title="How much", xlabel="condition of X, less 1", ylim=(1e-3, 30))
        last.legend(loc="upper left")
        return figure
