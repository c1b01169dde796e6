"""Sounds and videos of documents: undecoded until somebody looks at them, and files by their paths."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import datasets
import numpy as np
import pytest
from sounds import RATE, tone, wav

from gpu_pool.chunk_messages import MediaFile, MediaPrompt
from gpu_pool.evaluator.disk_room import DiskRoom
from gpu_pool.evaluator.images import ImageProblem, described
from gpu_pool.evaluator.media_files import MediaFiles
from gpu_pool.evaluator.media_prompts import stand_in
from gpu_pool.evaluator.sent_media import SentMedia
from gpu_pool.evaluator.sounds import UndecodedSound, UndecodedVideo, leave_sounds_undecoded, media_file
from gpu_pool.evaluator.tokenising import NO_TOKENS
from gpu_pool.sound import decode_sound
from gpu_pool.worker.engine.media import MediaError
from gpu_pool.worker.engine.processing import _content

SOUND = wav(tone(0.2))


@pytest.fixture(autouse=True)
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (datasets.Audio, datasets.Video):
        for name in ("decode_example", "encode_example"):
            monkeypatch.setattr(kind, name, getattr(kind, name))
    leave_sounds_undecoded()


@pytest.fixture
def files(tmp_path: Path) -> Generator[MediaFiles]:
    files = MediaFiles(tmp_path / "new", DiskRoom(lambda what: None))
    yield files
    files.close()


def test_a_sound_is_decoded_when_its_samples_are_asked_for() -> None:
    data = datasets.Dataset.from_list([{"audio": {"bytes": SOUND, "path": None}}])
    [sound] = data.cast_column("audio", datasets.Audio(sampling_rate=8000))["audio"]
    assert isinstance(sound, UndecodedSound)
    assert "decoded" not in vars(sound)
    assert media_file(sound, "audio", ()) == SOUND
    assert "array" in sound
    assert sound["sampling_rate"] == sound.get("sampling_rate") == 8000
    assert len(sound["array"]) == 1600
    assert sound.get("text", "none") == "none"
    assert "sha256" in described({"audio": sound})["audio"]


def test_lists_of_sounds_and_columns_of_videos() -> None:
    pair = [{"bytes": SOUND, "path": None}, {"bytes": b"damaged", "path": None}]
    features = datasets.Features({"audio": datasets.List(datasets.Audio()), "video": datasets.Video()})
    data = datasets.Dataset.from_list([{"audio": pair, "video": {"bytes": b"film", "path": None}}], features=features)
    [row] = list(data)
    assert [media_file(sound, "audio", ()) for sound in row["audio"]] == [SOUND, b"damaged"]
    with pytest.raises(ImageProblem, match="cannot be decoded"):
        row["audio"][1]["array"]
    assert isinstance(row["video"], UndecodedVideo)
    assert media_file(row["video"], "video", ()) == b"film"


def test_samples_that_a_task_has_made_are_a_file_without_loss() -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, 800)
    file = media_file({"array": samples, "sampling_rate": RATE}, "audio", ())
    assert isinstance(file, bytes)
    assert np.array_equal(decode_sound(file).samples, samples.astype(np.float32))
    both = np.stack([samples, -samples])
    silent = media_file({"array": both, "sampling_rate": RATE}, "audio", ())
    assert isinstance(silent, bytes)
    assert not decode_sound(silent).samples.any()


@pytest.mark.parametrize(
    ("shown", "reason"),
    [
        (None, "the document has no audio"),
        ({"bytes": None, "path": None}, "the document has no audio"),
        ("missing.wav", "the audio file missing.wav does not exist"),
        ("a\0b.wav", "does not exist"),
        (300 * "x" + ".wav", "cannot be read"),
        (7, "doc_to_audio must give files, their bytes or paths, not int"),
    ],
)
def test_what_is_no_sound(tmp_path: Path, shown: object, reason: str) -> None:
    with pytest.raises(ImageProblem, match=reason):
        media_file(shown, "audio", [tmp_path])


def test_a_file_with_a_path_stays_where_it_is(files: MediaFiles, tmp_path: Path) -> None:
    """It is looked for beside the data, sent as its path, and refused once it is another file."""
    path = tmp_path / "a.wav"
    path.write_bytes(SOUND)
    found = media_file("a.wav", "audio", [tmp_path])
    assert found == path
    digest = files.add_path(path)
    assert digest == files.add_path(path)
    [message] = SentMedia(files.read, kept_bytes=1).before([digest])
    assert isinstance(message, MediaFile)
    assert (message.path, message.size) == (str(path), len(SOUND))
    assert not (tmp_path / "new").exists()
    assert _content(message) == str(path)
    path.write_bytes(SOUND + b"\0")
    with pytest.raises(MediaError, match="has changed since the job began"):
        _content(message)
    assert files.add_path(path) != digest
    os.unlink(path)
    with pytest.raises(MediaError, match="cannot be read"):
        _content(message)
    with pytest.raises(ImageProblem, match="cannot be read"):
        files.add_path(path)


def test_a_video_costs_as_many_images_as_it_is_shown_as(files: MediaFiles) -> None:
    digest = files.add(b"film")
    one = stand_in(MediaPrompt(text="", media=(digest,)), NO_TOKENS)
    eight = stand_in(MediaPrompt(text="", media=(digest,), frames=(8,), audio=(digest,)), NO_TOKENS)
    assert len(eight) == 9 * len(one)
