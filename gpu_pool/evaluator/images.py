"""Images of tasks' documents: left as the files that they are, until a worker decodes them.

A data set's images are handed to tasks undecoded. Most tasks only pass them on; to those whose code looks at one it is
decoded then, and behaves as Pillow's.
"""

# pyright: basic
from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname, urlopen

import datasets
import numpy as np
from datasets.config import HF_ENDPOINT
from datasets.utils.file_utils import xopen
from PIL import Image

from gpu_pool.errors import PoolError
from gpu_pool.evaluator.failures import explain

MAX_FILE_BYTES = 128 << 20
"""Of an image's file: what travels to a worker in one message is bounded."""

_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"}

PATIENCE_SECONDS = 20
"""Waited for an answer of a web server that has an image, and for each further piece."""


class ImageProblem(PoolError):
    """A document's image, sound or video cannot be had."""


_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What readers of files raise, Pillow's among them."""


def had_or_problem(get: Callable[[Any], Any], doc: Any) -> Any:
    """What a task's own code shows of a document; the ImageProblem in its place where that opens files, and cannot.

    Errors that do not come of a file, a misspelt name say, are raised as they are.
    """
    try:
        return get(doc)
    except ImageProblem as problem:
        return problem
    except _UNREADABLE as error:
        return ImageProblem(f"the task's code cannot show it: {explain(error)}")


@dataclass(frozen=True)
class Video:
    """A video among the images that a document shows."""

    file: Any
    """Its path, {"bytes", "path"}, or bytes."""


class UndecodedImage(dict[str, Any]):
    """{"bytes", "path"} of an image in a data set; whatever else it is asked for, the decoded image answers.

    It is an instance of Pillow's Image, too: tasks ask. It equals no plain dictionary: `datasets` would take the
    elements of a list for decoded already.
    """

    def __init__(self, value: Mapping[str, Any], decode: Any) -> None:
        super().__init__(value)
        self._decode = decode

    @property
    def __class__(self) -> Any:
        return Image.Image

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UndecodedImage) and super().__eq__(other)

    def __ne__(self, other: object) -> bool:  # a dictionary has its own
        return not self == other

    @cached_property
    def decoded(self) -> Image.Image:
        """The image as `datasets` decodes it: upright, in the mode that the data set asks for.

        Raises:
            ImageProblem: it cannot be decoded.
        """
        try:
            return self._decode(dict(self))
        except _UNREADABLE as error:
            raise ImageProblem(f"the image cannot be decoded: {explain(error)}") from error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and name != "__array_interface__":
            raise AttributeError(name)
        return getattr(self.decoded, name)

    def convert(self, mode: str | None = None, *args: Any, **options: Any) -> Any:
        """Pillow's; of an image that has the mode already the file stays as it is."""
        if mode is not None and "decoded" not in vars(self) and mode == _mode_of(self.get("bytes")):
            return UndecodedImage(self, self._decode)
        return self.decoded.convert(mode, *args, **options)

    def copy(self) -> Any:
        """Pillow's, not a dictionary's."""
        return self.decoded.copy()


def _mode_of(file: bytes | None) -> str | None:
    """The mode that an image file's header says."""
    if file is None:
        return None
    try:
        with Image.open(io.BytesIO(file)) as image:
            return image.mode
    except _UNREADABLE:
        return None


def leave_undecoded() -> None:
    """Let `datasets` give UndecodedImages in this whole process."""
    decode = datasets.Image.decode_example

    def decode_example(self: datasets.Image, value: Any, token_per_repo_id: Any = None) -> Any:
        if not isinstance(value, Mapping) or isinstance(value, UndecodedImage):
            return value
        return UndecodedImage(value, lambda value: decode(self, value, token_per_repo_id))

    datasets.Image.decode_example = decode_example


def shown_in(given: Any) -> Iterator[Any]:
    """The images, sounds or videos of what a task gives for a document: one, or lists of them."""
    if isinstance(given, list | tuple):
        for item in given:
            yield from shown_in(item)
    else:
        yield given


def decoded_bytes(shown: Iterable[Any]) -> int:
    """What those of the images take that the task's code has decoded, or made anew."""
    images = map(_in_memory, shown)
    pixels = [image for image in images if isinstance(image, Image.Image) and not isinstance(image, UndecodedImage)]
    return sum(image.width * image.height * len(image.getbands()) for image in pixels)


def image_file(image: Any, folders: Iterable[Path]) -> bytes:
    """The file of one image: of a data set, a path (a relative one is looked for in `folders`), bytes, or of Pillow.

    Raises:
        ImageProblem: it is none of these, is not there, or is too large.
    """
    data = _file(_in_memory(image), folders)
    if len(data) > MAX_FILE_BYTES:
        raise ImageProblem(f"the image's file has {len(data)} bytes; {MAX_FILE_BYTES} are allowed")
    return data


def _in_memory(image: Any) -> Any:
    """An image that the task's code has decoded, and may have drawn on, as that; all else as it is."""
    return image.decoded if isinstance(image, UndecodedImage) and "decoded" in vars(image) else image


def _file(image: Any, folders: Iterable[Path]) -> bytes:
    match image:
        case bytes(data) | {"bytes": bytes(data)}:
            return data
        case {"path": str(path)} | str(path):
            return _read(path, folders)
        case ImageProblem():
            raise image
        case None | {"bytes": None}:
            raise ImageProblem("the document has no image")
        case Image.Image():
            return _encoded(image)
        case os.PathLike():
            return _read(os.fspath(image), folders)
        case _:
            raise ImageProblem(f"doc_to_image must give images, their bytes or paths, not {type(image).__name__}")


def _encoded(image: Image.Image) -> bytes:
    """Without loss. The task's code may have opened its file without reading it."""
    file = io.BytesIO()
    try:
        if image.mode in _PNG_MODES:
            image.save(file, "PNG", compress_level=1)
        else:
            image.save(file, "TIFF")
    except _UNREADABLE as error:
        raise ImageProblem(f"the image cannot be decoded: {explain(error)}") from error
    return file.getvalue()


def _read(path: str, folders: Iterable[Path]) -> bytes:
    try:
        if "://" in path and not path.startswith("file://"):
            with _opened(path) as file:
                return file.read(MAX_FILE_BYTES + 1)
        with local_file(path, "image", folders).open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise ImageProblem(f"the image file {path} cannot be read: {explain(error)}") from error


def _opened(url: str) -> Any:
    """Whatever `datasets` opens; but it asks a web server that does not answer for more than an hour, here once."""
    if url.startswith(("http://", "https://")) and not url.startswith(HF_ENDPOINT):
        return urlopen(url, timeout=PATIENCE_SECONDS)
    return xopen(url, "rb")


def local_file(path: str, kind: str, folders: Iterable[Path]) -> Path:
    """Where a file lies, a relative path in the first of `folders` that has it. `kind` names it in messages.

    Raises:
        ImageProblem: there is none, or it is a directory, a device, or a pipe, which would be waited for.
    """
    name = url2pathname(urlsplit(path).path) if path.startswith("file://") else path
    candidates = [Path(name)] if os.path.isabs(name) else [folder / name for folder in (*folders, Path())]
    try:
        found = next((candidate for candidate in candidates if candidate.exists()), None)
        if found is None:
            raise ImageProblem(f"the {kind} file {path} does not exist")
        if not found.is_file():
            raise ImageProblem(f"the {kind} file {path} cannot be read: it is no regular file")
        return found.resolve()
    except (OSError, ValueError) as error:  # names that are too long, or that no file can have
        raise ImageProblem(f"the {kind} file {path} cannot be read: {explain(error)}") from error


def described(value: Any) -> Any:
    """A document, or a part of one, with a digest and the size of each file in the place of the file."""
    match value:
        case UndecodedImage() if "decoded" in vars(value):
            return described(value.decoded)
        case bytes():
            return {"sha256": hashlib.sha256(value).hexdigest(), "bytes": len(value)}
        case {"bytes": bytes(data), "path": path, **others} if not others:
            return {"path": path, **described(data)}
        case ImageProblem():
            return {"problem": str(value)}
        case Video():
            return {"video": described(value.file)}
        case dict():
            return {name: described(item) for name, item in value.items()}
        case Image.Image():
            shape = f"{value.mode} {value.width} x {value.height}"
            pixels = had_or_problem(Image.Image.tobytes, value)
            return {"image": shape, **described(pixels)}
        case np.ndarray():
            return {"array": f"{value.dtype} {' x '.join(map(str, value.shape))}", **described(value.tobytes())}
        case list() | tuple():
            return [described(item) for item in value]
        case _:
            return value
