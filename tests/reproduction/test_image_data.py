"""Images come scaled, in one layout, and what is missing is told."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rankwise.errors import UserError
from reproduction.image_data import image_samples


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    for folder, file, shape in (
        ("cifar10_subset", "cifar10_5k_1k.npz", (32, 32, 3)),
        ("fashion_mnist", "fashion_mnist_30k.npz", (28, 28)),
    ):
        (tmp_path / folder).mkdir()
        arrays = {}
        for part, count in (("train", 6), ("test", 4)):
            arrays[f"x_{part}"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
            arrays[f"y_{part}"] = rng.integers(0, 10, count, dtype=np.uint8)
        np.savez(tmp_path / folder / file, **arrays)
    monkeypatch.setenv("RANKWISE_DATA", str(tmp_path))
    return tmp_path


def test_colour_and_grey_images_come_channels_first_and_scaled(images: Path) -> None:
    colour = image_samples("cifar10", 5, 2)
    with np.load(images / "cifar10_subset" / "cifar10_5k_1k.npz") as arrays:
        pixel = arrays["x_test"][1, 4, 9, 2]
        assert colour.targets.tolist() == arrays["y_train"][:5].tolist()
    assert colour.inputs.shape == (5, 3, 32, 32)
    assert float(colour.held_out_inputs[1, 2, 4, 9]) == pytest.approx((pixel / 255 - 0.4465) / 0.2616, rel=1e-5)
    grey = image_samples("fashion_mnist", 6, 4)
    with np.load(images / "fashion_mnist" / "fashion_mnist_30k.npz") as arrays:
        pixel = arrays["x_train"][5, 3, 20]
    assert grey.inputs.shape == (6, 1, 28, 28)
    assert grey.held_out_targets.dtype == torch.int64
    assert float(grey.inputs[5, 0, 3, 20]) == pytest.approx((pixel / 255 - 0.2860) / 0.3530, rel=1e-5)


def test_missing_images_are_told(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="at least 7 train images"):
        image_samples("cifar10", 7, 1)
    monkeypatch.setenv("RANKWISE_DATA", str(images / "none"))
    with pytest.raises(UserError, match="RANKWISE_DATA"):
        image_samples("cifar10", 1, 1)


@pytest.mark.data
@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_the_scaling_is_that_of_the_data(name: str, data_root: Path) -> None:
    inputs = image_samples(name, 3000, 100).inputs
    assert inputs.mean((0, 2, 3)).abs().max() < 0.05
    assert (inputs.std((0, 2, 3)) - 1).abs().max() < 0.05
