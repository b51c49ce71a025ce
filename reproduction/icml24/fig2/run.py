"""Fig. 2 of the ICML 2024 paper: what depth and width of a random factorization do for completion."""

import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rankwise.completion.gradient_descent import gradient_descent, narrow_random_start
from reproduction.icml24.completion_problem import PlantedCompletion, Recorder
from reproduction.style import BLUE, ORANGE, figure_style

TITLE = "recovery and iterations against width, two factors and three (Fig. 2)"
_PAPER: dict[str, Any] = {
    "size": 100,
    "ranks": {"5": "caption", "10": "code"},
    "observed": 0.3,
    "init_scale": 1e-3,
    "learning_rates": {"2": 1e-2, "3": 3e-2},
    "stop_at_mean_loss": 1e-10,
    "widths": [10, 20, 40, 70, 100],
    "max_iter": 300_000,
    "trials": 3,
}
_SMALL: dict[str, Any] = {
    **_PAPER,
    "size": 60,
    "ranks": {"3": "problem, smaller"},
    "widths": [6, 60],
    "max_iter": 60_000,
    "trials": 1,
}
SCALES = {"paper": _PAPER, "small": _SMALL}
COMMITTED = "paper"

_DEPTHS = {"2": (ORANGE, "two factors"), "3": (BLUE, "three factors")}


def measure(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """One problem for each true rank; several random starts for each width and depth, as in the public code."""
    results: dict[str, Any] = {}
    for rank in settings["ranks"]:
        problem = PlantedCompletion.draw(settings["size"], int(rank), settings["observed"], seed)
        results[f"rank_{rank}"] = {
            f"depth_{depth}": {
                str(width): _cell(problem, int(depth), width, settings, seed) for width in settings["widths"]
            }
            for depth in settings["learning_rates"]
        }
        at_rank = results[f"rank_{rank}"]
        narrowest, widest = str(settings["widths"][0]), str(settings["widths"][-1])
        two, three = at_rank["depth_2"], at_rank["depth_3"]
        at_rank["widest_two_over_three_error"] = two[widest]["held_out_error"] / three[widest]["held_out_error"]
        for name, cells in (("two", two), ("three", three)):
            at_rank[f"{name}_widest_over_narrowest_error"] = (
                cells[widest]["held_out_error"] / cells[narrowest]["held_out_error"]
            )
        at_rank["three_narrowest_over_widest_iterations"] = three[narrowest]["iterations"] / three[widest]["iterations"]
    return {"results": results, "curves": {}}


def _cell(problem: PlantedCompletion, depth: int, width: int, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Means over the trials, and the single ones."""
    runs = []
    for trial in range(settings["trials"]):
        recorder = Recorder(problem, settings["stop_at_mean_loss"], every=settings["max_iter"])
        done = gradient_descent(
            problem.observations,
            rank=1,
            outer_lr_ratio=1.0,
            learning_rate=settings["learning_rates"][str(depth)],
            tol=0.0,
            max_iter=settings["max_iter"],
            start=narrow_random_start(
                problem.observations, width, depth=depth, init_scale=settings["init_scale"], seed=1000 * seed + trial
            ),
            callback=recorder,
            record_every=settings["max_iter"],
        )
        runs.append(recorder.summary() | {"converged": done.iterations < settings["max_iter"]})
    errors, iterations = [run["held_out_error"] for run in runs], [run["iterations"] for run in runs]
    print(f"depth {depth}, width {width}: errors {errors}, iterations {iterations}", flush=True)
    return {
        "held_out_error": statistics.mean(errors),
        "iterations": statistics.mean(iterations),
        "converged": sum(run["converged"] for run in runs),
        "errors": errors,
        "all_iterations": iterations,
    }


def draw(record: dict[str, Any]) -> Figure:
    """One row for each true rank: held-out error and iterations against width."""
    settings = record["settings"]
    with figure_style():
        figure = Figure(figsize=(8.6, 6.0))
        rows = figure.subplots(len(settings["ranks"]), 2, squeeze=False)
        for (left, right), (rank, whose) in zip(rows, settings["ranks"].items(), strict=True):
            for depth, (colour, label) in _DEPTHS.items():
                cells = record["results"][f"rank_{rank}"][f"depth_{depth}"]
                _points(left, cells, "errors", "held_out_error", colour, label)
                if depth == "3":
                    _points(right, cells, "all_iterations", "iterations", colour, label)
            left.set(yscale="log", ylabel="held-out error", title=f"True rank {rank} (the paper's {whose})")
            right.set(ylabel="iterations", title=f"To a mean loss of {settings['stop_at_mean_loss']:g}")
            right.set_ylim(bottom=0)
            right.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
            left.legend(loc="center right")
            right.legend(loc="lower left")
            for panel in (left, right):
                panel.set(xlabel="width")
        return figure


def _points(axes: Axes, cells: dict[str, Any], every: str, mean: str, colour: str, label: str) -> None:
    widths = [int(width) for width in cells]
    axes.plot(widths, [cell[mean] for cell in cells.values()], "-", color=colour, label=label)
    for width, cell in zip(widths, cells.values(), strict=True):
        axes.plot([width] * len(cell[every]), cell[every], "o", color=colour, markersize=4, alpha=0.7)
