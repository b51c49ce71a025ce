"""The 2025 slides: the SVD of W_1 under gradient descent with heavy-ball momentum, and which ρ(t) it then obeys."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rankwise.factorizations import rho_trajectory
from reproduction.factorization_descent import FactorizationDescent
from reproduction.style import BLUE, GREEN, GREY, ORANGE, PURPLE, figure_style
from reproduction.svd_evolution import SvdEvolution, draw_evolution, followed, name_lines

TITLE = "evolution of the SVD of W₁ with momentum: the blocks stay, eq. 6 does not"
_PAPER: dict[str, Any] = {
    "size": 30,
    "rank": 3,
    "depth": 3,
    "init_scale": 1.0,
    "momentum": 0.9,
    "effective_learning_rate": 5e-3,
    "steps": 400,
    "more_momenta": {"low": 0.5, "high": 0.98},
}
_SMALL: dict[str, Any] = {**_PAPER, "size": 16, "rank": 2, "steps": 200, "more_momenta": {"high": 0.98}}
SCALES = {"paper": _PAPER, "small": _SMALL}
COMMITTED = "paper"

_LAWS = {
    "two_term": (GREY, 4.5, "-", "its own recursion"),
    "equation_6": (GREEN, 1.5, "--", "eq. 6 at η"),
    "equation_6_effective": (PURPLE, 1.5, "--", "eq. 6 at η/(1 − μ)"),
}


def measure(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """One momentum followed in full, others for the numbers; all at the same η/(1 − μ)."""
    run, evolution, laws, results = _at_momentum(settings["momentum"], settings, seed)
    more = {name: _at_momentum(mu, settings, seed)[-1] for name, mu in settings["more_momenta"].items()}
    iterations = run.recorder.iterations
    curves = evolution.curves(iterations, 45)
    kept = [iterations.index(at) for at in curves["iteration"]]
    rest = _rest(evolution)
    deviations = {f"{name}_off": np.abs(np.array(rest) - law) for name, law in laws.items()}
    followed_in_time = {**laws, **deviations, "rho": rest, "gap": run.gaps, "exact_gap": run.exact_gaps}
    return {
        "results": results | {"more_momenta": more},
        "curves": curves | {name: [float(values[at]) for at in kept] for name, values in followed_in_time.items()},
    }


def _at_momentum(
    mu: float, settings: dict[str, Any], seed: int
) -> tuple[FactorizationDescent, SvdEvolution, dict[str, list[float]], dict[str, Any]]:
    effective, steps = settings["effective_learning_rate"], settings["steps"]
    eta, scales = effective * (1 - mu), [settings["init_scale"]] * settings["depth"]
    run = FactorizationDescent.run(settings | {"learning_rate": eta, "momentum": mu}, seed)
    evolution = followed(run.recorder.of_layer(1))
    of_every_iteration = {
        "two_term": run.rho,
        "equation_6": rho_trajectory(scales, eta, 0.0, steps),
        "equation_6_effective": rho_trajectory(scales, effective, 0.0, steps),
    }
    laws = {name: rho[run.recorder.iterations, 0].tolist() for name, rho in of_every_iteration.items()}
    rest = np.array(_rest(evolution))
    results = evolution.summary() | run.summary()
    results |= {f"deviation_from_{name}": float(np.abs(rest - law).max()) for name, law in laws.items()}
    results["largest_gap_over_start"] = max(run.gaps) / run.gaps[0]
    return run, evolution, laws, results


def _rest(evolution: SvdEvolution) -> list[float]:
    """The singular value that the vectors standing still share, as read from W_1."""
    rest: list[float] = evolution.sigma[:, ~evolution.moved()].mean(axis=1).tolist()
    return rest


def draw(record: dict[str, Any]) -> Figure:
    """Above the figure's three panels; below ρ(t) against three recursions, and the compression's error."""
    curves, results, settings = record["curves"], record["results"], record["settings"]
    iterations = curves["iteration"]
    with figure_style():
        figure = Figure(figsize=(9.0, 5.2))
        panels = figure.subplots(2, 3)
        draw_evolution(panels[0], curves)
        name_lines(panels[0, 0], results["moving"], results["still"], "center right")
        values, deviations, gap = panels[1]
        for name, (colour, width, dashes, label) in _LAWS.items():
            values.plot(iterations, curves[name], dashes, color=colour, linewidth=width, label=label)
            apart = np.maximum(curves[f"{name}_off"][1:], 1e-17)
            deviations.semilogy(iterations[1:], apart, color=colour, label=label)
        (measured,) = values.plot(iterations, curves["rho"], color=ORANGE, linewidth=1.4, label="measured")
        values.set(title=f"ρ(t) at μ = {settings['momentum']:g}", xlabel="iteration t")
        values.legend(handles=[measured], loc="lower left")
        deviations.set(title="Measured ρ(t) from each", xlabel="iteration t", ylim=(1e-17, 2))
        deviations.legend(loc="center right")
        gap.plot(iterations, curves["exact_gap"], color=GREY, linewidth=4.5, label="√((d − 2r)∏ρ²)")
        gap.plot(iterations, curves["gap"], color=BLUE, label="measured")
        gap.set(title="Compressed from full width", xlabel="iteration t", ylabel="‖f(t) − f_C(t)‖")
        gap.set_ylim(bottom=0)
        gap.legend()
        return figure
