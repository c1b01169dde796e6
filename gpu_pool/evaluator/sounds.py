"""Sounds and videos of tasks' documents: left as the files that they are, until a worker decodes them.

`datasets` gives them undecoded: neither it nor most tasks need a decoder then. To a task whose code looks at a sound's
samples it is decoded then.
"""

# pyright: basic
from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from scipy.io import wavfile

from gpu_pool.evaluator.images import MAX_FILE_BYTES, ImageProblem, local_file, shown_in
from gpu_pool.sound import SoundError, decode_sound

_SAMPLES = ("array", "sampling_rate")


class UndecodedFile(dict[str, Any]):
    """{"bytes", "path"} of a file in a data set. It equals no plain dictionary: `datasets` would take the elements of a
    list for decoded already."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and super().__eq__(other)

    def __ne__(self, other: object) -> bool:  # a dictionary has its own
        return not self == other


class UndecodedVideo(UndecodedFile):
    """A video."""


class TensorLike(np.ndarray):
    """An array that is asked what tasks ask of a tensor first. (No torch here: it takes seconds to import.)"""

    def cpu(self) -> TensorLike:
        """A tensor's."""
        return self

    def numpy(self) -> np.ndarray:
        """A tensor's."""
        return self.view(np.ndarray)


class AudioSamples(NamedTuple):
    """A decoded sound as torchcodec gives it."""

    data: TensorLike
    """[channels, samples]"""
    sample_rate: int


class UndecodedSound(UndecodedFile):
    """A sound; "array", its samples, and "sampling_rate" are decoded when they are asked for.

    Tasks ask for them as of a dictionary, or as of torchcodec's AudioDecoder.
    """

    problem: ImageProblem | None = None
    """Why it could not be decoded, if somebody has tried: tasks' code hides that."""

    def __init__(self, value: Mapping[str, Any], sampling_rate: int | None = None) -> None:
        """`sampling_rate` is the one that the data set asks for; None: the file's own."""
        super().__init__(value)
        self._sampling_rate = sampling_rate

    @cached_property
    def decoded(self) -> dict[str, Any]:
        """As `datasets` has decoded sounds before it gave torchcodec's decoders.

        Raises:
            ImageProblem: it cannot be decoded.
        """
        try:
            sound = decode_sound(self.get("bytes") or self.get("path") or b"", self._sampling_rate)
        except SoundError as error:
            self.problem = ImageProblem(str(error))
            raise self.problem from error
        return dict(zip(_SAMPLES, sound, strict=True))

    def get_all_samples(self) -> AudioSamples:
        """AudioDecoder's; of one channel."""
        return AudioSamples(self["array"][None].view(TensorLike), self["sampling_rate"])

    @property
    def _desired_sample_rate(self) -> int:
        """AudioDecoder's, which tasks take for the rate of its samples."""
        return self["sampling_rate"]

    def __missing__(self, key: str) -> Any:
        if key not in _SAMPLES:
            raise KeyError(key)
        return self.decoded[key]

    def __contains__(self, key: object) -> bool:
        return key in _SAMPLES or super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """A dictionary's, with what is decoded."""
        try:
            return self[key]
        except KeyError:
            return default


def unheard(doc: Mapping[str, Any]) -> ImageProblem | None:
    """Why one of a document's sounds could not be decoded, if somebody has tried."""
    sounds = (value for value in shown_in(list(doc.values())) if isinstance(value, UndecodedSound))
    return next((sound.problem for sound in sounds if sound.problem), None)


def leave_sounds_undecoded() -> None:
    """Let `datasets` give UndecodedSounds and UndecodedVideos in this whole process, and read folders of sounds: for
    all of that it wants torchcodec."""

    def decode_sound(self: datasets.Audio, value: Any, token_per_repo_id: Any = None) -> Any:
        is_plain = isinstance(value, Mapping) and not isinstance(value, UndecodedSound)
        return UndecodedSound(value, self.sampling_rate) if is_plain else value

    def decode_video(self: datasets.Video, value: Any, token_per_repo_id: Any = None) -> Any:
        if isinstance(value, str):
            value = {"bytes": None, "path": value}
        is_plain = isinstance(value, Mapping) and not isinstance(value, UndecodedVideo)
        return UndecodedVideo(value) if is_plain else value

    datasets.Audio.decode_example = decode_sound
    datasets.Video.decode_example = decode_video
    for kind in (datasets.Audio, datasets.Video):
        kind.encode_example = _encoding(kind.encode_example)


def _encoding(encode: Any) -> Any:
    def encode_example(self: Any, value: Any) -> Any:
        match value:
            case str() | os.PathLike():
                return {"bytes": None, "path": os.fspath(value)}
            case bytes(data):
                return {"bytes": data, "path": None}
            case {"bytes": data, "path": path}:
                return {"bytes": data, "path": path}
            case _:
                return encode(self, value)

    return encode_example


def media_file(shown: Any, kind: str, folders: Iterable[Path]) -> bytes | Path:
    """The file of one sound or video: where it lies, if it lies anywhere (a relative path is looked for in `folders`).

    Samples that a task's code has made are a file of them.

    Raises:
        ImageProblem: it is no such thing, is not there, or is too large.
    """
    match shown:
        case bytes(data) | {"bytes": bytes(data)}:
            if len(data) > MAX_FILE_BYTES:
                raise ImageProblem(f"the {kind} has {len(data)} bytes in the data set; {MAX_FILE_BYTES} are allowed")
            return data
        case {"path": str(path)} | str(path):
            return local_file(path, kind, folders)
        case os.PathLike():
            return local_file(os.fspath(shown), kind, folders)
        case ImageProblem():
            raise shown
        case None | {"bytes": None}:
            raise ImageProblem(f"the document has no {kind}")
        case {"array": samples, "sampling_rate": rate}:
            return _wave(np.asarray(samples, np.float32), int(rate))
        case _:
            raise ImageProblem(f"doc_to_{kind} must give files, their bytes or paths, not {type(shown).__name__}")


def _wave(samples: np.ndarray, rate: int) -> bytes:
    """Samples [samples] or [channels, samples] as a file, without loss."""
    file = io.BytesIO()
    wavfile.write(file, rate, samples.T)
    return file.getvalue()
