"""Can a network with an activation be trained inside small subspaces of its factors? What the ICML 2024 paper leaves open (§5)."""

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from rankwise.factorizations import network_gradients
from rankwise.factorizations.compressed_network import Frames, captured_share
from reproduction.beyond.nonlinear_compression.following import (
    FullDescent,
    compressed,
    first_frames,
    first_layer_whole,
    late_start,
    later_frames,
    movement_frames,
    renewed,
)
from reproduction.beyond.nonlinear_compression.problems import Problem
from reproduction.style import BLUE, GREEN, GREY, ORANGE, PURPLE, figure_style

TITLE = "networks with an activation, trained in the subspaces of their first gradient (ICML 2024, §5)"
_DESK: dict[str, Any] = {
    "seeds": 3,
    "activations": ["identity", "tanh", "gelu", "relu"],
    "width": 64,
    "rank": 3,
    "depth": 3,
    "relative_init_scale": 0.1,
    "relative_lr": 0.3,
    "target_scale": 1.0,
    "stop_at_loss": 0.02,
    "slowdown_at_loss": 0.1,
    "patience": 3,
    "max_iter": 20_000,
    # what is varied, one at a time
    "widths": [32, 64, 128, 256],
    "depths": [2, 3, 4],
    "relative_init_scales": [0.3, 0.1, 0.03],
    "outer_lr_ratios": [0.0, 0.01, 0.1, 1.0],
    "frame_ranks": [3, 4, 6, 12],
    "target_scales": [0.1, 1.0, 10.0, 30.0],
    "later": [0.1, 0.3, 0.5],
    "renewals": [3, 10, 30],
    "studied_closely": ["gelu", "relu"],
    "digits": {"samples": 400, "components": 32, "ridge": 1e-3},
}
_SMALL: dict[str, Any] = {
    **_DESK,
    "seeds": 1,
    "activations": ["identity", "tanh", "relu"],
    "width": 32,
    "rank": 2,
    "relative_lr": 0.6,
    "stop_at_loss": 0.05,
    "patience": 2,
    "widths": [32],
    "depths": [],
    "relative_init_scales": [],
    "outer_lr_ratios": [0.1],
    "frame_ranks": [],
    "target_scales": [10.0],
    "later": [0.3],
    "renewals": [10],
    "studied_closely": ["relu"],
    "digits": {"samples": 60, "components": 20, "ridge": 1e-3},
}
# Fig. 9's width, rank and, in units of where ReLU's factors end, its ε = 1e-3
_PAPER: dict[str, Any] = {
    **_DESK,
    "widths": [1000],
    "rank": 5,
    "width": 1000,
    "relative_init_scale": 1.6e-4,
    "max_iter": 1_000_000,
}
SCALES = {"paper": _PAPER, "desk": _DESK, "small": _SMALL}
COMMITTED = "desk"

_FIRST = ("gradient", "lookahead", "random")
_ACTIVATIONS = {
    "identity": (GREY, "identity"),
    "tanh": (BLUE, "tanh"),
    "gelu": (GREEN, "GELU"),
    "relu": (ORANGE, "ReLU"),
}


def measure(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Every experiment in every cell at every seed; medians, and the range of what has one in the picture or the tables."""
    results: dict[str, Any] = {}
    for experiment in (_widths, _knobs, _target_scales, _choices_of_frames, _digits):
        for path, cell in experiment(settings):
            runs = [cell(seed + number) for number in range(settings["seeds"])]
            inside = results
            for step in path[:-1]:
                inside = inside.setdefault(step, {})
            inside[path[-1]] = {name: _summary([run[name] for run in runs]) for name in runs[0]}
            print(".".join(path), _told(inside[path[-1]]), flush=True)
    return {"results": results, "curves": {}}


Measures = dict[str, Any]
Cell = Callable[[int], dict[str, Measures]]
Cells = Iterator[tuple[tuple[str, ...], Cell]]


def _widths(settings: dict[str, Any]) -> Cells:
    """As the network grows; beside what frames taken from the movement itself do, and another start at full width."""
    for activation in settings["activations"]:
        for width in settings["widths"]:
            here = settings | {"width": width}

            def cell(seed: int, here: dict[str, Any] = here, activation: str = activation) -> dict[str, Measures]:
                full = _full(here, Problem.planted(here, activation, seed))
                frames = {name: first_frames(full.problem, name, here["rank"], seed) for name in _FIRST}
                frames["best"] = movement_frames(full, 1.0, here["rank"])
                runs = {name: _follow(here, full, these) for name, these in frames.items()}
                runs["gradient"] |= {"nonlinearity": full.nonlinearity()}
                other = Problem.planted(here, activation, seed).started_elsewhere(seed + 1000)
                runs["another_start"] = _measures(here, full, _full(here, other).prolonged(full.limit))
                return runs

            yield ("width", activation, str(width)), cell


def _knobs(settings: dict[str, Any]) -> Cells:
    """Depth, scale of the start, width of the frames, and whether these train."""
    for activation in settings["studied_closely"]:
        for knob, values in (("depth", settings["depths"]), ("relative_init_scale", settings["relative_init_scales"])):
            for value in values:
                yield (knob, activation, _key(value)), _first_frames_at(settings | {knob: value}, activation)
        for rank in settings["frame_ranks"]:
            yield ("frame_rank", activation, str(rank)), _first_frames_at(settings, activation, frame_rank=rank)
    for activation in settings["activations"]:
        for gamma in settings["outer_lr_ratios"]:
            yield (
                ("outer_lr_ratio", activation, _key(gamma)),
                _first_frames_at(settings, activation, outer_lr_ratio=gamma),
            )


def _first_frames_at(
    settings: dict[str, Any], activation: str, frame_rank: int | None = None, outer_lr_ratio: float = 0.0
) -> Cell:
    def cell(seed: int) -> dict[str, Measures]:
        full = _full(settings, Problem.planted(settings, activation, seed))
        rank = settings["rank"] if frame_rank is None else frame_rank
        return {
            name: _follow(settings, full, first_frames(full.problem, name, rank, seed), outer_lr_ratio)
            for name in ("gradient", "lookahead")
        }

    return cell


def _target_scales(settings: dict[str, Any]) -> Cells:
    """A larger target makes larger weights, and a smooth activation less linear."""
    for activation in ("tanh", "gelu", "relu"):
        for scale in settings["target_scales"]:
            here = settings | {"target_scale": scale}

            def cell(seed: int, here: dict[str, Any] = here, activation: str = activation) -> dict[str, Measures]:
                full = _full(here, Problem.planted(here, activation, seed))
                run = _follow(here, full, first_frames(full.problem, "gradient", here["rank"], seed))
                return {"gradient": run | {"nonlinearity": full.nonlinearity()}}

            yield ("target_scale", activation, _key(scale)), cell


def _choices_of_frames(settings: dict[str, Any]) -> Cells:
    """Everything that was tried for frames, on the paper's problem and on real inputs."""
    for activation in settings["studied_closely"]:
        for name, draw in (("planted", Problem.planted), ("digits", Problem.digits)):

            def cell(seed: int, draw: Any = draw, activation: str = activation) -> dict[str, Measures]:
                full = _full(settings, draw(settings | settings["digits"] | {"whitened": True}, activation, seed))
                return _all_choices(settings, full, seed)

            yield ("choice", activation, name), cell


def _all_choices(settings: dict[str, Any], full: FullDescent, seed: int) -> dict[str, Measures]:
    rank = full.problem.rank
    frames = {
        "gradient": first_frames(full.problem, "gradient", rank, seed),
        "lookahead": first_frames(full.problem, "lookahead", rank, seed),
        "first_layer_whole": first_layer_whole(full, rank, seed),
    }
    for share in settings["later"]:
        frames[f"gradient_at_{share:.0%}"] = later_frames(full, share, rank)
        frames[f"movement_until_{share:.0%}"] = movement_frames(full, share, rank)
    frames["best"] = movement_frames(full, 1.0, rank)
    runs = {name: _follow(settings, full, these) for name, these in frames.items()}
    runs["gradient"] |= {"first_gradient_share": _first_gradient_share(full, frames["gradient"])}
    for share in settings["later"]:
        runs[f"full_width_until_{share:.0%}"] = _measures(settings, full, late_start(full, share, rank))
    for times in settings["renewals"]:
        runs[f"renewed_{times}_times"] = _measures(settings, full, renewed(full, times, rank))
    return runs


def _digits(settings: dict[str, Any]) -> Cells:
    """Real inputs, with XXᵀ a multiple of I as the linear theory needs it, and as they are."""
    for kind in ("whitened", "as_they_are"):
        for activation in settings["activations"]:

            def cell(seed: int, kind: str = kind, activation: str = activation) -> dict[str, Measures]:
                of = settings | settings["digits"] | {"whitened": kind == "whitened"}
                full = _full(settings, Problem.digits(of, activation, seed))
                rank = full.problem.rank
                frames = {name: first_frames(full.problem, name, rank, seed) for name in _FIRST}
                frames["best"] = movement_frames(full, 1.0, rank)
                runs = {name: _follow(settings, full, these) for name, these in frames.items()}
                runs["gradient"] |= {"nonlinearity": full.nonlinearity()}
                return runs

            yield ("digits", kind, activation), cell


def _full(settings: dict[str, Any], problem: Problem) -> FullDescent:
    return FullDescent.run(problem, settings["stop_at_loss"], settings["patience"], settings["max_iter"])


def _measures(settings: dict[str, Any], full: FullDescent, outputs: Iterator[Tensor]) -> Measures:
    return full.followed_by(outputs, settings["slowdown_at_loss"])


def _follow(settings: dict[str, Any], full: FullDescent, frames: list[Frames], outer_lr_ratio: float = 0.0) -> Measures:
    outputs, captured = compressed(full, frames, outer_lr_ratio)
    return _measures(settings, full, outputs) | {"captured": captured}


def _first_gradient_share(full: FullDescent, frames: list[Frames]) -> dict[str, float]:
    gradients = network_gradients(full.problem.start, full.problem.target, full.problem.inputs)
    return {
        str(layer): captured_share(pair, G)
        for layer, (pair, G) in enumerate(zip(frames, gradients, strict=True), start=1)
    }


def _summary(runs: list[Measures]) -> Measures:
    """The median of every measure; of gap and slowdown the range over the seeds too."""
    summary: Measures = {}
    for name, value in runs[0].items():
        if isinstance(value, dict):
            summary[name] = {layer: median(run[name][layer] for run in runs) for layer in value}
        else:
            summary[name] = median(run[name] for run in runs)
            if name == "arrived":
                summary[name] = sum(run[name] for run in runs)
            if name in ("gap", "slowdown"):
                values = [run[name] for run in runs]
                summary[f"{name}_range"] = {"low": min(values), "high": max(values)}
    return summary


def draw(record: dict[str, Any]) -> Figure:
    """Above: where the first gradient's frames are enough; below: what helps ReLU, for which they are not."""
    results, settings = record["results"], record["settings"]
    with figure_style():
        figure = Figure(figsize=(8.6, 6.2))
        above, below = figure.subfigures(2, 1, height_ratios=[1, 1.15])
        _gap_against_width(above.subplots(1, 2)[0], results["width"], settings)
        _gap_against_nonlinearity(above.axes[1], results, settings)
        captured, slowdown = below.subplots(1, 2, sharey=True)
        choices = results["choice"]["relu"]
        rows = [name for name in _CHOICES if name in choices["planted"]][::-1]
        _captured(captured, choices["planted"], rows, settings)
        _slowdowns(slowdown, choices, rows, settings)
        captured.set_yticks(range(len(rows)), [_CHOICES[name] for name in rows])
        return figure


# those of all that were tried which the picture shows, from top to bottom
_CHOICES = {
    "gradient": "first gradient",
    "lookahead": "first gradient and one step ahead",
    "first_layer_whole": "first gradient, layer 1 trained whole",
    "gradient_at_30%": "gradient after 30 % of the steps",
    "movement_until_30%": "sum of gradients until 30 %",
    "movement_until_50%": "sum of gradients until 50 %",
    "full_width_until_30%": "full width until 30 %, then frames",
    "renewed_3_times": "frames renewed 3 times",
    "renewed_10_times": "frames renewed 10 times",
    "renewed_30_times": "frames renewed 30 times",
    "best": "best frames, in hindsight",
}


def _gap_against_width(axes: Axes, results: dict[str, Any], settings: dict[str, Any]) -> None:
    for activation, cells in results.items():
        colour, label = _ACTIVATIONS[activation]
        widths = [int(width) for width in cells]
        for frames, line in (("gradient", "o-"), ("lookahead", "o--")):
            if frames == "lookahead" and activation != "relu":
                continue
            gaps = [cell[frames]["gap"] for cell in cells.values()]
            low, high = ([cell[frames]["gap_range"][end] for cell in cells.values()] for end in ("low", "high"))
            told = label if frames == "gradient" else f"{label}, one step ahead"
            axes.plot(widths, gaps, line, color=colour, label=told, markersize=4)
            axes.fill_between(widths, low, high, color=colour, alpha=0.15, linewidth=0)
    random = [[cell["random"]["gap"] for cell in cells.values()] for cells in results.values()]
    axes.plot(widths, [min(column) for column in zip(*random, strict=True)], "k:", label="random frames, at best")
    axes.set(xscale="log", yscale="log", xlabel="width d", ylabel="largest gap ‖f − f_C‖ / ‖Φ‖")
    axes.set(title=f"Planted rank {settings['rank']}, X = I: gap against width", xticks=widths)
    axes.set_xticklabels([str(width) for width in widths])
    axes.minorticks_off()
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 0.1), ncols=2, columnspacing=1.0)


def _gap_against_nonlinearity(axes: Axes, results: dict[str, Any], settings: dict[str, Any]) -> None:
    for activation, cells in results["target_scale"].items():
        colour, label = _ACTIVATIONS[activation]
        runs = [cell["gradient"] for cell in cells.values()]
        axes.plot([run["nonlinearity"] for run in runs], [run["gap"] for run in runs], "o-", color=colour, label=label)
    for activation in ("tanh", "gelu"):
        runs = [cell["gradient"] for cell in results["width"].get(activation, {}).values()]
        colour = _ACTIVATIONS[activation][0]
        axes.plot([run["nonlinearity"] for run in runs], [run["gap"] for run in runs], "x", color=colour, markersize=6)
    axes.plot([], [], "x", color=GREY, markersize=6, label="the widths on the left")
    for kind, marker in (("whitened", "s"), ("as_they_are", "^")):
        for activation, cell in results["digits"][kind].items():
            if activation != "identity":
                run = cell["gradient"]
                axes.plot(run["nonlinearity"], run["gap"], marker, color=_ACTIVATIONS[activation][0], markersize=7)
        axes.plot([], [], marker, color=GREY, markersize=7, label=f"digits, {kind.replace('_', ' ')}")
    axes.set(yscale="log", xlabel="nonlinearity ‖σ(H) − cH‖ / ‖σ(H)‖, largest", ylabel="largest gap ‖f − f_C‖ / ‖Φ‖")
    axes.set_title(f"d = {settings['width']}: gap against how nonlinear σ acts")
    axes.legend(loc="lower right")


def _captured(axes: Axes, runs: dict[str, Any], rows: list[str], settings: dict[str, Any]) -> None:
    for layer, marker, colour in zip(range(1, settings["depth"] + 1), "o^s", (PURPLE, BLUE, GREEN), strict=False):
        known = [(runs[name]["captured"][str(layer)], row) for row, name in enumerate(rows) if "captured" in runs[name]]
        axes.plot(*zip(*known, strict=True), marker, color=colour, label=f"layer {layer}", linestyle="none")
    axes.set(xlim=(0, 1.04), xlabel="share of a layer's movement")
    axes.set_title("ReLU, planted: held by the frames")
    axes.legend(loc="lower left")


def _slowdowns(axes: Axes, choices: dict[str, Any], rows: list[str], settings: dict[str, Any]) -> None:
    for problem, marker, colour, shift in (("planted", "o", ORANGE, 0.14), ("digits", "s", BLUE, -0.14)):
        for row, name in enumerate(rows):
            run = choices[problem][name]
            there = run["arrived"] == settings["seeds"]
            spread = run["slowdown_range"]
            axes.plot([spread["low"], spread["high"]], [row + shift] * 2, color=colour, linewidth=1.2)
            axes.plot(
                run["slowdown"],
                row + shift,
                marker,
                color=colour,
                markersize=5.5,
                fillstyle="full" if there else "none",
            )
        axes.plot([], [], marker, color=colour, label=problem)
    axes.plot([], [], "o", color=GREY, fillstyle="none", label="not all seeds arrive")
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set(xlabel="iterations, full width = 1")
    axes.set_title(f"ReLU: slowdown to a loss of {settings['slowdown_at_loss']:.0%}")
    axes.legend(loc="lower right")


def _told(runs: dict[str, Measures]) -> str:
    return ", ".join(f"{name} {run['gap']:.3f} ×{run['slowdown']:.2f}" for name, run in runs.items())


def _key(value: float) -> str:
    """Without a dot, which would lead on into the results."""
    return str(value) if isinstance(value, int) else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
