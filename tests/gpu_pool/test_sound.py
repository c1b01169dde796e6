"""Files of sound to samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sounds import RATE, encoded, tone, wav

from gpu_pool import sound
from gpu_pool.sound import SoundError, decode_sound


def test_samples_are_those_of_the_file(tmp_path: Path) -> None:
    samples = tone(0.5)
    (tmp_path / "tone.wav").write_bytes(wav(samples))
    for file in (wav(samples), str(tmp_path / "tone.wav")):
        decoded = decode_sound(file, RATE)
        assert decoded.sampling_rate == RATE
        assert decoded.samples.dtype == np.float32
        assert np.array_equal(decoded.samples, samples.astype(np.float32) / 32768)


def test_channels_become_their_mean() -> None:
    left, right = tone(0.3, 1), tone(0.3, 2)
    decoded = decode_sound(wav(np.stack([left, right], axis=1)))
    assert np.allclose(decoded.samples, (left / 65536 + right / 65536), atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_what_is_heard(rate: int) -> None:
    times = np.arange(rate) / rate
    file = wav((16_000 * np.sin(2 * np.pi * 440 * times)).astype("<i2"), rate)
    decoded = decode_sound(file, RATE).samples
    assert abs(len(decoded) - RATE) <= 1
    expected = 16_000 / 32768 * np.sin(2 * np.pi * 440 * np.arange(len(decoded)) / RATE)
    assert np.abs(decoded - expected)[200:-200].max() < 0.01
    assert decode_sound(file).sampling_rate == rate


@pytest.mark.parametrize(
    ("form", "codec"), [("flac", "flac"), ("ogg", "libopus"), ("mp4", "aac"), ("mp3", "libmp3lame")]
)
def test_formats(form: str, codec: str) -> None:
    samples = (16_000 * np.sin(2 * np.pi * 440 * np.arange(RATE // 2) / RATE)).astype("<i2")
    decoded = decode_sound(encoded(samples, form, codec), RATE).samples
    spectrum = np.abs(np.fft.rfft(decoded[2000:6000]))
    assert np.argmax(spectrum) == pytest.approx(440 * 4000 / RATE, abs=1)
    assert np.abs(decoded[2000:6000]).max() == pytest.approx(16_000 / 32768, rel=0.2)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "is empty"),
        (b"<html>no sound</html>" * 20, "cannot be decoded"),
        (wav(tone(0.2))[:30], "cannot be decoded"),
        (wav(tone(0)), "no samples"),
        ("/nowhere/a.wav", "does not exist"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "cannot be decoded"),
    ],
)
def test_what_is_no_sound_is_refused(file: bytes | str, reason: str) -> None:
    with pytest.raises(SoundError, match=reason):
        decode_sound(file, RATE)


def test_a_sound_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound, "MOST_SECONDS", 1)
    assert len(decode_sound(wav(tone(1)), RATE).samples) == RATE
    with pytest.raises(SoundError, match="longer than the 1 seconds"):
        decode_sound(wav(tone(1.1)), RATE)
