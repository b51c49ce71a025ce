"""Fig. 9 of the 2025 overview: the first and last layers' activations after training with more and more dropout."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rankwise.regularization import dropout_rate_for_rank
from reproduction.overview25.masked_training import (
    RESNET,
    RESNET_DESK,
    RESNET_SMALL,
    SYNTHETIC,
    SYNTHETIC_SMALL,
    bounding_last_layer,
    masked_run,
    predicted_last_layer,
    samples_of,
)
from reproduction.style import BLUE, GREEN, GREY, ORANGE, PURPLE, figure_style

TITLE = "singular values of first- and last-layer activations against the dropout rate (Fig. 9)"
_RATES = [0.0, 0.2, 0.4, 0.6, 0.8]


def _networks(synthetic: dict[str, Any], residual: dict[str, Any], seeds: int, image_seeds: int) -> dict[str, Any]:
    drawn = synthetic | {"rates": _RATES, "seeds": seeds}
    return {
        "two_linear": {"kind": "linear"} | drawn | {"layers": 2},
        "linear": {"kind": "linear"} | drawn,
        "perceptron": {"kind": "perceptron"} | drawn,
        "residual": {"kind": "residual"} | residual | {"rates": [0.0, 0.4, 0.6, 0.8], "seeds": image_seeds},
    }


_PAPER: dict[str, Any] = {"networks": _networks(SYNTHETIC, RESNET, 3, 3)}
_DESK: dict[str, Any] = {"networks": _networks(SYNTHETIC, RESNET_DESK, 3, 2)}
_SMALL: dict[str, Any] = {
    "networks": {
        name: network | {"rates": [0.0, 0.6]}
        for name, network in _networks(SYNTHETIC_SMALL, RESNET_SMALL, 1, 1).items()
    }
}
SCALES = {"paper": _PAPER, "desk": _DESK, "small": _SMALL}
COMMITTED = "desk"
NEEDS_DATA = True  # a folder named by RANKWISE_DATA

_TITLES = {
    "two_linear": "Two linear layers",
    "linear": "Three linear layers",
    "perceptron": "Perceptron",
    "residual": "ResNet, CIFAR-10",
}
_COLOURS = dict(zip(_RATES, (GREY, GREEN, BLUE, PURPLE, ORANGE), strict=True))
_RANKS = ("effective_rank", "energy_rank", "visible")


def measure(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Every network trained at every rate, several starts on the same data, and what is predicted of the linear ones."""
    results: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    data = {name: samples_of(network, seed) for name, network in settings["networks"].items()}
    for name, network in settings["networks"].items():
        results[name], curves[name] = {}, {}
        for rate in network["rates"]:
            ends = []
            for trial in range(network["seeds"]):
                (end,) = masked_run(
                    network["kind"], network, data[name], rate, 1000 * seed + trial, [network["epochs"]]
                )
                ends.append(end)
            key = f"rate_{round(100 * rate)}"
            results[name][key], curves[name][key] = _over_starts(ends)
            if network["kind"] == "linear":
                _compare(results[name][key], curves[name][key], ends, data[name], network["layers"], rate)
            print(f"{name}, rate {rate}: {results[name][key]}", flush=True)
        by_rate = list(results[name].values())
        for layer in ("first", "last"):
            ranks = [at[layer]["effective_rank"] for at in by_rate]
            results[name][f"{layer}_highest_rate_over_none"] = ranks[-1] / ranks[0]
            results[name][f"{layer}_largest_rise"] = max(np.diff(ranks).tolist())
    two = settings["networks"]["two_linear"]
    X, Y = data["two_linear"].inputs.T, data["two_linear"].targets.T
    curves["rate_for_rank"] = {
        str(rank): dropout_rate_for_rank(X, Y, rank, width=two["size"]) for rank in range(1, two["rank"] + 1)
    }
    return {"results": results, "curves": curves}


def _over_starts(ends: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean ranks of both layers, held-out loss and accuracy; the mean spectra and the single starts' ranks."""
    results: dict[str, Any] = {"loss": float(np.mean([end["loss"] for end in ends]))}
    if "accuracy" in ends[0]:
        results["accuracy"] = float(np.mean([end["accuracy"] for end in ends]))
    curves: dict[str, Any] = {}
    for layer in ("first", "last"):
        results[layer] = {rank: float(np.mean([end[layer][rank] for end in ends])) for rank in _RANKS}
        curves[layer] = {
            "singular_values": np.mean([end[layer]["singular_values"] for end in ends], axis=0).tolist(),
            "effective_rank": [end[layer]["effective_rank"] for end in ends],
        }
    return results, curves


def _compare(
    results: dict[str, Any], curves: dict[str, Any], ends: list[dict[str, Any]], samples: Any, layers: int, rate: float
) -> None:
    """The spectrum predicted of the last layer, and how far off the start that is furthest off is, in parts of σ₁."""
    predicted = predicted_last_layer(samples, layers, rate)
    curves["predicted"] = predicted["singular_values"]
    results["predicted"] = {rank: predicted[rank] for rank in _RANKS}
    bounding = bounding_last_layer(samples, layers, rate)
    results["bounding"] = {rank: bounding[rank] for rank in _RANKS}
    trained = np.array([end["last"]["singular_values"] for end in ends])
    results["gap_to_predicted"] = float(np.abs(trained - curves["predicted"]).max() / curves["predicted"][0])


def draw(record: dict[str, Any]) -> Figure:
    """A column for each network: first and last spectra, one colour a rate, then their effective ranks by rate."""
    curves = record["curves"]
    with figure_style():
        figure = Figure(figsize=(7.4, 4.9))
        axes = figure.subplots(3, len(_TITLES))
        for column, (name, title) in zip(axes.T, _TITLES.items(), strict=True):
            rates = record["settings"]["networks"][name]["rates"]
            at = {rate: curves[name][f"rate_{round(100 * rate)}"] for rate in rates}
            _spectra(column[0], at, "first")
            _spectra(column[1], at, "last")
            _ranks(column[2], at, record["results"][name])
            column[0].set_title(title, fontsize=9)
        for panel in axes[:2, 1:].flat:
            panel.tick_params(labelleft=False)
        axes[0, 0].set(ylabel="first: σ / √samples")
        axes[1, 0].set(ylabel="last: σ / √samples")
        axes[2, 0].set(ylabel="effective rank")
        # the lowest right panels have room
        for rate in record["settings"]["networks"]["linear"]["rates"]:
            axes[1, 3].plot([], [], color=_COLOURS[rate], label=f"rate {rate:g}")
        axes[1, 3].legend(loc="lower left", ncols=2, fontsize=7, handlelength=1, columnspacing=0.8)
        for panel, how in ((axes[1, 0], "closed form"), (axes[1, 1], "equal shares")):
            panel.plot([], [], "o", color="black", fillstyle="none", markersize=4, label=how)
            panel.legend(loc="upper right", fontsize=7.5)
        axes[2, 0].legend(loc="lower left", fontsize=7)
        return figure


def _spectra(axes: Axes, at: dict[float, Any], layer: str) -> None:
    shown = 20
    for rate, curve in at.items():
        values = np.array(curve[layer]["singular_values"][:shown])
        index = np.arange(1, len(values) + 1)
        axes.plot(index, values, color=_COLOURS[rate], linewidth=1.3)
        if layer == "last" and "predicted" in curve:
            predicted = np.array(curve["predicted"][:shown])
            there = predicted > 1e-3
            axes.plot(index[there], predicted[there], "o", color=_COLOURS[rate], fillstyle="none", markersize=4)
    axes.set(yscale="log", yticks=[1e-3, 1e-2, 1e-1, 1, 10], xlabel="index" if layer == "last" else None)
    axes.minorticks_off()
    axes.set_ylim(1e-3, 20)


def _ranks(axes: Axes, at: dict[float, Any], results: dict[str, Any]) -> None:
    for layer, colour in (("first", BLUE), ("last", ORANGE)):
        ranks = [curve[layer]["effective_rank"] for curve in at.values()]
        axes.plot(list(at), [np.mean(rank) for rank in ranks], "o-", color=colour, markersize=3, label=f"{layer} layer")
        axes.fill_between(
            list(at), [min(rank) for rank in ranks], [max(rank) for rank in ranks], color=colour, alpha=0.2, linewidth=0
        )
    keys = [f"rate_{round(100 * rate)}" for rate in at]
    if "predicted" in results[keys[0]]:
        predicted = [results[key]["predicted"]["effective_rank"] for key in keys]
        axes.plot(list(at), predicted, "o", color="black", fillstyle="none", markersize=6, label="last, predicted")
    axes.set(xlabel="dropout rate", xticks=[0, 0.4, 0.8])
    axes.set_ylim(bottom=0)
