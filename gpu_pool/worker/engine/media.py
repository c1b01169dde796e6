# pyright: basic
"""Files of images to pictures that a processor takes: whatever cameras and programs write, and nothing harmful."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
"""Of a picture, by its header: more are taken for a decompression bomb (Pillow's own limit, 256 MiB of RGB)."""

_PLAIN = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "RGBa", "RGBX"}
"""Modes with at most 8 bits a channel, which Pillow converts without loss of what is seen."""


_FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI"),
    *("SGI", "TGA", "TIFF", "WEBP"),
)
"""Formats of pixels. Pillow takes programs, too: to draw an EPS file it starts Ghostscript."""


class MediaError(Exception):
    """A picture cannot be shown to a model."""


def decode_image(data: bytes) -> Image.Image:
    """The picture in a file's bytes, upright; the first frame of several. Its mode is what the file has, in 8 bits.

    Raises:
        MediaError: it is none, is damaged, has no pixels, or too many.
    """
    if not data:
        raise MediaError("the image file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(image)
            image.load()
            return _in_8_bits(ImageOps.exif_transpose(image), image.format)
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise MediaError(f"the file is no image ({len(data)} bytes that begin with {data[:8]!r})") from error
    except Exception as error:  # codecs raise whatever they like; Pillow's warning of a bomb may be an error, too
        raise MediaError(f"the image cannot be decoded: {type(error).__name__}: {error}") from error


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise MediaError(f"the image has no pixels ({width} x {height})")
    if width * height > MOST_PIXELS:
        raise MediaError(f"the image has {width} x {height} pixels, more than the {MOST_PIXELS:,} that are decoded")


def _in_8_bits(image: Image.Image, form: str | None) -> Image.Image:
    """Other ranges of greys brought to 0..255, because Pillow's own conversion cuts them off there."""
    if image.mode in _PLAIN:
        return image
    if image.mode == "La":
        return image.convert("LA")
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode in ("I", "F"):
        scale = 1 / 256 if image.mode == "I" and form in _OF_16_BITS else 255 / _white(image)
        return image.point(lambda value: value * scale).convert("L")
    return image.convert("RGB")


_OF_16_BITS = ("PNG", "PPM")
"""Whose greys of mode "I" have 16 bits."""


def _white(image: Image.Image) -> float:
    """The value that is white in greys whose file does not say: the least usual one that all are within.

    Raises:
        MediaError: there are values below 0, or that are no numbers.
    """
    low, high = (float(value) for value in image.getextrema())  # pyright: ignore[reportArgumentType]
    if not 0 <= low <= high < math.inf:
        raise MediaError(f"the image has greys from {low:g} to {high:g}: they must lie in 0..1, 0..255 or 0..65535")
    usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    return next((white for white in usual if high <= white), high)


@dataclass(frozen=True, kw_only=True)
class LargestSize:
    """Pixels that larger images are shrunk to, their shape kept; None: as they are (lm-eval's `resize_image`)."""

    width: int | None = None
    height: int | None = None
    longest: int | None = None
    """Of width and height, where neither is given."""

    def fit(self, image: Image.Image) -> Image.Image:
        """The image, shrunk if it is larger."""
        ratios = [
            limit / size for limit, size in zip((self.width, self.height), image.size, strict=True) if limit is not None
        ]
        if not ratios and self.longest is not None:
            ratios = [self.longest / max(image.size)]
        ratio = min(ratios, default=1.0)
        if ratio >= 1:
            return image
        width, height = (max(1, int(size * ratio)) for size in image.size)
        return image.resize((width, height))


@dataclass(frozen=True, kw_only=True)
class PixelLimits:
    """Pixels that images are brought to have, their shape kept; None: as they are. Qwen's `smart_resize`, for
    processors that know no such limits."""

    least: int | None = None
    most: int | None = None

    def fit(self, image: Image.Image) -> Image.Image:
        """The image, shrunk or enlarged if it has too many pixels or too few."""
        pixels = image.width * image.height
        if self.most is not None and pixels > self.most:
            wanted, rounded = self.most, math.floor
        elif self.least is not None and pixels < self.least:
            wanted, rounded = min(self.least, MOST_PIXELS), math.ceil
        else:
            return image
        ratio = math.sqrt(wanted / pixels)
        width, height = (max(1, rounded(size * ratio)) for size in image.size)
        return image.resize((width, height))
