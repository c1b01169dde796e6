# pyright: basic
"""Files of videos to pictures: so many frames, evenly spaced from the first to the last, upright.

Where they stand is told by the file's packets, without decoding; from the key frame before each one it is decoded. So
neither time nor memory grow with the frames that are not shown.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from gpu_pool.containers import open_container
from gpu_pool.worker.engine.media import MediaError

MOST_BYTES = 512 << 20
"""Of the frames of a video, decoded."""


def decode_frames(
    file: bytes | str, count: int, fit: Callable[[Image.Image], Image.Image] = lambda image: image
) -> list[Image.Image]:
    """`count` frames of a video, its content or its path; a shorter one repeats some. `fit` makes each smaller.

    Source of the places: lmms-eval's models, `np.linspace(0, frames - 1, count)` rounded down.

    Raises:
        MediaError: there is none, it is damaged, or its frames are too large.
    """
    with open_container(file, "video", MediaError) as container:
        if not container.streams.video:
            raise MediaError("the file has no video")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        images: dict[int, Image.Image] = {}
        times, keys = _times(container, stream)
        places = np.linspace(0, len(times) - 1, count).astype(int).tolist()
        for time, image in _at(container, stream, sorted({times[place] for place in places}), keys):
            images[time] = fit(image)
            held = sum(3 * image.width * image.height for image in images.values())
            if held > MOST_BYTES:
                raise MediaError(
                    f"{count} frames of {image.width} x {image.height} pixels take more than {MOST_BYTES:,} bytes; "
                    "image_max_side makes them smaller"
                )
        return [images[times[place]] for place in places]


def _times(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """Times of all frames, and of those that can be decoded without others, both in the order of presentation."""
    times: list[int] = []
    keys: list[int] = []
    for packet in container.demux(stream):
        if packet.pts is not None and packet.size:
            times.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    if not times:
        raise MediaError("the video has no frames")
    return sorted(times), sorted(keys)


def _at(container: Any, stream: Any, times: list[int], keys: list[int]) -> Iterator[tuple[int, Image.Image]]:
    """(time, image) of the frames at these times, ascending; of one that cannot be decoded, the next one's image."""
    frames: Iterator[Any] = iter(())
    frame: Any = None
    for time in times:
        key = keys[max(0, bisect.bisect_right(keys, time) - 1)] if keys else times[0]
        if frame is None or (frame.pts or 0) < key:
            container.seek(key, stream=stream, backward=True)
            frames, frame = container.decode(stream), None
        while frame is None or frame.pts is None or frame.pts < time:
            following = next(frames, None)
            if following is None:
                if frame is None:
                    raise MediaError("the video's frames cannot be decoded")
                break
            frame = following
        yield time, _upright(frame)


def _upright(frame: Any) -> Image.Image:
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
