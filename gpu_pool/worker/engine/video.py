# pyright: basic
"""Files of videos to pictures: so many frames, evenly spaced from the first to the last, upright.

Where they stand is told by the file's packets, without decoding; from the key frame before each one it is decoded,
wherever the container can be read from there. So neither time nor memory grow with the frames that are not shown.
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
_NEVER_SOUGHT = {"mpeg"}
"""Containers that tell the times of some frames only, MPEG-PS: those of the others are counted, and after a seek wrong.
Their frames are all decoded."""


class _LandedLateError(Exception):
    """A frame cannot be sought: the container gives later ones only."""


def decode_frames(
    file: bytes | str, count: int, fit: Callable[[Image.Image], Image.Image] = lambda image: image
) -> list[Image.Image]:
    """`count` frames of a video, its content or its path; a shorter one repeats some. `fit` makes each smaller.

    Source of the places: lmms-eval's models, `np.linspace(0, frames - 1, count)` rounded down.

    Raises:
        MediaError: there is none, it is damaged, or its frames are too large.
    """
    with open_container(file, "video", MediaError) as container:
        times, keys = _times(container, _stream(container))
        if container.format.name in _NEVER_SOUGHT:
            keys = []
    places = np.linspace(0, len(times) - 1, count).astype(int).tolist()
    shown = sorted({times[place] for place in places})
    try:
        images = _images(file, shown, keys, count, fit)
    except _LandedLateError:
        images = _images(file, shown, [], count, fit)
    return [images[times[place]] for place in places]


def _stream(container: Any) -> Any:
    if not container.streams.video:
        raise MediaError("the file has no video")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


def _times(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """Times of all frames, and of those that can be decoded without others, both in the order of presentation."""
    times: list[int] = []
    keys: list[int] = []
    for packet in container.demux(stream):
        if packet.pts is not None and packet.size and not packet.is_discard:
            times.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    if not times:
        raise MediaError("the video has no frames")
    return sorted(times), sorted(keys)


def _images(
    file: bytes | str, times: list[int], keys: list[int], count: int, fit: Callable[[Image.Image], Image.Image]
) -> dict[int, Image.Image]:
    """The images at these times, ascending."""
    images: dict[int, Image.Image] = {}
    with open_container(file, "video", MediaError) as container:
        for time, image in _at(container, _stream(container), times, keys):
            images[time] = fit(image)
            held = sum(3 * image.width * image.height for image in images.values())
            if held > MOST_BYTES:
                raise MediaError(
                    f"{count} frames of {image.width} x {image.height} pixels take more than {MOST_BYTES:,} bytes; "
                    "image_max_side makes them smaller"
                )
    return images


def _at(container: Any, stream: Any, times: list[int], keys: list[int]) -> Iterator[tuple[int, Image.Image]]:
    """(time, image) of the frames at these times, ascending; of one that cannot be decoded, the next one's image.

    Without `keys` all frames are decoded, from the first.

    Raises:
        _LandedLateError: the container cannot be read from a key frame.
    """
    frames: Iterator[Any] = iter(()) if keys else container.decode(stream)
    frame: Any = None
    for time in times:
        place = max(0, bisect.bisect_right(keys, time) - 1)
        if keys and (frame is None or (frame.pts or 0) < keys[place]):
            frame, frames = _sought(container, stream, time, keys[max(0, place - 1) : place + 1])
        while frame is None or frame.pts is None or frame.pts < time:
            following = next(frames, None)
            if following is None:
                if frame is None:
                    raise MediaError("the video's frames cannot be decoded")
                break
            frame = following
        yield time, _upright(frame)


def _sought(container: Any, stream: Any, time: int, keys: list[int]) -> tuple[Any, Iterator[Any]]:
    """The first frame from the last of `keys` on, and those behind it.

    Some containers are searched by the times at which frames are decoded (MPEG-TS), and land behind the key frame:
    then from the key frame before.
    """
    for key in reversed(keys):
        container.seek(key, stream=stream, backward=True)
        frames = container.decode(stream)
        first = next(frames, None)
        if first is not None and (first.pts is None or first.pts <= time):
            return first, frames
    raise _LandedLateError


def _upright(frame: Any) -> Image.Image:
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
