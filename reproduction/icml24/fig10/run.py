"""Fig. 10 of the ICML 2024 paper: compressed against narrow random factorizations as the rank is overestimated."""

from typing import Any

from matplotlib.figure import Figure

from rankwise.completion.gradient_descent import CompletionFactors, gradient_descent, narrow_random_start
from reproduction.icml24.completion_problem import PlantedCompletion, Recorder
from reproduction.style import BLUE, GREY, ORANGE, figure_style

TITLE = "iterations as the rank is overestimated: compressed against narrow random (Fig. 10)"
_PAPER: dict[str, Any] = {
    "size": 1000,
    "rank": 5,
    "observed": 0.2,
    "depth": 3,
    "init_scale": 1e-3,
    "outer_lr_ratio": 0.01,
    "learning_rate": 5e-3,
    "stop_at_mean_loss": 1e-10,
    "ranks": [5, 10, 15, 20],
    "max_iter": 100_000,
}
_SMALL: dict[str, Any] = {
    **_PAPER,
    "size": 60,
    "rank": 2,
    "observed": 0.6,
    "init_scale": 1e-2,
    "learning_rate": 1e-2,
    "ranks": [2, 4],
    "max_iter": 3000,
}
SCALES = {"paper": _PAPER, "small": _SMALL}
COMMITTED = "paper"

_ARMS = {"compressed": (BLUE, "compressed, width 2r"), "narrow": (ORANGE, "narrow random, width 2r")}
# as reported of the public code's results
_PUBLISHED = {"compressed": {5: 19_500, 20: 19_500}, "narrow": {5: 62_000, 20: 45_000}}


def measure(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Both starts at every assumed rank, on one problem."""
    problem = PlantedCompletion.draw(settings["size"], settings["rank"], settings["observed"], seed)
    gradient_descent(problem.observations, rank=1, max_iter=1)  # compile before the clock runs
    results: dict[str, dict[str, Any]] = {"compressed": {}, "narrow": {}}
    for rank in settings["ranks"]:
        narrow = narrow_random_start(
            problem.observations, 2 * rank, depth=settings["depth"], init_scale=settings["init_scale"], seed=seed
        )
        arms: list[tuple[str, CompletionFactors | None, float]] = [
            ("compressed", None, settings["outer_lr_ratio"]),
            ("narrow", narrow, 1.0),
        ]
        for name, start, ratio in arms:
            recorder = Recorder(problem, settings["stop_at_mean_loss"], every=1000)
            gradient_descent(
                problem.observations,
                rank=rank,
                depth=settings["depth"],
                init_scale=settings["init_scale"],
                outer_lr_ratio=ratio,
                learning_rate=settings["learning_rate"],
                tol=0.0,
                max_iter=settings["max_iter"],
                seed=seed,
                start=start,
                callback=recorder,
                record_every=1_000_000,
            )
            results[name][str(rank)] = recorder.summary()
            print(f"rank {rank}, {name}: {recorder.summary()}", flush=True)
    return {"results": results, "curves": {}}


def draw(record: dict[str, Any]) -> Figure:
    """Iterations and seconds to the same loss against the assumed rank."""
    with figure_style():
        figure = Figure(figsize=(8.6, 3.4))
        left, right = figure.subplots(1, 2)
        for name, (colour, label) in _ARMS.items():
            runs = record["results"][name]
            ranks = [int(rank) for rank in runs]
            left.plot(ranks, [run["iterations"] / 1000 for run in runs.values()], "o-", color=colour, label=label)
            right.plot(ranks, [run["seconds"] for run in runs.values()], "o-", color=colour, label=label)
            if record["scale"] == "paper":
                published = _PUBLISHED[name]
                left.plot(
                    list(published),
                    [iterations / 1000 for iterations in published.values()],
                    "x",
                    color=colour,
                    markersize=9,
                    markeredgewidth=2,
                )
        settings = record["settings"]
        if record["scale"] == "paper":
            left.plot([], [], "x", color=GREY, markersize=9, markeredgewidth=2, label="published")
        left.set(title=f"To a mean loss of {settings['stop_at_mean_loss']:g}", ylabel="iterations (thousands)")
        right.set(title="The same by time", ylabel="seconds, one thread")
        for panel in (left, right):
            panel.set(xlabel=f"assumed rank (true rank {settings['rank']})", xticks=settings["ranks"])
            panel.set_ylim(bottom=0)
        left.legend(loc="center right")
        return figure
