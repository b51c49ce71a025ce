"""Fig. 2 of the 2025 overview: the last layer's activations as training with dropout proceeds."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reproduction.overview25.masked_training import (
    RESNET,
    RESNET_DESK,
    RESNET_SMALL,
    SYNTHETIC,
    SYNTHETIC_SMALL,
    masked_run,
    predicted_last_layer,
    samples_of,
)
from reproduction.style import BLUE, GREEN, ORANGE, figure_style

TITLE = "singular values of last-layer activations over epochs of dropout training (Fig. 2)"
_PAPER: dict[str, Any] = {
    "rate": 0.6,
    "networks": {
        "linear": SYNTHETIC | {"seeds": 3},
        "perceptron": SYNTHETIC | {"seeds": 3},
        "residual": RESNET | {"seeds": 3},
    },
    "looks": 20,
}
_DESK: dict[str, Any] = {
    **_PAPER,
    "networks": _PAPER["networks"] | {"residual": RESNET_DESK | {"epochs": 20, "seeds": 2}},
}
_SMALL: dict[str, Any] = {
    **_PAPER,
    "networks": {
        "linear": SYNTHETIC_SMALL | {"seeds": 1},
        "perceptron": SYNTHETIC_SMALL | {"seeds": 1},
        "residual": RESNET_SMALL | {"seeds": 1},
    },
    "looks": 3,
}
SCALES = {"paper": _PAPER, "desk": _DESK, "small": _SMALL}
COMMITTED = "desk"
NEEDS_DATA = True  # a folder named by RANKWISE_DATA

_NETWORKS = {
    "linear": (BLUE, "Deep linear network"),
    "perceptron": (GREEN, "Multi-layer perceptron"),
    "residual": (ORANGE, "ResNet, CIFAR-10"),
}
# of the ResNet's 128, those that the picture shows
_SHOWN = 20


def measure(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Several starts on the same data for every network; spectra and ranks at the same epochs."""
    results: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    networks = settings["networks"]
    data = {name: samples_of(network, seed) for name, network in networks.items()}
    for name, network in networks.items():
        epochs = sorted({round(epoch) for epoch in np.linspace(0, network["epochs"], settings["looks"] + 1)})
        runs = []
        for trial in range(network["seeds"]):
            runs.append(masked_run(name, network, data[name], settings["rate"], 1000 * seed + trial, epochs))
            print(f"{name}, start {trial}: effective rank {runs[-1][-1]['last']['effective_rank']:.3f}", flush=True)
        results[name], curves[name] = _over_starts(runs)
    at_minimum = predicted_last_layer(data["linear"], networks["linear"]["layers"], settings["rate"])
    curves["linear"]["predicted"] = at_minimum.pop("singular_values")
    results["linear"]["predicted"] = at_minimum
    trained = np.array(curves["linear"]["singular_values"]["mean"][-1])
    results["linear"]["gap_to_predicted"] = float(
        np.abs(trained - curves["linear"]["predicted"]).max() / curves["linear"]["predicted"][0]
    )
    return {"results": results, "curves": curves}


def _over_starts(runs: list[list[dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Means over the starts at the first and last epoch; the curves with their lowest and highest."""
    values = np.array([[look["last"]["singular_values"][:_SHOWN] for look in run] for run in runs])
    curves: dict[str, Any] = {
        "epoch": [look["epoch"] for look in runs[0]],
        "singular_values": {
            "mean": values.mean(0).tolist(),
            "low": values.min(0).tolist(),
            "high": values.max(0).tolist(),
        },
    }
    results: dict[str, Any] = {}
    for rank in ("effective_rank", "energy_rank", "visible"):
        ranks = np.array([[float(look["last"][rank]) for look in run] for run in runs])
        curves[rank] = {"mean": ranks.mean(0).tolist(), "low": ranks.min(0).tolist(), "high": ranks.max(0).tolist()}
        results[rank] = {
            "start": float(ranks[:, 0].mean()),
            "end": float(ranks[:, -1].mean()),
            "end_over_start": float((ranks[:, -1] / ranks[:, 0]).mean()),
        }
    for number in ("loss", "accuracy"):
        if number in runs[0][-1]:
            results[number] = {
                "start": float(np.mean([run[0][number] for run in runs])),
                "end": float(np.mean([run[-1][number] for run in runs])),
            }
    return results, curves


def draw(record: dict[str, Any]) -> Figure:
    """Above the singular values, one line each; below the ranks they amount to."""
    with figure_style():
        figure = Figure(figsize=(8.6, 4.9))
        axes = figure.subplots(2, 3, sharex="col")
        for (upper, lower), (name, (colour, title)) in zip(axes.T, _NETWORKS.items(), strict=True):
            curve = record["curves"][name]
            _spectra(upper, curve, colour)
            if "predicted" in curve:
                predicted = [value for value in curve["predicted"] if value > 0.01]
                upper.plot(
                    [curve["epoch"][-1]] * len(predicted),
                    predicted,
                    "o",
                    color="black",
                    markersize=4,
                    label="predicted",
                    clip_on=False,
                )
                upper.legend(loc=(0.5, 0.44))
            _ranks(lower, curve, colour)
            upper.set(title=title)
            lower.set(xlabel="epoch")
        axes[0, 0].set(ylabel="singular values / √samples")
        axes[1, 0].set(ylabel="rank of the activations")
        axes[1, 0].legend()
        return figure


def _spectra(axes: Axes, curve: dict[str, Any], colour: str) -> None:
    values = {which: np.array(numbers) for which, numbers in curve["singular_values"].items()}
    for i in range(values["mean"].shape[1]):
        shade = 1 - 0.7 * i / values["mean"].shape[1]
        axes.plot(curve["epoch"], values["mean"][:, i], color=colour, alpha=shade, linewidth=1.2)
        axes.fill_between(
            curve["epoch"], values["low"][:, i], values["high"][:, i], color=colour, alpha=0.12, linewidth=0
        )
    axes.set_ylim(bottom=0)


def _ranks(axes: Axes, curve: dict[str, Any], colour: str) -> None:
    for rank, style, label in (
        ("effective_rank", "-", "effective, weighs σ"),
        ("energy_rank", "--", "effective, weighs σ²"),
    ):
        axes.plot(curve["epoch"], curve[rank]["mean"], style, color=colour, label=label)
        axes.fill_between(
            curve["epoch"], curve[rank]["low"], curve[rank]["high"], color=colour, alpha=0.15, linewidth=0
        )
    axes.set_ylim(bottom=0)
