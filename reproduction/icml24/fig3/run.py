"""Fig. 3 of the ICML 2024 paper: the singular values and vectors of W_1 while a deep factorization trains."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from reproduction.factorization_descent import FactorizationDescent
from reproduction.style import BLUE, GREEN, GREY, ORANGE, figure_style
from reproduction.svd_evolution import as_returned, draw_evolution, followed, name_lines

TITLE = "evolution of the SVD of W₁: 2r directions move, d − 2r do not (Fig. 3)"
_PAPER: dict[str, Any] = {
    "size": 30,
    "rank": 3,
    "depth": 3,
    "init_scale": 1.0,
    "learning_rate": 5e-3,
    "steps": 400,
    "more_seeds": 4,
}
_SMALL: dict[str, Any] = {**_PAPER, "size": 16, "rank": 2, "steps": 200, "more_seeds": 1}
SCALES = {"paper": _PAPER, "small": _SMALL}
COMMITTED = "paper"

_POINTS = 45


def measure(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """One descent followed in full; more seeds for the numbers."""
    runs = [FactorizationDescent.run(settings, at) for at in range(seed, seed + 1 + settings["more_seeds"])]
    evolutions = [followed(run.recorder.of_layer(1)) for run in runs]
    results = [evolution.summary() | run.summary() for evolution, run in zip(evolutions, runs, strict=True)]
    run, evolution = runs[0], evolutions[0]
    by_routine = as_returned(run.recorder.of_layer(1))
    middle = slice(settings["rank"], settings["size"] - settings["rank"])
    last_turns = by_routine.right_degrees[-1, middle]
    results[0] |= {
        "sigma_at_end": sorted(evolution.sigma[-1][evolution.moved()].tolist(), reverse=True),
        "as_returned": {
            "largest_turn_of_middle": float(by_routine.right_degrees[:, middle].max()),
            "median_turn_of_middle_at_end": float(np.median(last_turns)),
        },
    }
    iterations = run.recorder.iterations
    curves = evolution.curves(iterations, _POINTS)
    kept = [iterations.index(at) for at in curves["iteration"]]
    few = kept[::4]
    still = ~evolution.moved()
    turned = np.radians(np.maximum(evolution.left_degrees, evolution.right_degrees)[:, still].max(axis=1))
    against_theory = {**run.blocks, "turn_of_still": turned, "gap": run.gaps, "exact_gap": run.exact_gaps}
    return {
        "results": results[0]
        | {"more_seeds": {str(seed + number): result for number, result in enumerate(results[1:], start=1)}},
        "curves": curves
        | {name: [float(values[at]) for at in kept] for name, values in against_theory.items()}
        | {
            "as_returned": {
                "iteration": [iterations[at] for at in few],
                "right_degrees": by_routine.right_degrees[few].T.tolist(),
            }
        },
    }


def draw(record: dict[str, Any]) -> Figure:
    """Above the paper's three panels; below how exact they are, and what the SVD routine's own order shows instead."""
    curves, results, settings = record["curves"], record["results"], record["settings"]
    iterations = curves["iteration"]
    with figure_style():
        figure = Figure(figsize=(9.2, 5.2))
        panels = figure.subplots(2, 3)
        draw_evolution(panels[0], curves)
        name_lines(panels[0, 0], results["moving"], results["still"], "center right")
        exact = panels[1, 0]
        for name, colour, label in (
            ("turn_of_still", ORANGE, f"turn of the {results['still']}, radians"),
            ("leakage", GREEN, "leakage between blocks"),
            ("rho_error", GREY, "distance from ρ(t) of eq. 6"),
        ):
            exact.semilogy(iterations[1:], np.maximum(curves[name][1:], 1e-17), color=colour, label=label)
        exact.set(title="Theorem 2.1, to rounding", xlabel="iteration t", ylim=(1e-17, 1e-6))
        exact.legend(loc="upper left")

        gap = panels[1, 1]
        gap.plot(iterations, curves["exact_gap"], color=GREY, linewidth=4.5, label="√((d − 2r)∏ρ²)")
        gap.plot(iterations, curves["gap"], color=BLUE, label="measured")
        gap.set(title="Compressed from full width", xlabel="iteration t", ylabel="‖f(t) − f_C(t)‖")
        gap.set_ylim(bottom=0)
        gap.legend()

        rank, size = settings["rank"], settings["size"]
        naive = panels[1, 2]
        for number, line in enumerate(curves["as_returned"]["right_degrees"]):
            colour = ORANGE if rank <= number < size - rank else BLUE
            naive.plot(curves["as_returned"]["iteration"], line, color=colour, linewidth=0.6)
        naive.set(
            title="Right, as the SVD lists them", xlabel="iteration t", ylabel="∠(vᵢ(t), vᵢ(0)), °", ylim=(-3, 93)
        )
        naive.set_yticks([0, 30, 60, 90])
        return figure
