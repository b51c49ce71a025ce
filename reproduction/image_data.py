"""The image data sets of the figures, from the folder that RANKWISE_DATA names."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rankwise.errors import UserError

# name: its file, then mean and deviation of the official training set's channels, on a scale of 0 to 1
_SETS: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ("cifar10_subset/cifar10_5k_1k.npz", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "fashion_mnist": ("fashion_mnist/fashion_mnist_30k.npz", (0.2860,), (0.3530,)),
}


@dataclass(frozen=True)
class Samples:
    """Inputs and what is to be learned of them, for training and held out; samples along the first axis."""

    inputs: Tensor
    targets: Tensor
    held_out_inputs: Tensor
    held_out_targets: Tensor


def image_samples(name: str, count: int, held_out: int) -> Samples:
    """The first images of a data set's training and test parts; both are in random order of classes.

    Args:
        name: ``cifar10`` (at most 5000 and 1000) or ``fashion_mnist`` (at most 30,000 and 10,000).
        count, held_out: images of each part.

    Returns:
        (n, channels, height, width) float32 images, every channel with the training set's mean taken off, in units of its
        deviation; int64 classes.

    Raises:
        UserError: no such file, or fewer images than asked for.
    """
    place, mean, deviation = _SETS[name]
    file = Path(os.environ.get("RANKWISE_DATA") or ".") / place
    if not file.is_file():
        raise UserError(
            f"expected the images at {place} in the folder that the variable RANKWISE_DATA names, found no {file}; "
            "set RANKWISE_DATA to a folder that has them"
        )
    parts = []
    with np.load(file, allow_pickle=False) as arrays:
        for part, wanted in (("train", count), ("test", held_out)):
            raw, classes = arrays[f"x_{part}"], arrays[f"y_{part}"]
            if len(raw) < wanted:
                raise UserError(f"expected at least {wanted} {part} images in {file}, found {len(raw)}; ask for fewer")
            # grey images come without a channel axis
            pixels = torch.from_numpy(raw[:wanted]).float().div(255).reshape(*raw[:wanted].shape[:3], len(mean))
            scaled = (pixels - torch.tensor(mean)) / torch.tensor(deviation)
            parts += [scaled.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(classes[:wanted]).long()]
    return Samples(*parts)
