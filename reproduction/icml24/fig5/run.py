"""Fig. 5 of the ICML 2024 paper: compressed deep matrix completion against full width, with and without γ."""

import time
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rankwise.completion.gradient_descent import (
    CompletionFactors,
    GradientDescentStep,
    gradient_descent,
    safe_learning_rate,
)
from rankwise.factorizations import CompressedDeepLinear, DeepLinear
from reproduction.icml24.completion_problem import PlantedCompletion, Recorder
from reproduction.icml24.full_width import full_width_descent
from reproduction.style import BLUE, GREY, ORANGE, figure_style, thousands
from reproduction.trajectories import Path, principal_plane

TITLE = "deep matrix completion: compressed against full width, γ = .01 and γ = 0 (Fig. 5)"
_PAPER: dict[str, Any] = {
    "size": 1000,
    "rank": 5,
    "observed": 0.2,
    "depth": 3,
    "init_scale": 1e-3,
    "outer_lr_ratio": 0.01,
    "learning_rate": 5e-3,
    "stop_at_mean_loss": 1e-13,
    "stalled_iterations": 25_000,
    "more_seeds": 2,
    "small": {"size": 200, "rank": 5, "observed": 0.3, "stop_at_mean_loss": 1e-9, "max_iter": 40_000},
    "timed_full_width_steps": 5,
}
_SMALL: dict[str, Any] = {
    **_PAPER,
    "size": 60,
    "rank": 2,
    "observed": 0.6,
    "init_scale": 1e-2,
    "learning_rate": 1e-2,
    "stop_at_mean_loss": 1e-9,
    "stalled_iterations": 3000,
    "more_seeds": 0,
    "small": {"size": 30, "rank": 2, "observed": 0.7, "stop_at_mean_loss": 1e-9, "max_iter": 2000},
    "timed_full_width_steps": 1,
}
SCALES = {"paper": _PAPER, "small": _SMALL}
COMMITTED = "paper"

# a path's next point lies this share of ‖f‖ away
_SHARE = 0.04
_ARMS = {
    "compressed": (BLUE, "compressed, γ = .01"),
    "stalled": (ORANGE, "compressed, γ = 0"),
    "full_width": (GREY, "full width"),
}


def measure(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """The paper's problem compressed, at γ and at 0; and a small one where full width can be run beside it."""
    problem = PlantedCompletion.draw(settings["size"], settings["rank"], settings["observed"], seed)
    common = {"rank": settings["rank"], "depth": settings["depth"], "init_scale": settings["init_scale"]}
    common |= {"learning_rate": settings["learning_rate"], "tol": 0.0, "record_every": 1_000_000}
    _warm_up(problem, common)

    def descend(on: PlantedCompletion, gamma: float, limit: int, at_seed: int) -> Recorder:
        recorder = Recorder(on, settings["stop_at_mean_loss"], every=10)
        gradient_descent(
            on.observations, outer_lr_ratio=gamma, max_iter=limit, seed=at_seed, callback=recorder, **common
        )
        return recorder

    compressed = descend(problem, settings["outer_lr_ratio"], 100_000, seed)
    print(f"compressed: {compressed.summary()}", flush=True)
    stalled = descend(problem, 0.0, settings["stalled_iterations"], seed)
    print(f"γ = 0: {stalled.summary()}", flush=True)
    iterations = [compressed.summary()["iterations"]]
    for other in range(seed + 1, seed + 1 + settings["more_seeds"]):
        drawn = PlantedCompletion.draw(settings["size"], settings["rank"], settings["observed"], other)
        iterations.append(descend(drawn, settings["outer_lr_ratio"], 100_000, other).summary()["iterations"])
        print(f"seed {other}: {iterations[-1]} iterations", flush=True)
    small_results, small_curves = _small(settings, seed)
    return {
        "results": {
            "compressed": compressed.summary(),
            "stalled": stalled.summary(),
            "iterations_by_seed": {str(seed + number): value for number, value in enumerate(iterations)},
            "small": small_results,
            "full_width_seconds_per_iteration": _full_width_step(problem, settings),
        },
        "curves": {
            "compressed": compressed.thinned(),
            "stalled": stalled.thinned(),
            "small": small_curves,
        },
    }


def _warm_up(problem: PlantedCompletion, common: dict[str, Any]) -> None:
    """Compile before the clock runs."""
    gradient_descent(problem.observations, max_iter=1, **common)


def _masked(problem: PlantedCompletion) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    entries = problem.observations
    mask = entries.matrix(np.ones(entries.count)).toarray() > 0
    return entries.matrix().toarray(), mask


def _full_width_step(problem: PlantedCompletion, settings: dict[str, Any]) -> float:
    """Seconds of one full-width iteration at the figure's size; the fastest of a few, not a whole descent."""
    generator = torch.Generator().manual_seed(0)
    deep = DeepLinear.orthogonal(
        settings["size"], settings["depth"], settings["init_scale"], generator=generator, dtype=torch.float64
    )
    target, mask = _masked(problem)
    times: list[float] = []

    def note(iteration: int, loss: float, f: NDArray[np.float64]) -> bool:
        times.append(time.perf_counter())
        return False

    weights = [weight.detach().numpy() for weight in deep.weights]
    full_width_descent(weights, target, mask, settings["learning_rate"], settings["timed_full_width_steps"], note)
    return float(np.diff(times).min())


def _small(settings: dict[str, Any], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One network at full width, and its own compression at γ and at 0, from the same start and at the same rate."""
    small = settings["small"]
    problem = PlantedCompletion.draw(small["size"], small["rank"], small["observed"], seed)
    target, mask = _masked(problem)
    generator = torch.Generator().manual_seed(seed)
    deep = DeepLinear.orthogonal(
        small["size"], settings["depth"], settings["init_scale"], generator=generator, dtype=torch.float64
    )
    torch.manual_seed(seed)  # from_full_width sketches its SVD from torch's own stream
    narrow = CompressedDeepLinear.from_full_width(deep, torch.from_numpy(-target), small["rank"])
    start = CompletionFactors(*(p.detach().numpy() for p in (narrow.left, narrow.inner, narrow.right)))
    gamma = settings["outer_lr_ratio"]
    eta = safe_learning_rate(problem.observations, depth=settings["depth"], outer_lr_ratio=gamma)
    full = _FullWidthRecorder(problem, small["stop_at_mean_loss"])
    weights = [weight.detach().numpy() for weight in deep.weights]
    full_width_descent(weights, target, mask, eta, small["max_iter"], full)
    recorders: dict[str, Any] = {"full_width": full}
    paths = {"full_width": full.path}
    for name, ratio in (("compressed", gamma), ("stalled", 0.0)):
        path = Path(_SHARE)
        recorder = Recorder(
            problem, small["stop_at_mean_loss"], every=10, also=lambda step, path=path: path.add(_end_to_end(step))
        )
        gradient_descent(
            problem.observations,
            rank=small["rank"],
            start=start,
            outer_lr_ratio=ratio,
            learning_rate=eta,
            tol=0.0,
            max_iter=full.curve[-1][0] + 1000 if ratio == 0 else small["max_iter"],
            callback=recorder,
        )
        recorders[name], paths[name] = recorder, path
    results = {name: recorder.summary() for name, recorder in recorders.items()}
    print(f"small: {results}", flush=True)
    curves = {name: recorder.thinned(120) | {"path": paths[name]} for name, recorder in recorders.items()}
    for name, points in _in_one_plane(paths).items():
        curves[name]["path"] = points
    return results | {"learning_rate": eta}, curves


def _end_to_end(step: GradientDescentStep) -> NDArray[np.float64]:
    return (step.factors.left @ step.factors.core) @ step.factors.right.T


class _FullWidthRecorder(Recorder):
    """The same record from dense end-to-end matrices."""

    def __init__(self, problem: PlantedCompletion, stop_at: float) -> None:
        super().__init__(problem, stop_at, every=10)
        self.path = Path(_SHARE)
        self._target = problem.left @ problem.right.T

    def __call__(self, iteration: int, loss: float, f: NDArray[np.float64]) -> bool:  # type: ignore[override]
        entered = time.perf_counter()
        reached = loss <= self.stop_at * self.problem.entries
        if reached or iteration % self.every == 0:
            error = max(0.5 * float(np.square(f - self._target).sum()) - loss, 0.0) / self.problem.entries
            self.curve.append((iteration, entered - self._started - self._own_time, error))
            self.path.add(f)
        self._own_time += time.perf_counter() - entered
        return reached


def _in_one_plane(paths: dict[str, Path]) -> dict[str, list[list[float]]]:
    """All paths in the plane of the full-width one's two leading principal components, units of its longest reach."""
    full = paths["full_width"].points
    plane, length = principal_plane(full), max(float(np.linalg.norm(f)) for f in full)
    return {name: [(plane @ f.ravel() / length).tolist() for f in path.points] for name, path in paths.items()}


def draw(record: dict[str, Any]) -> Figure:
    """Above the paper's problem, below the small one that full width can do as well."""
    curves, results, settings = record["curves"], record["results"], record["settings"]
    small = settings["small"]
    with figure_style():
        figure = Figure(figsize=(8.6, 6.4))
        axes = figure.subplots(2, 2)
        for name in ("compressed", "stalled"):
            _line(axes[0, 0], curves[name], "iteration", name)
            _line(axes[0, 1], curves[name], "seconds", name)
        done = results["compressed"]
        axes[0, 0].annotate(
            f"{done['iterations']:,} iterations",
            (done["iterations"], done["held_out_error"]),
            xytext=(-8, 0),
            textcoords="offset points",
            ha="right",
            color=BLUE,
        )
        axes[0, 0].annotate(
            f"stalls at\n{results['stalled']['held_out_error']:.1e}".replace("e-0", "e-"),
            (results["stalled"]["iterations"], results["stalled"]["held_out_error"]),
            xytext=(0, 5),
            textcoords="offset points",
            ha="right",
            color=ORANGE,
        )
        thousands(axes[0, 0])
        axes[0, 0].set(xlabel="iteration", title=f"d = {settings['size']}, {settings['observed']:.0%} observed")
        axes[0, 1].set(xlabel="seconds, one thread", title="The same by time")
        per_iteration = results["full_width_seconds_per_iteration"]
        axes[0, 1].text(
            0.03,
            0.05,
            f"full width: {per_iteration:.2g} s an iteration,\nabout {per_iteration * done['iterations'] / 3600:.1f} h "
            "for as many; not run",
            transform=axes[0, 1].transAxes,
            color="#555555",
            fontsize=8.5,
        )
        for name in ("full_width", "compressed", "stalled"):
            _line(axes[1, 0], curves["small"][name], "iteration", name)
            path = np.array(curves["small"][name]["path"])
            colour, label = _ARMS[name]
            width = 4.5 if name == "full_width" else 1.8
            axes[1, 1].plot(path[:, 0], path[:, 1], color=colour, linewidth=width, label=label)
            axes[1, 1].plot(path[-1, 0], path[-1, 1], "o", color=colour, markersize=7 if name == "full_width" else 5)
        thousands(axes[1, 0])
        axes[1, 0].set(
            xlabel="iteration", title=f"d = {small['size']}, {small['observed']:.0%} observed, full width too"
        )
        axes[1, 1].set(
            xlabel="first principal component", ylabel="second", title=f"d = {small['size']}: paths of the product"
        )
        for panel in axes.flat[:3]:
            panel.set(yscale="log", ylabel="held-out error")
        for panel in axes.flat:
            panel.legend()
        return figure


def _line(axes: Axes, curve: dict[str, list[float]], against: str, name: str) -> None:
    colour, label = _ARMS[name]
    axes.plot(
        curve[against],
        curve["held_out_error"],
        color=colour,
        label=label,
        linewidth=4.5 if name == "full_width" else 1.8,
    )
