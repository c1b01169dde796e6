"""Files of video to frames."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sounds import tone, wav
from videos import SIDE, brightness, grey, video

from gpu_pool.worker.engine import video as module
from gpu_pool.worker.engine.media import MediaError
from gpu_pool.worker.engine.video import decode_frames

FRAMES = 37


@pytest.mark.parametrize(
    ("form", "codec", "key_every"),
    [
        ("mp4", "mpeg4", 5),
        ("matroska", "libx264", 12),
        ("webm", "libvpx-vp9", 100),
        ("mpegts", "libx264", 12),
        ("mpegts", "mpeg2video", 5),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 8, FRAMES, 50])
def test_frames_are_evenly_spaced(tmp_path: Path, form: str, codec: str, key_every: int, count: int) -> None:
    file = video(FRAMES, form, codec, key_every=key_every, rate=25)
    (tmp_path / "film").write_bytes(file)
    places = np.linspace(0, FRAMES - 1, count).astype(int)
    for source in (file, str(tmp_path / "film")):
        images = decode_frames(source, count)
        assert [image.size for image in images] == [(SIDE, SIDE)] * count
        for image, place in zip(images, places, strict=True):
            assert brightness(image) == pytest.approx(grey(int(place), FRAMES), abs=4)


def test_frames_of_a_container_that_tells_few_times() -> None:
    images = decode_frames(video(60, "mpeg", "mpeg1video", side=64, rate=25, key_every=12), 4)
    assert list(map(brightness, images)) == pytest.approx([grey(place, 60) for place in (0, 19, 39, 59)], abs=2)


def test_frames_are_made_smaller_one_by_one() -> None:
    assert [image.size for image in decode_frames(video(9), 3, lambda image: image.resize((8, 6)))] == [(8, 6)] * 3


def test_frames_that_would_fill_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 5 * 3 * SIDE * SIDE)
    assert len(decode_frames(video(9), 5)) == 5
    with pytest.raises(MediaError, match="image_max_side makes them smaller"):
        decode_frames(video(9), 6)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "is empty"),
        (b"<html>no video</html>" * 20, "cannot be decoded"),
        (video(9)[:200], "cannot be decoded"),
        (wav(tone(0.2)), "has no video"),
        ("/nowhere/a.mp4", "does not exist"),
    ],
)
def test_what_is_no_video_is_refused(file: bytes | str, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        decode_frames(file, 4)


def test_damage_is_an_error_or_leaves_frames() -> None:
    """Whatever happens to a file's bytes, nothing but a MediaError is raised, and frames are as many as asked for."""
    whole = video(20)
    chance = random.Random(0)
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 200)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            images = decode_frames(bytes(damaged), 4)
        except MediaError:
            continue
        assert len(images) == 4
        assert all(isinstance(image, Image.Image) for image in images)
