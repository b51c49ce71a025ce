"""Training with dropout, as in the overview's Figs. 2 and 9 (its Appendix A): networks, data, spectra, and what theory says.

Every rate here is the one at which units are *dropped*, 1 − μ, as in the figures.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.regularization import dropout_minimizer, squared_nuclear_prox
from rankwise.spectral import effective_rank
from reproduction.image_data import Samples, image_samples

# a singular value below this share of the largest is not told from zero in the document's pictures
VISIBLE = 0.01

# Appendix A and Table 1; the document is silent on the numbers of samples and epochs
SYNTHETIC: dict[str, Any] = {
    "size": 20,
    "rank": 15,
    "layers": 3,
    "samples": 16_384,
    "held_out": 1024,
    "learning_rate": 1e-2,
    "batch": 1024,
    "epochs": 1250,
}


RESNET: dict[str, Any] = {
    "channels": 64,
    "samples": 5000,
    "held_out": 1000,
    "learning_rate": 1e-2,
    "batch": 768,
    "epochs": 200,
    "bf16": True,
}
# a sixteenth of the arithmetic, and enough steps for a network of 1e-2 without momentum to learn from 5000 images
RESNET_DESK: dict[str, Any] = {**RESNET, "channels": 16, "batch": 32, "epochs": 16}
# five times the step, and as much shorter
SYNTHETIC_SMALL: dict[str, Any] = {**SYNTHETIC, "samples": 2048, "batch": 128, "learning_rate": 5e-2, "epochs": 150}
RESNET_SMALL: dict[str, Any] = {**RESNET, "channels": 4, "samples": 256, "held_out": 128, "batch": 32, "epochs": 3}


class MaskedNetwork(nn.Module):
    """A network that shows two of its activations: ``head(rest(first(x)))``.

    Args:
        first: up to the first layer's activations, before they are masked.
        rest: from there to the last layer's activations.
        head: what is left; nothing where the last layer's activations are the output.
    """

    def __init__(self, first: nn.Module, rest: nn.Module, head: nn.Module):
        super().__init__()
        self.first, self.rest, self.head = first, rest, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rest(self.first(x)))

    @classmethod
    def linear(cls, size: int, layers: int, rate: float) -> "MaskedNetwork":
        """The deep linear network W_L ⋯ W_1 x (eq. 3), factors size × size without bias, dropout between them."""
        return cls._chain(size, layers, rate, nn.Identity)

    @classmethod
    def perceptron(cls, size: int, layers: int, rate: float) -> "MaskedNetwork":
        """The same with ReLU after each layer but the last (eq. 2), dropout after the ReLU."""
        return cls._chain(size, layers, rate, nn.ReLU)

    @classmethod
    def _chain(cls, size: int, layers: int, rate: float, activation: type[nn.Module]) -> "MaskedNetwork":
        first = nn.Sequential(nn.Linear(size, size, bias=False), activation())
        rest = nn.Sequential(nn.Dropout(rate))
        for _ in range(layers - 2):
            rest.extend([nn.Linear(size, size, bias=False), activation(), nn.Dropout(rate)])
        rest.append(nn.Linear(size, size, bias=False))
        return cls(first, rest, nn.Identity())

    @classmethod
    def residual(cls, channels: int, rate: float, classes: int = 10) -> "MaskedNetwork":
        """A ResNet for 32 × 32 images: four stages of two blocks, channels doubling from stage to stage.

        The document does not say where dropout goes. Here: between the two convolutions of every block, after the ReLU, as
        in wide residual networks, and on the pooled features before the classifier. The first activations are the stem's,
        after its ReLU; the last are the pooled features.
        """
        stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        rest, width = nn.Sequential(), channels
        for stage in range(4):
            out = channels * 2**stage
            for block in range(2):
                rest.append(_ResidualBlock(width, out, 2 if stage and not block else 1, rate))
                width = out
        rest.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
        network = cls(stem, rest, nn.Sequential(nn.Dropout(rate), nn.Linear(width, classes)))
        return network.to(memory_format=torch.channels_last)


class _ResidualBlock(nn.Module):
    def __init__(self, width: int, out: int, stride: int, rate: float):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Dropout(rate),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if width != out or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.branch(x) + self.shortcut(x))


def linear_samples(size: int, rank: int, count: int, held_out: int, seed: int) -> Samples:
    """y = A x, x standard Gaussian, A = B C/√(size·rank) with Gaussian B (size × rank) and C: outputs of unit variance.

    The document gives A's rank and not its spectrum, on which the rank under dropout depends.
    """
    generator = torch.Generator().manual_seed(seed)
    B, C = torch.randn(size, rank, generator=generator), torch.randn(rank, size, generator=generator)
    A = B @ C / math.sqrt(size * rank)
    X, T = (torch.randn(n, size, generator=generator) for n in (count, held_out))
    return Samples(X, X @ A.T, T, T @ A.T)


def samples_of(settings: dict[str, Any], seed: int) -> Samples:
    """The data that settings ask for: CIFAR-10 where they have ``channels``, else synthetic."""
    if "channels" in settings:
        return image_samples("cifar10", settings["samples"], settings["held_out"])
    return linear_samples(settings["size"], settings["rank"], settings["samples"], settings["held_out"], seed)


def masked_run(
    kind: str, settings: dict[str, Any], samples: Samples, rate: float, seed: int, epochs: list[int]
) -> list[dict[str, Any]]:
    """Train one network with dropout and look at its held-out activations after the given epochs.

    Args:
        kind: a constructor of :class:`MaskedNetwork`.
        settings: sizes, ``learning_rate``, ``batch``, ``epochs``, and ``bf16`` for autocast.
        samples: what is trained on, and held out.
        rate: probability that a unit is dropped.
        seed: of the start, the order of samples, and the masks.
        epochs: when to look; 0 is the start.

    Returns:
        For each look: ``epoch``; ``first`` and ``last``, the :func:`spectrum` of these activations in evaluation mode;
        ``loss``, the held-out one; for images ``accuracy``, the held-out share of right classes.
    """
    images = "channels" in settings
    sizes = (settings["channels"],) if images else (settings["size"], settings["layers"])
    loss_of = nn.functional.cross_entropy if images else nn.functional.mse_loss
    looks = []
    with _seeded(seed):
        network = getattr(MaskedNetwork, kind)(*sizes, rate)
        for epoch in _descent(network, samples, loss_of, settings):
            if epoch in epochs:
                looks.append({"epoch": epoch} | _look(network, samples, loss_of, images))
    return looks


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's own generator, which dropout draws from, starts at ``seed``; what came before goes on afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _descent(network: MaskedNetwork, samples: Samples, loss_of: Any, settings: dict[str, Any]) -> Iterator[int]:
    """Plain SGD, no momentum; yields the number of epochs done, from 0."""
    optimizer = torch.optim.SGD(network.parameters(), lr=settings["learning_rate"])
    for epoch in range(settings["epochs"]):
        yield epoch
        network.train()
        for batch in torch.randperm(len(samples.inputs)).split(settings["batch"]):
            inputs = samples.inputs[batch]
            if inputs.ndim == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.get("bf16", False)):
                loss = loss_of(network(inputs), samples.targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    yield settings["epochs"]


@torch.no_grad()
def _look(network: MaskedNetwork, samples: Samples, loss_of: Any, images: bool) -> dict[str, Any]:
    settle_batch_norm(network, samples.inputs)
    network.eval()
    first = network.first(samples.held_out_inputs)
    last = network.rest(first)
    output = network.head(last)
    seen = {
        "first": spectrum(first),
        "last": spectrum(last),
        "loss": float(loss_of(output, samples.held_out_targets)),
    }
    if images:
        seen["accuracy"] = float((output.argmax(1) == samples.held_out_targets).double().mean())
    return seen


@torch.no_grad()
def settle_batch_norm(network: nn.Module, inputs: Tensor, count: int = 2000, batch: int = 500) -> None:
    """Means and variances of every batch normalization, again, over inputs *without* dropout.

    Dropout raises the variance of what it passes on, so that the averages gathered in training are wrong once it is off
    (Li et al. 2019, "Understanding the disharmony between dropout and batch normalization by variance shift") and the
    network's answers little better than guesses at high rates.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if not layers:
        return
    network.eval()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over the batches
        layer.train()
    for part in inputs[:count].split(batch):
        network(part)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def spectrum(activations: Tensor) -> dict[str, Any]:
    """Singular values of the matrix units × samples over √samples, and how many directions they amount to.

    Args:
        activations: (samples, units), or (images, channels, height, width), where every place of an image is a sample.

    Returns:
        ``singular_values``, largest first; ``effective_rank``, which weighs σ; ``energy_rank``, the same with σ²;
        ``visible``, the number of σ above :data:`VISIBLE` of the largest. Nothing is centred.
    """
    A = activations.flatten(2).movedim(1, 0).flatten(1) if activations.ndim == 4 else activations.T
    # by the Gram matrix in float64: good to 1e-8 of σ₁, and the maps of 1000 images are 16 × 1,000,000
    gram = sum((part @ part.T for part in A.double().split(100_000, dim=1)), torch.zeros(len(A), len(A)).double())
    return summary((torch.linalg.eigvalsh(gram).clamp(min=0).flip(0) / A.shape[1]).sqrt())


def summary(S: Tensor) -> dict[str, Any]:
    """What :func:`spectrum` returns, of singular values."""
    return {
        "singular_values": S.tolist(),
        "effective_rank": effective_rank(S),
        "energy_rank": effective_rank(S, power=2),
        "visible": int((VISIBLE * S[0] < S).sum()),
    }


def predicted_last_layer(samples: Samples, layers: int, rate: float) -> dict[str, Any]:
    """The :func:`spectrum` of the last layer's held-out activations at the minimum of the expected loss.

    Two layers: :func:`rankwise.regularization.dropout_minimizer`. More: :func:`equal_shares`.
    """
    X, Y = samples.inputs.T.double(), samples.targets.T.double()
    if layers == 2:
        best = dropout_minimizer(X, Y, width=len(X), keep_rate=1 - rate)
        return _held_out_spectrum(best.W2 @ best.W1, samples)
    A, R = _whitened(samples)
    U, S, Vh = torch.linalg.svd(A)
    kept, _ = equal_shares(S, layers, rate, width=len(X))
    return _held_out_spectrum(torch.linalg.solve(R, U * kept @ Vh, left=False), samples)


def bounding_last_layer(samples: Samples, layers: int, rate: float) -> dict[str, Any]:
    """The same for the squared nuclear norm that dropout at all hidden layers amounts to at least.

    c‖Z‖_*² with c = (1 + (1 − μ)/(μ·width))^{L−1} − 1 (Mianjy & Arora 2019, "On dropout and nuclear norm regularization",
    the overview's [32]) is the convex envelope of the penalty: the penalty itself at two layers, a lower bound from three on.
    """
    A, R = _whitened(samples)
    c = (1 + rate / (1 - rate) / len(A)) ** (layers - 1) - 1
    return _held_out_spectrum(torch.linalg.solve(R, squared_nuclear_prox(A, c), left=False), samples)


def _whitened(samples: Samples) -> tuple[Tensor, Tensor]:
    """A R and R, with Y = A X and XXᵀ/n = RRᵀ: dropout sees the map as it acts on white inputs."""
    X, Y = samples.inputs.T.double(), samples.targets.T.double()
    R = torch.linalg.cholesky(X @ X.T / X.shape[1])
    return Y @ torch.linalg.pinv(X) @ R, R


def _held_out_spectrum(product: Tensor, samples: Samples) -> dict[str, Any]:
    return spectrum(samples.held_out_inputs.double() @ product.T)


def equal_shares(S: Tensor, layers: int, rate: float, width: int) -> tuple[Tensor, float]:
    """Spectrum and expected loss of a deep linear network under dropout whose units all carry equal shares.

    With S the singular values of A and W_l = H_l Diag(s_l) H_{l−1}ᵀ, H_0 and H_L the singular vectors of A and each
    inner H_l turned so that all units of layer l have the same variance (possible by Schur and Horn), the expectation of
    ‖A x − W_L D_{L−1} ⋯ D_1 W_1 x‖² over the masks D_l and white x is a function of the s_l alone: dropout adds
    (1 − μ)/μ times the mean variance to every unit. Its minimum over them is found by descent.

    *Ours.* At two layers it is eq. 33 with its width put right (:func:`rankwise.regularization.dropout_minimizer`). At three
    it lies above the bound of :func:`bounding_last_layer`. That no other split of the shares does better than the equal one
    is measured, not proven: unrestricted descents end at the same value.

    Args:
        S: (k,) singular values of A.
        layers: L.
        rate: 1 − μ.
        width: units of every hidden layer.

    Returns:
        The singular values of W_L ⋯ W_1, (k,) float64 in the order of ``S``, and the expected loss.
    """
    ratio = rate / (1 - rate) / width
    S = S.double()
    spectra = [S.clamp(min=1e-12).pow(1 / layers).clone().requires_grad_() for _ in range(layers)]

    def loss() -> Tensor:
        variance, product = torch.ones_like(S), torch.ones_like(S)
        for layer, s in enumerate(spectra):
            if layer:
                variance = variance + ratio * variance.sum()
            variance, product = s.square() * variance, s * product
        return (S - product).square().sum() + variance.sum() - product.square().sum()

    search = torch.optim.LBFGS(
        spectra, max_iter=5000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        value = loss()
        value.backward()
        return value

    search.step(closure)
    product = torch.stack([s.detach().abs() for s in spectra]).prod(0)
    return product, float(loss().detach())
