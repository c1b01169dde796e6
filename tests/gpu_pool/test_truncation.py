"""Files that end before the length that their headers state, and files whose headers state none."""

from __future__ import annotations

from pathlib import Path

import pytest
from sounds import RATE, encoded, tone, wav
from videos import video

from gpu_pool.sound import SoundError, decode_sound
from gpu_pool.worker.engine.media import MediaError
from gpu_pool.worker.engine.video import decode_frames

SECONDS = 4.0
SOUNDS = {
    "wav": wav(tone(SECONDS)),
    "aiff": encoded(tone(SECONDS), "aiff", "pcm_s16be"),
    "flac": encoded(tone(SECONDS), "flac", "flac"),
    "mp3": encoded(tone(SECONDS), "mp3", "libmp3lame"),
    "webm": encoded(tone(SECONDS, rate=48_000), "webm", "libopus", 48_000),
}
VIDEOS = {"matroska": "mpeg4", "webm": "libvpx-vp9", "avi": "mpeg4", "mp4": "mpeg4"}


@pytest.mark.parametrize("form", SOUNDS)
def test_a_sound_that_is_cut_off_is_refused(tmp_path: Path, form: str) -> None:
    whole = SOUNDS[form]
    assert len(decode_sound(whole, RATE).samples) == pytest.approx(SECONDS * RATE, rel=0.02)
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    for half in (whole[: len(whole) // 2], str(tmp_path / "half")):
        with pytest.raises(SoundError, match=r"cut off|ends before|cannot be decoded"):
            decode_sound(half, RATE)


@pytest.mark.parametrize("form", VIDEOS)
def test_a_video_that_is_cut_off_is_refused(form: str) -> None:
    whole = video(60, form, VIDEOS[form])
    assert len(decode_frames(whole, 4)) == 4
    with pytest.raises(MediaError, match=r"ends before|cannot be decoded"):
        decode_frames(whole[: len(whole) // 2], 4)


def of_unknown_length() -> bytes:
    """A WAV file written into a pipe, where nothing can be filled in later."""
    unknown, file = b"\xff" * 4, wav(tone(SECONDS))
    return file[:4] + unknown + file[8:40] + unknown + file[44:]


WITHOUT_LENGTH = {
    "wav": of_unknown_length(),
    "mp3": encoded(tone(SECONDS), "mp3", "libmp3lame", RATE, write_xing="0"),
    "webm": encoded(tone(SECONDS, rate=48_000), "webm", "libopus", 48_000, live="1"),
    "ogg": encoded(tone(SECONDS, rate=48_000), "ogg", "libopus", 48_000),
}


@pytest.mark.parametrize("form", WITHOUT_LENGTH)
def test_a_sound_whose_header_states_no_length_is_heard_as_far_as_it_goes(form: str) -> None:
    whole = WITHOUT_LENGTH[form]
    assert len(decode_sound(whole, RATE).samples) == pytest.approx(SECONDS * RATE, rel=0.04)
    assert len(decode_sound(whole[: len(whole) * 3 // 4], RATE).samples) > RATE
