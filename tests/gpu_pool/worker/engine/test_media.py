"""Files of images: what cameras and programs write is shown, what is damaged or harmful is refused with its cause."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from gpu_pool.worker.engine.media import LargestSize, MediaError, PixelLimits, decode_image


@pytest.fixture(autouse=True)
def pillow_as_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval, which evaluators import and other tests in this process may have, lets Pillow show half a file."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def gradient(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Darker at the left than at the right."""
    row = np.linspace(0, 255, size[0]).astype("uint8")
    return Image.fromarray(np.tile(row, (size[1], 1))).convert(mode)


def deep_grey() -> bytes:
    row = np.linspace(0, 65535, 40).astype("uint16")
    return saved(Image.fromarray(np.tile(row, (30, 1))), "PNG")


def greys(kind: Any, white: int) -> bytes:
    """A gradient from 0 to `white` as a TIFF file."""
    return saved(Image.fromarray(np.tile(np.linspace(0, white, 40).astype(kind), (30, 1))), "TIFF")


def palette_with_alpha() -> bytes:
    image = gradient().quantize(64)
    return saved(image, "PNG", transparency=0)


def animation() -> bytes:
    frames = [gradient("L"), gradient("L").transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


FILES: dict[str, Callable[[], bytes]] = {
    "CMYK": lambda: saved(gradient("CMYK"), "JPEG", quality=95),
    "16 bits": deep_grey,
    "palette": lambda: saved(gradient("P"), "PNG"),
    "palette with alpha": palette_with_alpha,
    "alpha": lambda: saved(gradient("RGBA"), "PNG"),
    "grey with alpha": lambda: saved(gradient("LA"), "PNG"),
    "one bit": lambda: saved(gradient("1"), "PNG"),
    "animated GIF": animation,
    "WebP": lambda: saved(gradient(), "WEBP", lossless=True),
    "TIFF of floats": lambda: saved(gradient("F"), "TIFF"),
    "TIFF of floats up to 1": lambda: greys(np.float32, 1),
    "TIFF of floats up to 65535": lambda: greys(np.float32, 65535),
    "TIFF of small integers of 32 bits": lambda: greys(np.int32, 255),
    "TIFF of integers of 32 bits": lambda: greys(np.int32, 65535),
    "TIFF of large integers of 32 bits": lambda: greys(np.int32, 10_000_000),
    "TIFF of integers of 16 bits": lambda: greys(np.uint16, 65535),
    "PGM of 16 bits": lambda: b"P5 40 30 65535\n" + np.tile(np.linspace(0, 65535, 40), (30, 1)).astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_image_shows_what_it_shows(name: str) -> None:
    shown = np.asarray(decode_image(FILES[name]()).convert("RGB"), dtype=float).mean(axis=(0, 2))
    expected = np.linspace(0, 255, 40)
    blurred = np.convolve(shown, np.ones(9) / 9, mode="valid")  # one bit is dithered
    assert np.abs(blurred - np.convolve(expected, np.ones(9) / 9, mode="valid")).max() < 30


def test_greys_multiplied_with_their_alpha() -> None:
    plain, multiplied = (struct.pack("<HHIHH", 338, 3, 1, kind, 0) for kind in (2, 1))
    file = saved(Image.new("LA", (4, 4), (100, 200)), "TIFF")
    assert plain in file
    image = decode_image(file.replace(plain, multiplied))
    assert image.convert("RGB").getpixel((0, 0)) == (127, 127, 127)


def test_cameras_that_were_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = decode_image(saved(gradient(), "JPEG", exif=exif))
    assert image.size == (30, 40)
    pixels = np.asarray(image, dtype=float)
    assert pixels[0].mean() < pixels[-1].mean()


def test_fifty_megapixels() -> None:
    assert decode_image(saved(Image.new("L", (10_000, 5_000)), "PNG")).size == (10_000, 5_000)


def grey_png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG file whose header says what its pixels need not bear out."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated": (lambda: saved(gradient(), "PNG")[:-60], "cannot be decoded"),
    "truncated JPEG": (lambda: saved(gradient(size=(400, 300)), "JPEG")[:-2000], "truncated"),
    "empty": (lambda: b"", "empty"),
    "no image": (lambda: b"<html>404 Not Found</html>", "no image"),
    "decompression bomb": (lambda: grey_png(40_000, 40_000, bytes(1_000_000)), "pixels"),
    "a program": (lambda: saved(gradient(), "EPS"), "no image"),
    "negative greys": (lambda: greys(np.float32, -1), "greys from -1 to "),
    "no pixels": (lambda: grey_png(0, 0, b""), "image"),
    "more than is decoded": (lambda: saved(Image.new("1", (20_000, 5_000)), "PNG"), "pixels"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_say_why(name: str) -> None:
    make, why = BROKEN[name]
    with pytest.raises(MediaError, match=why):
        decode_image(make())


@pytest.mark.parametrize(
    ("limits", "size"),
    [
        ({}, (400, 300)),
        ({"width": 200}, (200, 150)),
        ({"height": 150}, (200, 150)),
        ({"width": 200, "height": 200}, (200, 150)),
        ({"longest": 100}, (100, 75)),
        ({"longest": 1000}, (400, 300)),
        ({"width": 800, "height": 600}, (400, 300)),
    ],
)
def test_large_images_are_shrunk(limits: dict[str, int], size: tuple[int, int]) -> None:
    assert LargestSize(**limits).fit(Image.new("RGB", (400, 300))).size == size


@pytest.mark.parametrize(
    ("limits", "size"),
    [
        ({}, (400, 300)),
        ({"least": 100, "most": 120_000}, (400, 300)),
        ({"most": 30_000}, (200, 150)),
        ({"least": 480_000}, (800, 600)),
        ({"most": 1}, (1, 1)),
    ],
)
def test_images_are_brought_to_limits_of_pixels(limits: dict[str, int], size: tuple[int, int]) -> None:
    assert PixelLimits(**limits).fit(Image.new("RGB", (400, 300))).size == size
