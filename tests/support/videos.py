"""Files of video whose frames can be told apart."""

from __future__ import annotations

import io

import av
import numpy as np
from PIL import Image

SIDE = 32


def grey(number: int, count: int) -> int:
    """How bright that frame of so many is."""
    return 20 + 200 * number // max(1, count - 1)


def video(
    count: int, form: str = "mp4", codec: str = "mpeg4", side: int = SIDE, rate: int = 10, key_every: int = 5
) -> bytes:
    """Frames that grow brighter."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        stream.gop_size = key_every
        for number in range(count):
            pixels = np.full((side, side, 3), grey(number, count), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def brightness(image: Image.Image) -> float:
    """Mean of its pixels."""
    return float(np.asarray(image.convert("L")).mean())
