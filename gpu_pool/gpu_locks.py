"""Advisory locks by which evalpool servers on one machine keep off each other's GPUs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

SHARED_FOLDERS = (Path("/run/lock"), Path("/tmp"))
"""Where everybody may leave files; the first that is so on this machine. `TMPDIR` says nothing of it, as each server's
may be another one."""


def default_folder() -> Path:
    """Where servers of all users on this machine meet."""
    return next(filter(_is_everybodys, SHARED_FOLDERS), SHARED_FOLDERS[-1]) / "evalpool-locks"


def _is_everybodys(folder: Path) -> bool:
    try:
        mode = folder.stat().st_mode
    except OSError:
        return False
    return stat.S_ISDIR(mode) and bool(mode & stat.S_ISVTX) and bool(mode & stat.S_IWOTH)


class GpuLock:
    """One GPU, for one server. The lock ends with the process that holds it, however that ends."""

    def __init__(self, uuid: str, folder: Path | None = None) -> None:
        self._folder = folder or default_folder()
        self._name = f"{uuid.replace('/', '_')}.lock"
        self._descriptor: int | None = None
        self.problem: str | None = None
        """Why the last `acquire` or `look` found it taken, for people."""

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def acquire(self) -> bool:
        """Take the lock if nobody holds it, without waiting. True also when it is ours already."""
        if self._descriptor is None and (descriptor := self._try(fcntl.LOCK_EX)) is not None:
            self._descriptor = descriptor
            _sign(descriptor, b"%d\n" % os.getpid())
        return self.held

    def look(self) -> bool:
        """Whether nobody else holds it. Two may look at once; one who takes it at that moment may be refused once."""
        if self._descriptor is None and (descriptor := self._try(fcntl.LOCK_SH)) is not None:
            os.close(descriptor)
        return self.problem is None

    def keep(self) -> None:
        """Say that it is in use, now and then: what nobody touches for days is removed from temporary folders."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):  # another user's file that may only be read
                os.utime(self._descriptor)

    def _try(self, kind: int) -> int | None:
        """The lock file, locked; None where that is not possible, with the `problem` said."""
        try:
            descriptor = self._open()
        except OSError as error:
            self.problem = f"Its lock file {self._folder / self._name} cannot be opened: {error.strerror}."
            return None
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            self.problem = f"Another evalpool server on this machine{_signature(descriptor)} holds it."
        except OSError as error:  # not every network file system can
            self.problem = f"Its lock file {self._folder / self._name} cannot be locked: {error.strerror}."
        else:
            self.problem = None
            return descriptor
        os.close(descriptor)
        return None

    def release(self) -> None:
        """Let go, if it is ours. The file stays: removing it would let two servers lock two files of one name."""
        if self._descriptor is not None:
            _sign(self._descriptor, b"")
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        """The lock file, made when there is none; a file made by another user serves as well."""
        folder = _open_folder(self._folder)
        try:
            try:
                return _create(self._name, folder)
            except FileExistsError:
                return _open_file(self._name, folder)
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
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder)
    os.fchmod(descriptor, 0o666)  # for other users to lock and to sign, whatever the umask
    return descriptor


def _open_file(name: str, folder: int) -> int:
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe, which anybody could have put there: no waiting
    try:
        descriptor = os.open(name, os.O_RDWR | flags, dir_fd=folder)
    except PermissionError:  # to read it suffices to lock it
        descriptor = os.open(name, os.O_RDONLY | flags, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file")
    return descriptor


def _sign(descriptor: int, name: bytes) -> None:
    """Leave the holder's process id for those who find the lock taken."""
    with contextlib.suppress(OSError):  # a full disk, or a file that may only be read: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, name, 0)


def _signature(descriptor: int) -> str:
    """ " (process 123)" of the holder, as far as it has said so; anybody could have written anything there."""
    text = ""
    with contextlib.suppress(OSError):
        text = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
    return f" (process {text})" if text.isdecimal() else ""
