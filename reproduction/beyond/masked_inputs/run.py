"""Does masking inputs lower the rank of what is learned? A masked autoencoder on Fashion-MNIST, by mask ratio.

The overview (§4.4) leaves the rank of masked autoencoders' features open and quotes Zhang et al. (2022, "How mask matters"):
at convergence their effective rank is lower than at the random start.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from rankwise.spectral import effective_rank
from reproduction.image_data import Samples, image_samples
from reproduction.style import BLUE, GREEN, GREY, ORANGE, PURPLE, figure_style

TITLE = "effective rank of a masked autoencoder's features against the mask ratio"
# "paper" is the size at which MAE's own recipe would be run on this data set; there is no paper's figure
_PAPER: dict[str, Any] = {
    "ratios": [0.0, 0.25, 0.5, 0.75, 0.9],
    "samples": 30_000,
    "held_out": 10_000,
    "patch": 4,
    "width": 64,
    "layers": 4,
    "heads": 4,
    "decoder_layers": 2,
    "learning_rate": 1e-3,
    "batch": 128,
    "epochs": 100,
    "looks": 10,
    "seeds": 3,
}
# patches of 7 × 7 make 16 of an image instead of 49, and a step three times cheaper; 0.9 hides 14 of them
_DESK: dict[str, Any] = {
    **_PAPER,
    "samples": 10_000,
    "held_out": 5000,
    "patch": 7,
    "layers": 2,
    "decoder_layers": 1,
    "epochs": 20,
    "looks": 5,
}
_SMALL: dict[str, Any] = {
    **_DESK,
    "ratios": [0.0, 0.75],
    "samples": 1024,
    "held_out": 512,
    "batch": 64,
    "epochs": 3,
    "looks": 1,
    "seeds": 1,
}
SCALES = {"paper": _PAPER, "desk": _DESK, "small": _SMALL}
COMMITTED = "desk"
NEEDS_DATA = True  # a folder named by RANKWISE_DATA


def measure(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Every mask ratio from the same starts; ranks and probes of the unmasked test images' features as training goes."""
    samples = image_samples("fashion_mnist", settings["samples"], settings["held_out"])
    epochs = sorted({round(epoch) for epoch in np.linspace(0, settings["epochs"], settings["looks"] + 1)})
    curves: dict[str, Any] = {"epoch": epochs}
    results: dict[str, Any] = {}
    for ratio in settings["ratios"]:
        runs = []
        for trial in range(settings["seeds"]):
            runs.append(list(_looks(samples, settings, ratio, 1000 * seed + trial, epochs)))
            print(f"ratio {ratio}, start {trial}: {runs[-1][0]} to {runs[-1][-1]}", flush=True)
        key = f"ratio_{round(100 * ratio)}"
        curves[key] = {number: [[look[number] for look in run] for run in runs] for number in runs[0][0]}
        results[key] = {number: float(np.mean([run[-1][number] for run in runs])) for number in runs[0][0]}
        # the starts are the same for every ratio
        results["start"] = {number: float(np.mean([run[0][number] for run in runs])) for number in runs[0][0]}
    first, last = (f"ratio_{round(100 * settings['ratios'][i])}" for i in (0, -1))
    for rank in ("pooled_rank", "token_rank"):
        results[f"{rank}_most_masked_over_unmasked"] = results[last][rank] / results[first][rank]
        results[f"{rank}_most_masked_over_start"] = results[last][rank] / results["start"][rank]
        results[f"{rank}_unmasked_over_start"] = results[first][rank] / results["start"][rank]
    return {"results": results, "curves": curves}


class MaskedAutoencoder(nn.Module):
    """An encoder that sees only the patches that are kept, and a smaller decoder that draws all of them (MAE, He et al. 2022).

    Args:
        places: patches of an image.
        pixels: numbers in a patch.
        width, heads: of both transformers.
        layers, decoder_layers: their depths.
    """

    def __init__(self, places: int, pixels: int, width: int, heads: int, layers: int, decoder_layers: int):
        super().__init__()
        self.embed, self.place = nn.Linear(pixels, width), nn.Parameter(0.02 * torch.randn(places, width))
        self.encoder = nn.Sequential(*[_layer(width, heads) for _ in range(layers)], nn.LayerNorm(width))
        self.hidden, self.decoder_place = (
            nn.Parameter(torch.zeros(width)),
            nn.Parameter(0.02 * torch.randn(places, width)),
        )
        self.decoder = nn.Sequential(
            *[_layer(width, heads) for _ in range(decoder_layers)], nn.LayerNorm(width), nn.Linear(width, pixels)
        )

    def encode(self, patches: Tensor, kept: Tensor) -> Tensor:
        """Features (images, kept, width) of the patches (images, places, pixels) at the places ``kept`` (images, kept)."""
        tokens = self.embed(patches) + self.place
        return self.encoder(tokens.take_along_dim(kept.unsqueeze(-1), 1))

    def forward(self, patches: Tensor, kept: Tensor) -> Tensor:
        """All patches, drawn from the kept ones."""
        seen = self.encode(patches, kept)
        tokens = self.hidden.expand(len(patches), patches.shape[1], -1)
        tokens = tokens.scatter(1, kept.unsqueeze(-1).expand_as(seen), seen)
        return self.decoder(tokens + self.decoder_place)


def _layer(width: int, heads: int) -> nn.Module:
    return nn.TransformerEncoderLayer(
        width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


def in_patches(images: Tensor, patch: int) -> Tensor:
    """(images, places, patch²) of grey (images, 1, height, width)."""
    return nn.functional.unfold(images, patch, stride=patch).mT.contiguous()


def masked_loss(network: MaskedAutoencoder, patches: Tensor, ratio: float) -> Tensor:
    """Mean squared error at the masked patches; at all of them where none is masked. Each image draws its own mask."""
    places = patches.shape[1]
    order = torch.rand(patches.shape[:2]).argsort(1)
    kept, hidden = order.split([places - round(ratio * places), round(ratio * places)], dim=1)
    judged = (hidden if ratio else kept).unsqueeze(-1)
    error = network(patches, kept) - patches
    return error.take_along_dim(judged, 1).square().mean()


def _looks(
    samples: Samples, settings: dict[str, Any], ratio: float, seed: int, epochs: list[int]
) -> Iterator[dict[str, float]]:
    """AdamW from one start; what is seen after each of the given epochs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        patches, held_out = (
            in_patches(images, settings["patch"]) for images in (samples.inputs, samples.held_out_inputs)
        )
        _, places, pixels = patches.shape
        network = MaskedAutoencoder(
            places,
            pixels,
            settings["width"],
            settings["heads"],
            settings["layers"],
            settings["decoder_layers"],
        )
        optimizer = torch.optim.AdamW(network.parameters(), lr=settings["learning_rate"], weight_decay=0.05)
        for epoch in range(settings["epochs"] + 1):
            if epoch in epochs:
                yield _look(network, patches, held_out, samples, ratio)
            if epoch < settings["epochs"]:
                for batch in torch.randperm(len(patches)).split(settings["batch"]):
                    loss = masked_loss(network, patches[batch], ratio)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()


def _look(
    network: MaskedAutoencoder, patches: Tensor, held_out: Tensor, samples: Samples, ratio: float
) -> dict[str, float]:
    """Effective ranks (they weigh σ) of the unmasked held-out features, a linear probe's accuracy on them, and the loss.

    ``pooled_*`` is of the means over an image's patches, ``token_*`` of all patches' features; ``*_centred_rank`` takes the
    mean over the samples off first, without which the mean is most of the matrix.
    """
    features, tested = _features(network, patches), _features(network, held_out)
    pooled, tokens = tested.mean(1), tested.flatten(0, 1)
    with torch.no_grad():
        loss = float(masked_loss(network, held_out, ratio))
    return {
        "held_out_loss": loss,
        "pooled_rank": effective_rank(pooled),
        "pooled_centred_rank": effective_rank(pooled - pooled.mean(0)),
        "token_rank": effective_rank(tokens),
        "token_centred_rank": effective_rank(tokens - tokens.mean(0)),
        "probe_accuracy": probe_accuracy(features.mean(1), samples.targets, pooled, samples.held_out_targets),
    }


@torch.no_grad()
def _features(network: MaskedAutoencoder, patches: Tensor, batch: int = 1000) -> Tensor:
    """(images, places, width) of unmasked images."""
    parts = patches.split(batch)
    return torch.cat([network.encode(part, torch.arange(part.shape[1]).expand(len(part), -1)) for part in parts])


def probe_accuracy(inputs: Tensor, classes: Tensor, held_out_inputs: Tensor, held_out_classes: Tensor) -> float:
    """Held-out share of right classes of a multinomial logistic regression on standardized features, decay 1e-4."""
    mean, deviation = inputs.mean(0), inputs.std(0) + 1e-6
    X, T = (inputs - mean) / deviation, (held_out_inputs - mean) / deviation
    weight = torch.zeros(int(classes.max()) + 1, X.shape[1] + 1, requires_grad=True)
    X, T = (nn.functional.pad(A, (0, 1), value=1.0) for A in (X, T))
    search = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = nn.functional.cross_entropy(X @ weight.T, classes) + 0.5e-4 * weight.square().sum()
        loss.backward()
        return loss

    search.step(closure)
    return float(((T @ weight.detach().T).argmax(1) == held_out_classes).double().mean())


def draw(record: dict[str, Any]) -> Figure:
    """Ranks as training goes, a colour a mask ratio; at its end against the ratio; and the probe."""
    curves, results, ratios = record["curves"], record["results"], record["settings"]["ratios"]
    at = {ratio: curves[f"ratio_{round(100 * ratio)}"] for ratio in ratios}
    with figure_style():
        figure = Figure(figsize=(9.8, 3.6))
        training, ranks, probe = figure.subplots(1, 3)
        for colour, (ratio, curve) in zip((GREY, GREEN, BLUE, PURPLE, ORANGE), at.items(), strict=False):
            _band(training, curves["epoch"], np.array(curve["pooled_rank"]), colour, f"{ratio:.0%} masked")
        for number, colour, label in (
            ("pooled_rank", BLUE, "pooled"),
            ("pooled_centred_rank", GREEN, "pooled, centred"),
            ("token_rank", ORANGE, "all patches"),
        ):
            _band(ranks, ratios, np.array([curve[number] for curve in at.values()])[:, :, -1].T, colour, label)
            ranks.axhline(results["start"][number], color=colour, linestyle=":", linewidth=1.2)
        ranks.plot([], [], ":", color="black", linewidth=1.2, label="at the start")
        _band(probe, ratios, np.array([curve["probe_accuracy"] for curve in at.values()])[:, :, -1].T, BLUE, "trained")
        probe.axhline(
            results["start"]["probe_accuracy"], color=BLUE, linestyle=":", linewidth=1.2, label="at the start"
        )
        training.set(title="Pooled features, training", xlabel="epoch", ylabel="effective rank (weighs σ)")
        ranks.set(title="After training", xlabel="share of patches masked", ylabel="effective rank (weighs σ)")
        probe.set(title="Linear probe", xlabel="share of patches masked", ylabel="held-out accuracy")
        for panel in (training, ranks):
            panel.set_ylim(bottom=0)
        for panel in (training, ranks, probe):
            panel.legend(fontsize=7.5)
        return figure


def _band(axes: Axes, x: list[float], runs: NDArray[np.float64], colour: str, label: str) -> None:
    """Mean, lowest and highest over runs (runs, x)."""
    axes.plot(x, runs.mean(0), "o-", markersize=3.5, color=colour, label=label)
    axes.fill_between(x, runs.min(0), runs.max(0), color=colour, alpha=0.15, linewidth=0)
