"""Opens files of sound and video for FFmpeg's decoders (PyAV)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator
from typing import Any, Literal

import av
from av.error import FFmpegError

from gpu_pool.truncation import is_cut_off


@contextlib.contextmanager
def open_container(file: bytes | str, kind: Literal["sound", "video"], problem: type[Exception]) -> Generator[Any]:
    """The streams of a file of that kind, its content or its path.

    It is read through Python, and no playlist in it may name further files or addresses.

    Raises:
        Exception: `problem`, when it is empty, cut off, cannot be read, or is no such file; also for what decoders
            raise inside.
    """
    if not file:
        raise problem(f"the {kind} file is empty")
    options = {"protocol_whitelist": "none"}
    try:
        with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as source:
            if is_cut_off(source):
                raise problem(f"the {kind} cannot be decoded: the file ends before the length that it states")
            with av.open(source, mode="r", metadata_errors="ignore", options=options) as container:
                yield container
    except problem:
        raise
    except FileNotFoundError:
        raise problem(f"the {kind} file {file!r} does not exist") from None
    except (FFmpegError, OSError, ValueError) as error:
        raise problem(f"the {kind} cannot be decoded: {type(error).__name__}: {error}") from error
