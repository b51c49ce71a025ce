"""Image files as the tensors that a model was pretrained on."""

import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankwise.errors import UserError

CACHE_BYTES = 10**9  # of decoded images: some 6,600 of 224 × 224


class PixelReader:
    """Images as the model's processor makes them, decoded when they are first asked for.

    Resized images are kept as bytes while they fit into ``cache_bytes``; later ones are decoded anew each time. Scaling
    and normalization are done here, as the processor would: (x · rescale_factor − mean) / std.

    Args:
        processor: an image processor of transformers.

    Raises:
        UserError: see :func:`read_image`; or images that come out in different sizes.
    """

    def __init__(self, processor: Any, cache_bytes: int = CACHE_BYTES):
        self.processor, self.room = processor, cache_bytes
        self._cache: dict[str, Any] = {}

    def __call__(self, files: Sequence[str]) -> Tensor:
        """(B, 3, height, width), float32."""
        images = [self._resized(file) for file in files]
        for file, image in zip(files, images, strict=True):
            if image.shape != images[0].shape:
                raise UserError(
                    f"the model's image processor makes {file} {image.shape[1]} × {image.shape[2]} and another image "
                    f"{images[0].shape[1]} × {images[0].shape[2]}; it must crop or resize all to one size"
                )
        return self._normalized(torch.from_numpy(np.stack(images)))

    def _resized(self, file: str) -> Any:
        """(3, height, width) as the processor resizes and crops it, from 0 to 255."""
        kept = self._cache.get(file)
        if kept is not None:
            return kept
        made = self.processor(read_image(file), do_rescale=False, do_normalize=False, return_tensors="np")
        pixels = np.asarray(made["pixel_values"])[0]
        if pixels.nbytes <= self.room:
            self._cache[file] = pixels
            self.room -= pixels.nbytes
        return pixels

    def _normalized(self, pixels: Tensor) -> Tensor:
        values = pixels.to(torch.float32)
        if getattr(self.processor, "do_rescale", False):
            values = values * self.processor.rescale_factor
        if getattr(self.processor, "do_normalize", False):
            mean, std = (
                torch.as_tensor(numbers, dtype=torch.float32).view(-1, 1, 1)
                for numbers in (self.processor.image_mean, self.processor.image_std)
            )
            values = (values - mean) / std
        return values


def read_image(file: str) -> Any:
    """The image as 8-bit RGB, turned as its camera noted; of several frames the first, without transparency.

    Raises:
        UserError: no image, a truncated one, one of more pixels than Pillow takes for harmless, or 32-bit values.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError("reading images needs one more package: pip install 'rankwise[vision]'") from None

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened)
                if image.mode.startswith("I;16"):  # Pillow would cut values off at 255
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                if image.mode in ("I", "F"):
                    raise UserError(f"the image {file} holds 32-bit values; save it with 8 bits a colour")
                return image.convert("RGB")
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise UserError(f"the image {file} is too large to be decoded safely ({error}); scale it down") from None
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
            raise UserError(f"cannot read the image {file}: {error}. Is it damaged, or no image? Remove it") from None
