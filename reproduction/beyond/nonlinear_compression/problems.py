"""What the networks of this study learn, from where, and at which rate."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankwise.factorizations import DeepLinear, DeepNetwork
from rankwise.spectral import haar_frame
from reproduction.planted import low_rank_target

# σ'(0), which turns a network at a small start into a linear one of this gain a layer; for ReLU half of all gates are open
_SLOPE = {"identity": 1.0, "tanh": 1.0, "gelu": 0.5, "relu": 0.5}


@dataclass(frozen=True)
class Problem:
    """½‖f(X) − Φ‖² from one start.

    Attributes:
        start: the network; copied, never trained.
        target: Φ, (m, N).
        inputs: X, (n, N).
        rank: r of Φ.
        lr: η.
    """

    start: DeepNetwork
    target: Tensor
    inputs: Tensor
    rank: int
    lr: float

    @classmethod
    def planted(cls, settings: dict[str, Any], activation: str, seed: int) -> "Problem":
        """The paper's: X = I and an unscaled Gaussian matrix cut to rank r, times ``target_scale``."""
        target = settings["target_scale"] * low_rank_target(settings["width"], settings["rank"], seed)
        return cls._scaled(settings, activation, target, torch.eye(settings["width"], dtype=target.dtype), seed)

    @classmethod
    def digits(cls, settings: dict[str, Any], activation: str, seed: int) -> "Problem":
        """Principal components of scikit-learn's 8 × 8 digits, and what ridge regression makes of the labels from them.

        The ten outputs, of rank 9 since they sum to zero, are turned into as many as the network is wide, so that every
        factor has room for frames.
        """
        X, labels = _components(settings)
        one_hot = torch.nn.functional.one_hot(labels, 10).to(X).mT
        one_hot -= one_hot.mean(dim=1, keepdim=True)
        penalty = settings["ridge"] * X.shape[1] * torch.eye(len(X), dtype=X.dtype)
        prediction = one_hot @ X.mT @ torch.linalg.inv(X @ X.mT + penalty) @ X
        outputs = haar_frame(settings["width"], 10, generator=_generator(seed + 1), dtype=X.dtype)
        return cls._scaled(settings | {"rank": 9}, activation, outputs @ prediction, X, seed)

    def started_elsewhere(self, seed: int) -> "Problem":
        """The same from another draw of the start."""
        weights = [weight.detach() for weight in self.start.weights]
        sizes = [weights[0].shape[1], *[weight.shape[0] for weight in weights]]
        scales = [float(torch.linalg.matrix_norm(weight, 2)) for weight in weights]
        factors = DeepLinear.orthogonal(sizes, init_scale=scales, generator=_generator(seed), dtype=self.target.dtype)
        return replace(self, start=DeepNetwork(factors.weights, self.start.activation))

    @classmethod
    def _scaled(cls, settings: dict[str, Any], activation: str, target: Tensor, inputs: Tensor, seed: int) -> "Problem":
        """ε in units of the singular value that balanced factors end at, η in units of the curvature that they end at."""
        depth = settings["depth"]
        gain = _SLOPE[activation] ** (depth - 1) * float(torch.linalg.matrix_norm(inputs, 2))
        top = float(torch.linalg.matrix_norm(target, 2))
        sizes = [inputs.shape[0], *[settings["width"]] * (depth - 1), target.shape[0]]
        factors = DeepLinear.orthogonal(
            sizes,
            init_scale=settings["relative_init_scale"] * (top / gain) ** (1 / depth),
            generator=_generator(seed),
            dtype=target.dtype,
        )
        curvature = depth * gain ** (2 / depth) * top ** (2 - 2 / depth)
        network = DeepNetwork(factors.weights, activation)
        return cls(network, target, inputs, settings["rank"], settings["relative_lr"] / curvature)


def _components(settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(components, samples), XXᵀ = N·I where whitened, otherwise with the largest variance at 1; and the labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = pixels[: settings["samples"]], labels[: settings["samples"]]
    U, S, _ = np.linalg.svd(pixels - pixels.mean(0), full_matrices=False)
    scale = np.ones_like(S) if settings["whitened"] else S / S[0]
    components = (U * scale)[:, : settings["components"]] * len(pixels) ** 0.5
    return torch.from_numpy(np.ascontiguousarray(components.T)), torch.from_numpy(labels)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
