"""Pictures as matrices: which pixels are known, and back to a file."""

import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.completion.observations import Observations
from rankwise.completion.reading.byte_stream import existing_file
from rankwise.errors import UserError

EXPECTED = "a picture as .png, .jpg or .jpeg"
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


@dataclass(frozen=True)
class Picture:
    """A greyscale (h × w) or RGB picture as one matrix of numbers in [0, 1].

    The channels of RGB stand side by side, (h, 3·w): red, green, blue. One low-rank matrix then shares its row space
    among the channels, which are much alike, where three matrices would learn it three times.

    Attributes:
        matrix: (h, w) or (h, 3·w), all pixels as they are in the file, in [0, 1].
        observed: (h, w), which pixels are known; a pixel's channels are known together.
        channels: 1 or 3.
        source: the file.
    """

    matrix: NDArray[np.floating] = field(repr=False)
    observed: NDArray[np.bool_] = field(repr=False)
    channels: int
    source: str

    @property
    def mask(self) -> NDArray[np.bool_]:
        """``observed`` in the shape of ``matrix``."""
        return np.tile(self.observed, (1, self.channels))

    def observations(self, dtype: Any = None) -> Observations:
        """The known entries of ``matrix``."""
        rows, columns = np.nonzero(self.mask)
        return Observations.from_coordinates(
            rows, columns, self.matrix[rows, columns], self.matrix.shape, dtype or self.matrix.dtype
        )

    def pixels(self, matrix: NDArray[np.floating] | None = None) -> NDArray[np.uint8]:
        """A matrix of this picture's shape as (h, w) or (h, w, 3) bytes; what lies outside [0, 1] is cut off.

        Raises:
            UserError: the matrix has another shape or is not finite.
        """
        matrix = self.matrix if matrix is None else np.asarray(matrix)
        if matrix.shape != self.matrix.shape:
            raise UserError(f"expected a matrix of shape {self.matrix.shape}, as the picture has, got {matrix.shape}")
        if not np.isfinite(matrix).all():
            raise UserError("a picture cannot show NaN or infinite values; fill the matrix first")
        levels = np.rint(np.clip(matrix, 0, 1) * 255).astype(np.uint8)
        if self.channels == 1:
            return levels
        return np.stack(np.split(levels, self.channels, axis=1), axis=2)

    def save(
        self, path: str | os.PathLike[str], matrix: NDArray[np.floating] | None = None, *, holes: bool = False
    ) -> Path:
        """Write a matrix of this picture's shape as PNG, whole or not at all.

        Args:
            path: a name that ends in .png.
            matrix: (h, w) or (h, 3·w); the file's own pixels if None.
            holes: leave pixels that are not observed transparent, as :func:`read_image` understands them.
        """
        target = Path(path)
        if target.suffix.lower() != ".png":
            raise UserError(f"pictures are written as PNG; expected a name that ends in .png, got {target.name!r}")
        levels = self.pixels(matrix)
        if holes:
            colours = levels if levels.ndim == 3 else levels[..., None]
            alpha = np.where(self.observed, 255, 0).astype(np.uint8)[..., None]
            levels = np.concatenate([colours * (alpha > 0), alpha], axis=2)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            _pillow().fromarray(levels).save(temporary, format="PNG")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return target


def read_image(
    path: str | os.PathLike[str],
    mask: str | os.PathLike[str] | float | None = None,
    *,
    seed: int = 0,
    dtype: Any = np.float64,
) -> Picture:
    """Read a PNG or JPEG and which of its pixels are known.

    Args:
        path: the picture. Greyscale (8 or 16 bits) stays one channel; everything else becomes RGB. A picture that a
            camera marked as turned is turned.
        mask: a PNG of the same size, in which a pixel that is not black is known; or the fraction of pixels known, in
            (0, 1], drawn by ``seed``; None: all pixels but the fully transparent ones.
        seed: draws the pixels of a fraction.
        dtype: float32 or float64.

    Raises:
        UserError: the file is missing, empty, cut short, too large or no picture; the mask has another size or is a
            JPEG, whose compression blurs it; a fraction is outside (0, 1]; no pixel is known.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from PIL import Image
        >>> from rankwise.completion.reading import read_image
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "grey.png"
        >>> Image.fromarray(np.full((4, 6), 51, np.uint8)).save(path)
        >>> picture = read_image(path, mask=0.5)
        >>> picture.matrix.shape, picture.matrix[0, 0].item(), int(picture.observed.sum())
        ((4, 6), 0.2, 12)
    """
    file = existing_file(path, EXPECTED)
    picture = _opened(file, set(_FORMATS.values()))
    numbers, transparent = _numbers_in(picture)
    height, width = numbers.shape[:2]
    channels = 1 if numbers.ndim == 2 else 3
    matrix = numbers if channels == 1 else numbers.transpose(0, 2, 1).reshape(height, 3 * width)
    if mask is None:
        observed = ~transparent
    elif isinstance(mask, int | float) and not isinstance(mask, bool):
        observed = _drawn(float(mask), (height, width), seed)
    elif isinstance(mask, str | os.PathLike):
        observed = _read_mask(mask, (height, width), file)
    else:
        raise UserError(f"mask must be a file, a fraction in (0, 1] or None, got {mask!r}")
    if not observed.any():
        raise UserError(f"no pixel of {file} is known: the mask is black throughout, or the picture is transparent")
    return Picture(np.ascontiguousarray(matrix, dtype=dtype), observed, channels, str(file))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(f"pictures need Pillow ({error}): pip install pillow") from None
    return Image


def _opened(file: Path, formats: Collection[str]) -> Any:
    ending = file.suffix.lower()
    if ending not in _FORMATS:
        raise UserError(f"cannot read {file} as a picture: it ends in {ending or 'nothing'!r}; expected {EXPECTED}")
    Image = _pillow()
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # a picture of more pixels than Pillow thinks safe is an error, not a warning
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=sorted(formats)) as picture:
                picture.load()
                return ImageOps.exif_transpose(picture)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError, MemoryError):
        raise UserError(f"{file} has more pixels than can be read safely; make it smaller first") from None
    except Exception as error:  # a decoder on bytes of other people: there is no list of what it raises
        unidentified = f"it is no {' or '.join(sorted(formats))}"
        reason = unidentified if type(error).__name__ == "UnidentifiedImageError" else str(error)
        raise UserError(
            f"{file} cannot be read as a picture ({reason or type(error).__name__}); is it cut short, or another format?"
        ) from None


def _numbers_in(picture: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(h, w) or (h, w, 3) in [0, 1], and which pixels are fully transparent."""
    transparent = np.zeros(picture.size[::-1], bool)
    if picture.mode.startswith("I"):
        return np.asarray(picture).astype(np.float64) / 65535, transparent
    if "A" in picture.getbands() or "transparency" in picture.info:
        transparent = np.asarray(picture.convert("RGBA"))[..., 3] == 0
    grey = picture.mode in ("1", "L", "LA")
    return np.asarray(picture.convert("L" if grey else "RGB")).astype(np.float64) / 255, transparent


def _drawn(fraction: float, shape: tuple[int, int], seed: int) -> NDArray[np.bool_]:
    if not 0 < fraction <= 1:
        raise UserError(f"the fraction of pixels known must be above 0 and at most 1, got {fraction:g}")
    count = shape[0] * shape[1]
    observed = np.zeros(count, bool)
    observed[np.random.default_rng(seed).permutation(count)[: max(1, round(fraction * count))]] = True
    return observed.reshape(shape)


def _read_mask(path: str | os.PathLike[str], shape: tuple[int, int], picture: Path) -> NDArray[np.bool_]:
    file = existing_file(path, "a mask as .png: black where a pixel is not known")
    if file.suffix.lower() in (".jpg", ".jpeg"):
        raise UserError(f"the mask {file} is a JPEG, whose black is not exactly black; save it as PNG")
    mask = _opened(file, {"PNG"})
    levels = np.asarray(mask if mask.mode.startswith("I") else mask.convert("RGB"))
    known = levels != 0 if levels.ndim == 2 else (levels != 0).any(axis=2)
    if known.shape != shape:
        raise UserError(
            f"the mask {file} has {known.shape[1]} × {known.shape[0]} pixels and {picture} has {shape[1]} × {shape[0]}; "
            "expected the same size"
        )
    return known
