"""The media files of one job, each once, by their digests.

Those that only a data set holds are on disk, because there may be more than memory holds; those that have a path of
their own stay where they are.
"""

# pyright: basic
from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

from gpu_pool.chunk_messages import MediaFile
from gpu_pool.evaluator.disk_room import DiskRoom
from gpu_pool.evaluator.images import ImageProblem


class MediaFiles:
    """What one job's prompts show."""

    def __init__(self, folder: Path, room: DiskRoom) -> None:
        """A file without a name in `folder` holds them, when there is room: it is gone when this process is."""
        self._folder = folder
        self._room = room
        self._lock = threading.Lock()
        self._file: Any = None
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        self._paths: dict[str, MediaFile] = {}
        self._digests: dict[tuple[Path, int, int], str] = {}

    def add(self, data: bytes) -> str:
        """Keep a file; returns its digest (sha256 hex).

        Raises:
            OSError: it cannot be written, and not because the disk is full.
        """
        digest = hashlib.sha256(data).hexdigest()
        with self._lock:
            if digest not in self._places:
                self._room.wait(lambda: self._write(data))
                self._places[digest] = (self._end, len(data))
                self._end += len(data)
        return digest

    def _write(self, data: bytes) -> None:
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed with the job)
            self._file.seek(self._end)
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._folder)) from error

    def add_path(self, path: Path) -> str:
        """Remember a file where it lies; returns its digest. It is read once, a piece at a time, until it changes.

        Raises:
            ImageProblem: it cannot be read.
        """
        try:
            status = path.stat()
            key = (path, status.st_size, status.st_mtime_ns)
            with self._lock:
                known = self._digests.get(key)
            if known is not None:
                return known
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ImageProblem(f"the file {path} cannot be read: {error.strerror or error}") from error
        found = MediaFile(digest=digest, path=os.fspath(path), size=key[1], modified_ns=key[2])
        with self._lock:
            self._digests[key] = digest
            self._paths.setdefault(digest, found)
        return digest

    def read(self, digest: str) -> bytes | MediaFile:
        """A file that was added, or where it is; from any thread."""
        if (found := self._paths.get(digest)) is not None:
            return found
        start, length = self._places[digest]
        return os.pread(self._file.fileno(), length, start)

    def close(self) -> None:
        """Give the disk space back."""
        if self._file is not None:
            self._file.close()
