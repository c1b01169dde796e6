"""Advisory locks by which evalpool servers on one machine keep off each other's GPUs."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path


def default_folder() -> Path:
    """Where servers of all users on this machine meet."""
    return Path(tempfile.gettempdir()) / "evalpool-locks"


class GpuLock:
    """One GPU, for one server. The lock ends with the process that holds it, however that ends."""

    def __init__(self, uuid: str, folder: Path | None = None) -> None:
        self._folder = folder or default_folder()
        self._name = f"{uuid.replace('/', '_')}.lock"
        self._descriptor: int | None = None
        self.problem: str | None = None
        """Why the last `acquire` failed, for people."""

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def acquire(self) -> bool:
        """Take the lock if nobody holds it, without waiting. True also when it is ours already."""
        if self._descriptor is None:
            self.problem = self._try()
        return self.held

    def _try(self) -> str | None:
        try:
            descriptor = self._open()
        except OSError as error:
            return f"Its lock file {self._folder / self._name} cannot be opened: {error.strerror}."
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return "Another evalpool server on this machine holds it."
        self._descriptor = descriptor
        return None

    def release(self) -> None:
        """Let go, if it is ours. The file stays: removing it would let two servers lock two files of one name."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        """The lock file, read-only: that suffices to lock, so a file made by another user serves as well."""
        folder = _open_folder(self._folder)
        try:
            try:
                return _create(self._name, folder)
            except FileExistsError:
                return os.open(self._name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        finally:
            os.close(folder)


def _open_folder(path: Path) -> int:
    try:
        path.mkdir(mode=0o700)
        path.chmod(0o1777)  # everybody's, like /tmp; mkdir's own mode is cut by the umask
    except FileExistsError:
        pass
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _create(name: str, folder: int) -> int:
    descriptor = os.open(
        name, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder
    )
    os.fchmod(descriptor, 0o644)  # readable for other users whatever the umask
    return descriptor
