"""Fig. 3 of the 2025 overview: the SVD of W_1 while a factorization trains, and what would make the rest of it vanish."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from reproduction.factorization_descent import FactorizationDescent
from reproduction.style import BLUE, GREEN, GREY, ORANGE, PURPLE, figure_style
from reproduction.svd_evolution import draw_evolution, followed, name_lines

TITLE = "evolution of the SVD of W₁, and what depth, a small start and weight decay do to the rest (Fig. 3)"
_PAPER: dict[str, Any] = {
    "size": 30,
    "rank": 3,
    "figure": {"depth": 3, "init_scale": 1.0, "learning_rate": 5e-3, "steps": 400},
    "claims": {
        "plain": {"init_scale": 1.0, "weight_decay": 0.0},
        "small_start": {"init_scale": 0.3, "weight_decay": 0.0},
        "weight_decay": {"init_scale": 1.0, "weight_decay": 0.1},
    },
    "depths": [2, 3, 4, 5],
    "learning_rate": 2e-3,
    "steps": 20_000,
}
_SMALL: dict[str, Any] = {
    **_PAPER,
    "size": 16,
    "rank": 2,
    "figure": {**_PAPER["figure"], "steps": 200},
    "depths": [2, 5],
    "claims": {**_PAPER["claims"], "weight_decay": {"init_scale": 1.0, "weight_decay": 0.4}},
    "learning_rate": 5e-3,
    "steps": 2500,
}
SCALES = {"paper": _PAPER, "small": _SMALL}
COMMITTED = "paper"

_COLOURS = {2: ORANGE, 3: BLUE, 4: PURPLE, 5: GREEN}


def measure(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """The figure; then ρ(t) at each depth without decay, from a small start, and with decay, against ε(1 − ηλ)^t."""
    problem = {"size": settings["size"], "rank": settings["rank"]}
    run = FactorizationDescent.run(problem | settings["figure"], seed)
    evolution = followed(run.recorder.of_layer(1))
    results: dict[str, Any] = {"figure": evolution.summary() | run.summary()}
    curves: dict[str, Any] = {"figure": evolution.curves(run.recorder.iterations, 45)}
    common = problem | {"learning_rate": settings["learning_rate"], "steps": settings["steps"]}
    for claim, how in settings["claims"].items():
        results[claim], curves[claim] = {}, {}
        for depth in settings["depths"]:
            descent = FactorizationDescent.run(common | how | {"depth": depth}, seed)
            results[claim][str(depth)], curves[claim][str(depth)] = _rest(descent, common | how | {"depth": depth})
            print(f"{claim}, depth {depth}: {results[claim][str(depth)]}", flush=True)
        for key in ("rho_over_start", "rho_over_approximation"):
            steps = np.diff([results[claim][str(depth)][key] for depth in settings["depths"]])
            results[claim][f"least_rise_with_depth_of_{key}"] = float(steps.min())
    return {"results": results, "curves": curves}


def _rest(descent: FactorizationDescent, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What becomes of the d − 2r singular values that do not train, as read from W_1, and of eq. 13's approximation."""
    evolution, iterations = followed(descent.recorder.of_layer(1)), descent.recorder.iterations
    moved = evolution.moved()
    rest = evolution.sigma[:, ~moved].mean(axis=1)
    epsilon, eta, decay = settings["init_scale"], settings["learning_rate"], settings["weight_decay"]
    approximation = epsilon * (1 - eta * decay) ** np.array(iterations)
    sigma = evolution.sigma[-1]
    results = {
        "moving": int(moved.sum()),
        "rho_over_start": float(rest[-1] / epsilon),
        "rho_over_largest": float(rest[-1] / sigma.max()),
        "rho_over_approximation": float(rest[-1] / approximation[-1]),
        "rho_over_flow": float(rest[-1] / _flow(epsilon, decay, settings["depth"], eta * iterations[-1])),
        "below_a_hundredth_of_largest": int((sigma < 0.01 * sigma.max()).sum()),
        "leakage": max(descent.blocks["leakage"]),
        "rho_error": max(descent.blocks["rho_error"]),
        "loss_at_end": descent.recorder.losses[-1],
    }
    kept = np.unique(np.linspace(0, len(iterations) - 1, 40).astype(int))
    return results, {
        "iteration": [iterations[at] for at in kept],
        "rho_over_start": [float(rest[at] / epsilon) for at in kept],
        "approximation": [float(approximation[at] / epsilon) for at in kept],
    }


def _flow(epsilon: float, decay: float, depth: int, time: float) -> float:
    """ρ of eq. 13 in the limit of small steps, ρ' = −λρ − ρ^(2L−1) from ε: a Bernoulli equation, whose solution is closed."""
    n = 2 * (depth - 1)
    grown = n * time if decay == 0 else np.expm1(n * decay * time) / decay
    return float((epsilon**-n * np.exp(n * decay * time) + grown) ** (-1 / n))


def draw(record: dict[str, Any]) -> Figure:
    """Above the overview's three panels; below ρ(t)/ε at each depth in the three cases that its text names."""
    curves, settings, figure_results = record["curves"], record["settings"], record["results"]["figure"]
    with figure_style():
        figure = Figure(figsize=(9.2, 5.4))
        panels = figure.subplots(2, 3)
        draw_evolution(panels[0], curves["figure"])
        name_lines(panels[0, 0], figure_results["moving"], figure_results["still"], "center right")
        for axes, (claim, how) in zip(panels[1], settings["claims"].items(), strict=True):
            for depth in settings["depths"]:
                line = curves[claim][str(depth)]
                axes.plot(line["iteration"], line["rho_over_start"], color=_COLOURS[depth], label=f"L = {depth}")
            line = curves[claim][str(settings["depths"][0])]
            axes.plot(line["iteration"], line["approximation"], "--", color=GREY, label="ε(1 − ηλ)ᵗ")
            axes.set(xscale="symlog", yscale="log", ylim=(5e-3, 1.5), xlabel="iteration t")
            axes.set_title(f"The others: ε = {how['init_scale']:g}, λ = {how['weight_decay']:g}")
        panels[1, 0].set_ylabel("ρ(t)/ε")
        panels[1, 0].legend(loc="lower left")
        return figure
