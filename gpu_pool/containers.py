"""Opens files of sound and video for FFmpeg's decoders (PyAV)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator
from typing import Any

import av


@contextlib.contextmanager
def open_container(file: bytes | str) -> Generator[Any]:
    """The streams of a file, its content or its path.

    It is read through Python, and no playlist in it may name further files or addresses.

    Raises:
        OSError: it cannot be read, or (av.FFmpegError) is no such file.
    """
    options = {"protocol_whitelist": "none"}
    with (
        io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as source,
        av.open(source, mode="r", metadata_errors="ignore", options=options) as container,
    ):
        yield container
