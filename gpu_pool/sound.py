"""Files of sound to samples, by FFmpeg's decoders: WAV, FLAC, Ogg, MP3, M4A, and the sound of videos."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from av.audio.resampler import AudioResampler

from gpu_pool.containers import open_container

MOST_SECONDS = 3600
"""Of a file: an hour at 16 kHz takes 230 MB."""

_STATING = {"aiff", "au", "caf", "flac", "mp3"}
"""Formats, as FFmpeg names them, whose headers may state how long the sound is."""
_LEAST_SHARE, _DELAY_SECONDS = 0.95, 0.25
"""Of what is stated, and what encoders add at most."""


class SoundError(Exception):
    """A file holds no sound that can be decoded."""


class Sound(NamedTuple):
    """Samples [samples] of one channel in float32, between -1 and 1, so many a second."""

    samples: np.ndarray[tuple[int], np.dtype[np.float32]]
    sampling_rate: int


def decode_sound(file: bytes | str, sampling_rate: int | None = None) -> Sound:
    """The sound in a file, its content or its path: the mean of its channels, resampled if need be.

    `sampling_rate` None: as the file has it. Resampling is by libswresample's polyphase filters, as in torchcodec,
    which `datasets` decodes with.

    Raises:
        SoundError: there is none, it is damaged, or too long.
    """
    with open_container(file, "sound", SoundError) as container:
        if not container.streams.audio:
            raise SoundError("the file has no sound")
        stream = container.streams.audio[0]
        rate = sampling_rate or stream.rate
        stated = float(stream.duration * stream.time_base) if _states_duration(container, stream) else 0.0
        pieces = list(_pieces(container, stream, rate))
    if not pieces:
        raise SoundError("the sound has no samples")
    samples = np.concatenate(pieces)
    if len(samples) / rate < _LEAST_SHARE * stated - _DELAY_SECONDS:
        raise SoundError(f"the sound is cut off: its file states {stated:.1f} s, and has {len(samples) / rate:.1f} s")
    return Sound(samples, rate)


def _states_duration(container: Any, stream: Any) -> bool:
    """Whether the duration is the header's, not an estimate from the length of the file."""
    if not stream.duration:
        return False
    is_counted = container.format.name != "mp3" or bool(stream.start_time)  # known by the header that counts frames
    return container.format.name in _STATING and is_counted


def _pieces(container: Any, stream: Any, rate: int) -> Iterator[np.ndarray[tuple[int], np.dtype[np.float32]]]:
    resampler = AudioResampler(format="fltp", rate=rate)
    held = 0
    for frame in _frames(container, stream):
        for piece in resampler.resample(frame):
            held += piece.samples
            if held > MOST_SECONDS * rate:
                raise SoundError(f"the sound is longer than the {MOST_SECONDS} seconds that are decoded")
            if piece.samples:
                yield piece.to_ndarray().mean(axis=0, dtype=np.float32)


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """All frames, and None behind them, which lets the resampler give what it still holds."""
    yield from container.decode(stream)
    yield None
