"""Fig. 4 of the ICML 2024 paper: deep matrix factorization at full width and compressed, paths and time."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from rankwise.factorizations import (
    CompressedDeepLinear,
    DeepLinear,
    DescentStep,
    SquaredLoss,
    fit_factorization,
    rho_trajectory,
    stable_learning_rate,
    trajectory_error,
    trajectory_error_bound,
)
from reproduction.planted import low_rank_target
from reproduction.style import BLUE, GREY, figure_style, thousands
from reproduction.trajectories import Path, evenly_along, principal_plane

TITLE = "deep matrix factorization: compressed against full width, paths and time (Fig. 4)"
_PAPER: dict[str, Any] = {
    "problems": {
        "caption": {"size": 1000, "rank": 5},
        "code": {"size": 200, "rank": 10},
    },
    "depth": 3,
    "init_scale": 1e-3,
    "default_steps": 2.0,
    "tolerance": 1e-10,
    "every": 10,
    "max_iter": 30_000,
}
_SMALL: dict[str, Any] = {
    **_PAPER,
    "problems": {"caption": {"size": 60, "rank": 2}, "code": {"size": 40, "rank": 4}},
    "init_scale": 1e-2,
}
SCALES = {"paper": _PAPER, "small": _SMALL}
COMMITTED = "paper"

_ARMS = {"full_width": (GREY, 4.5, "full width"), "compressed": (BLUE, 1.8, "compressed")}


def measure(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Both sides whole, from one start at one rate, on each problem."""
    results: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for name, problem in settings["problems"].items():
        results[name], curves[name] = _side_by_side(problem["size"], problem["rank"], settings, seed)
        print(f"{name}: {results[name]}", flush=True)
    return {"results": results, "curves": curves}


def _side_by_side(size: int, rank: int, settings: dict[str, Any], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    target = low_rank_target(size, rank, seed)
    depth, epsilon, every = settings["depth"], settings["init_scale"], settings["every"]
    generator = torch.Generator().manual_seed(seed)
    deep = DeepLinear.orthogonal(size, depth, epsilon, generator=generator, dtype=torch.float64)
    loss = SquaredLoss(target)
    default = stable_learning_rate([weight.detach() for weight in deep.weights], loss)
    common = {"lr": settings["default_steps"] * default, "tol": settings["tolerance"], "steps": settings["max_iter"]}

    started = time.process_time()
    narrow = CompressedDeepLinear.from_full_width(deep, -target, rank, generator=generator)
    building = time.process_time() - started
    cores: dict[int, Tensor] = {}
    compressed = _Recorder(every, lambda step: cores.update({step.iteration: narrow.core().detach()}))
    compressed_fit = fit_factorization(narrow, loss, callbacks=[compressed], **common)
    compressed.end(compressed_fit.losses)

    gaps: dict[int, float] = {}
    floor = float(target.norm())
    paths = {name: Path(0.03, floor) for name in _ARMS}

    def compare(step: DescentStep) -> None:
        f = step.model.product().detach()
        if step.iteration in cores:
            f_C = narrow.left.detach() @ cores[step.iteration] @ narrow.right.detach().mT
            gaps[step.iteration] = float((f - f_C).norm())
            if paths["full_width"].add(f.numpy()):
                paths["compressed"].points.append(f_C.numpy())

    full = _Recorder(every, compare)
    full_fit = fit_factorization(deep, loss, callbacks=[full], **common)
    full.end(full_fit.losses)

    exact = trajectory_error(
        rho_trajectory([epsilon] * depth, compressed_fit.lr, 0.0, full_fit.iterations), size, rank
    ).sqrt()
    bound = trajectory_error_bound([epsilon] * depth, size, rank, lr=compressed_fit.lr) ** 0.5
    results = {
        "lr": compressed_fit.lr,
        "full_width": full.summary() | {"converged": full_fit.converged},
        "compressed": compressed.summary() | {"converged": compressed_fit.converged, "seconds_to_build": building},
        "times_faster": full.seconds[-1] / (compressed.seconds[-1] + building),
        "largest_gap": max(gaps.values()),
        "bound_on_gap": bound,
        "largest_gap_over_bound": max(gaps.values()) / bound,
        "largest_gap_over_exact": max(gap / float(exact[at]) for at, gap in gaps.items()),
        "gap_over_bound_at_start": gaps[0] / bound,
        "largest_relative_difference_of_losses": max(
            abs(a - b) / a for a, b in zip(full_fit.losses, compressed_fit.losses, strict=False)
        ),
    }
    plane = principal_plane(paths["full_width"].points)
    curves = {
        name: recorder.thinned() | {"path": [(plane @ f.ravel() / floor).tolist() for f in paths[name].points]}
        for name, recorder in (("full_width", full), ("compressed", compressed))
    }
    return results, curves


@dataclass
class _Recorder:
    """Losses along a descent against the processor's time, its own time left out.

    Processor time is what one thread takes on a machine that does nothing else.
    """

    every: int
    also: Callable[[DescentStep], None]
    iterations: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    _started: float = field(default_factory=time.process_time)
    _own_time: float = 0.0

    def __call__(self, step: DescentStep) -> None:
        if step.iteration % self.every == 0:
            entered = time.process_time()
            self._add(step.iteration, step.loss, entered)
            self.also(step)
            self._own_time += time.process_time() - entered

    def end(self, losses: list[float]) -> None:
        """The last loss, where it fell between two recorded ones."""
        if self.iterations[-1] < len(losses) - 1:
            self._add(len(losses) - 1, losses[-1], time.process_time())

    def _add(self, iteration: int, loss: float, now: float) -> None:
        self.iterations.append(iteration)
        self.seconds.append(now - self._started - self._own_time)
        self.losses.append(loss)

    def summary(self) -> dict[str, Any]:
        return {"iterations": self.iterations[-1], "seconds": self.seconds[-1], "loss": self.losses[-1]}

    def thinned(self) -> dict[str, Any]:
        kept = evenly_along(self.iterations, self.losses, 120)
        return {
            "iteration": [self.iterations[at] for at in kept],
            "seconds": [self.seconds[at] for at in kept],
            "loss": [self.losses[at] for at in kept],
        }


def draw(record: dict[str, Any]) -> Figure:
    """The caption's problem: paths of the product, loss by iteration, loss by time."""
    curves, results = record["curves"]["caption"], record["results"]["caption"]
    problem = record["settings"]["problems"]["caption"]
    with figure_style():
        figure = Figure(figsize=(9.6, 3.3))
        left, middle, right = figure.subplots(1, 3)
        for name, (colour, width, label) in _ARMS.items():
            path = np.array(curves[name]["path"])
            left.plot(path[:, 0], path[:, 1], color=colour, linewidth=width, label=label)
            left.plot(path[-1, 0], path[-1, 1], "o", color=colour, markersize=2 * width)
            _losses(middle, curves[name], "iteration", name)
            _losses(right, curves[name], "seconds", name, results[name].get("seconds_to_build", 0.0))
        left.set(
            xlabel="first principal component",
            ylabel="second",
            title=f"Paths of the product, d = {problem['size']}, r = {problem['rank']}",
        )
        left.legend()
        thousands(middle)
        middle.set(xlabel="iteration", ylabel="training loss", title="Loss by iteration: the same")
        middle.legend(loc="lower left")
        right.set(xscale="log", xlabel="seconds, one thread", title="Loss by time")
        right.annotate(
            f"{results['times_faster']:,.0f} times\nfaster, frames\nincluded",
            (0.62, 0.35),
            xycoords="axes fraction",
            ha="center",
            color="#555555",
        )
        return figure


def _losses(axes: Axes, curve: dict[str, Any], against: str, name: str, later: float = 0.0) -> None:
    colour, width, label = _ARMS[name]
    axes.plot(np.array(curve[against]) + later, curve["loss"], color=colour, linewidth=width, label=label)
    axes.set_yscale("log")
