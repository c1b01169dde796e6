# pyright: basic
"""Files of images to pictures that a processor takes: whatever cameras and programs write, and nothing harmful."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
"""Of a picture, by its header: more are taken for a decompression bomb (Pillow's own limit, 256 MiB of RGB)."""

_PLAIN = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "La", "RGBa", "RGBX"}
"""Modes with at most 8 bits a channel, which Pillow converts without loss of what is seen."""


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
        with Image.open(io.BytesIO(data)) as image:
            _check_size(image)
            image.load()
            return _in_8_bits(ImageOps.exif_transpose(image))
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


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Deeper greys scaled down, because Pillow's own conversion cuts them off at 255."""
    if image.mode in _PLAIN:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        return image.convert("I").point(lambda value: value / 256).convert("L")
    return image.convert("RGB")


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
