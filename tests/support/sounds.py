"""Files of sound, and tasks over them."""

from __future__ import annotations

import io
import wave

import av
import numpy as np

RATE = 16_000


def tone(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """Samples [samples] in 16 bits: three tones, and some noise."""
    random = np.random.default_rng(seed)
    times = np.arange(int(seconds * rate)) / rate
    waves = sum(np.sin(2 * np.pi * pitch * times) for pitch in random.uniform(100, 3000, 3))
    return (8000 * (waves / 3 + random.normal(0, 0.1, len(times)))).astype("<i2")


def wav(samples: np.ndarray, rate: int = RATE) -> bytes:
    """A file of samples [samples] or [samples, channels] in 16 bits."""
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setparams((1 if samples.ndim == 1 else samples.shape[1], 2, rate, 0, "NONE", ""))
        written.writeframes(samples.tobytes())
    return file.getvalue()


def encoded(samples: np.ndarray, form: str, codec: str, rate: int = RATE, **options: str) -> bytes:
    """The same in another format, by FFmpeg's encoders; `options` are of the format."""
    file = io.BytesIO()
    with av.open(file, "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return file.getvalue()
