"""Fig. 9 of the ICML 2024 paper: the spectrum of a nonlinear factorization's gradient at its start."""

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rankwise.factorizations import DeepLinear, DeepNetwork, gradient_spectrum, network_gradients
from reproduction.planted import low_rank_target
from reproduction.style import BLUE, GREEN, GREY, ORANGE, PURPLE, figure_style

TITLE = "spectrum of ∇W₂ of a nonlinear factorization at its start, ReLU and others (Fig. 9)"
_PAPER: dict[str, Any] = {
    "size": 1000,
    "rank": 5,
    "depth": 3,
    "layer": 2,
    "init_scale": 1e-3,
    "activations": ["relu", "gelu", "tanh", "identity"],
    "seeds": 3,
    "smaller_sizes": [250, 500],
}
_SMALL: dict[str, Any] = {**_PAPER, "size": 300, "rank": 3, "smaller_sizes": [80]}
SCALES = {"paper": _PAPER, "small": _SMALL}
COMMITTED = "paper"

_COLOURS = {"relu": BLUE, "gelu": ORANGE, "tanh": PURPLE, "identity": GREY}
_LEADING = 12


def measure(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Every activation once; ReLU at several seeds and sizes, as it is and with its mean direction taken out."""
    size, rank = settings["size"], settings["rank"]
    by_activation = {
        name: gradient_spectrum(*_network(name, size, settings, seed), layer=settings["layer"])
        for name in settings["activations"]
    }
    results: dict[str, Any] = {
        "activations": {
            name: {"gap": float(spectrum[rank - 1] / spectrum[rank])} for name, spectrum in by_activation.items()
        },
        "relu": {},
    }
    leading: dict[str, list[list[float]]] = {"relu": [], "centred": []}
    for at_size in [*settings["smaller_sizes"], size]:
        runs = []
        for number in range(seed, seed + settings["seeds"]):
            found, as_it_is, centred = _relu(at_size, settings, number)
            runs.append(found)
            if at_size == size:
                for kind, spectrum in (("relu", as_it_is), ("centred", centred)):
                    leading[kind].append((spectrum[:_LEADING] / as_it_is[0]).tolist())
        results["relu"][str(at_size)] = {
            "seeds": {str(seed + number): found for number, found in enumerate(runs)},
            "smallest": {key: min(found[key] for found in runs) for key in runs[0]},
            "largest": {key: max(found[key] for found in runs) for key in runs[0]},
        }
        print(f"d = {at_size}: {results['relu'][str(at_size)]}", flush=True)
    kept = sorted({min(int(1.13**power), size) for power in range(60)} | set(range(1, 2 * rank)))
    curves = {
        "index": kept,
        "spectrum": {
            name: [float(spectrum[at - 1] / spectrum[0]) for at in kept] for name, spectrum in by_activation.items()
        },
        "leading": leading,
    }
    return {"results": results, "curves": curves}


def _network(activation: str, size: int, settings: dict[str, Any], seed: int) -> tuple[DeepNetwork, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    deep = DeepLinear.orthogonal(
        size, settings["depth"], settings["init_scale"], generator=generator, dtype=torch.float64
    )
    return DeepNetwork(deep.weights, activation), low_rank_target(size, settings["rank"], seed)


def _relu(size: int, settings: dict[str, Any], seed: int) -> tuple[dict[str, float], Tensor, Tensor]:
    """Gaps after σ_r and after σ_{r+1}, the first again without what the gradient does to 𝟙; and what a cut at either keeps.

    σ(W_1) ≥ 0 has the mean ε/√(2πd): a part 𝟙𝟙ᵀ of norm 0.4·ε√d beside a rest of norm about ε. Along it comes through, so much
    stronger, what the step function makes of W_3ᵀE beyond rank r, as one more singular value outside the bulk. What a linear network would train on this side is W_1 V_r, V_r the right
    singular vectors of Φ: given is the cosine of its angle to the leading r and r + 1 right singular vectors, at its worst.
    """
    r = settings["rank"]
    network, target = _network("relu", size, settings, seed)
    gradient = network_gradients(network, target)[settings["layer"] - 1]
    _, spectrum, Vh = torch.linalg.svd(gradient)
    constant = torch.full((size,), size**-0.5, dtype=torch.float64)
    centred = torch.linalg.svdvals(gradient - torch.outer(gradient @ constant, constant))
    trained = network.weights[0].detach() @ torch.linalg.svd(target)[2][:r].T / settings["init_scale"]
    found = {
        "gap_after_rank": float(spectrum[r - 1] / spectrum[r]),
        "gap_after_rank_plus_one": float(spectrum[r] / spectrum[r + 1]),
        "gap_after_rank_centred": float(centred[r - 1] / centred[r]),
        "constant_in_first_and_next": float((Vh[[0, r]] @ constant).norm()),
        "worst_kept_of_trained_at_rank": float(torch.linalg.svdvals(Vh[:r] @ trained)[-1]),
        "worst_kept_of_trained_at_rank_plus_one": float(torch.linalg.svdvals(Vh[: r + 1] @ trained)[-1]),
    }
    return found, spectrum, centred


def draw(record: dict[str, Any]) -> Figure:
    """All activations over the whole spectrum; ReLU's leading values; its gaps against the width."""
    curves, results, settings = record["curves"], record["results"], record["settings"]
    rank, size = settings["rank"], settings["size"]
    with figure_style():
        figure = Figure(figsize=(9.6, 3.4))
        whole, leading, gaps = figure.subplots(1, 3)
        for name, values in curves["spectrum"].items():
            style = "--" if name == "identity" else "-"
            whole.loglog(curves["index"], values, style, color=_COLOURS[name], label=name)
        whole.set(title=f"∇W₂ at the start, d = {size}", xlabel="i", ylabel="σᵢ/σ₁", ylim=(1e-13, 3))
        whole.legend(loc="center right")

        index = range(1, _LEADING + 1)
        for kind, colour, marker in (("relu", BLUE, "o"), ("centred", GREEN, "x")):
            for values in curves["leading"][kind]:
                leading.plot(index, values, marker, color=colour, markersize=4, alpha=0.7)
            leading.plot([], [], marker, color=colour, label="ReLU" if kind == "relu" else "without its mean")
        leading.axvline(rank + 0.5, color=GREY, linewidth=1, linestyle=":")
        leading.text(rank + 0.4, 0.93, f"r* = {rank}", color="#555555", ha="right")
        leading.set(title=f"ReLU, {settings['seeds']} seeds", xlabel="i", yscale="log", xticks=list(index)[::2])
        leading.legend(loc="upper right")

        for key, colour, label in (
            ("gap_after_rank", BLUE, f"σ{rank}/σ{rank + 1}"),
            ("gap_after_rank_plus_one", ORANGE, f"σ{rank + 1}/σ{rank + 2}"),
            ("gap_after_rank_centred", GREEN, f"σ{rank}/σ{rank + 1} without its mean"),
        ):
            sizes = list(results["relu"])
            runs = [[found[key] for found in results["relu"][at]["seeds"].values()] for at in sizes]
            for at, values in zip(sizes, runs, strict=True):
                gaps.plot([int(at)] * len(values), values, "o", color=colour, markersize=4, alpha=0.7)
            means = [sum(values) / len(values) for values in runs]
            gaps.plot([int(at) for at in sizes], means, color=colour, label=label)
        gaps.set(title="ReLU: gaps against width", xlabel="d", ylim=(0, 7.5))
        gaps.legend(loc="upper left")
        return figure
