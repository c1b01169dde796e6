"""GPU locks between real processes and hostile folders."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_pool.gpu_locks import GpuLock, default_folder

HOLDER = """
import sys
from pathlib import Path
from gpu_pool.gpu_locks import GpuLock
lock = GpuLock("GPU-1", Path(sys.argv[1]))
print(lock.acquire(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "locks"


def test_one_of_two_holds_a_lock_until_it_releases(folder: Path) -> None:
    first, second, other = (GpuLock(uuid, folder) for uuid in ("GPU-1", "GPU-1", "GPU-2"))
    assert first.acquire()
    assert first.acquire()
    assert not second.acquire()
    assert second.problem == f"Another evalpool server on this machine (process {os.getpid()}) holds it."
    assert not second.held
    assert other.acquire()
    first.release()
    first.release()
    assert second.acquire()
    assert second.problem is None
    assert not first.acquire()


def test_looking_takes_nothing(folder: Path) -> None:
    first, second = GpuLock("GPU-1", folder), GpuLock("GPU-1", folder)
    assert first.look()
    assert second.acquire()
    assert second.look()
    assert not first.look()
    assert first.problem == f"Another evalpool server on this machine (process {os.getpid()}) holds it."
    assert not first.held
    second.release()
    assert first.look()
    assert first.problem is None


def test_who_holds_it_is_said_only_where_it_is_known(folder: Path) -> None:
    first, second = GpuLock("GPU-1", folder), GpuLock("GPU-1", folder)
    assert first.acquire()
    for text in ("", "me, \x1b[31mhonestly", "\xff"):
        (folder / "GPU-1.lock").write_text(text)
        assert not second.acquire()
        assert second.problem == "Another evalpool server on this machine holds it."


def test_a_file_that_may_only_be_read_locks_as_well(folder: Path) -> None:
    folder.mkdir()
    lock, other = GpuLock("GPU-1", folder), GpuLock("GPU-1", folder)
    descriptor = os.open(folder / "GPU-1.lock", os.O_RDONLY | os.O_CREAT)
    lock._open = lambda: descriptor  # root may write every file
    assert lock.acquire()
    lock.keep()
    assert not other.acquire()
    assert other.problem == "Another evalpool server on this machine holds it."
    lock.release()
    assert other.acquire()


def test_a_file_that_cannot_be_locked_is_a_problem_in_words(folder: Path) -> None:
    folder.mkdir()
    file = folder / "GPU-1.lock"
    file.touch()
    lock = GpuLock("GPU-1", folder)
    opened: list[int] = []

    def without_locks() -> int:
        opened.append(os.open(file, os.O_PATH))  # flock says EBADF, as on some network file systems
        return opened[-1]

    lock._open = without_locks
    for attempt in (lock.acquire, lock.look):
        assert not attempt()
        assert lock.problem == f"Its lock file {file} cannot be locked: Bad file descriptor."
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(opened[-1])  # it is closed


def test_a_signature_that_cannot_be_read_is_not_said(folder: Path) -> None:
    lock, other = GpuLock("GPU-1", folder), GpuLock("GPU-1", folder)
    assert lock.acquire()
    other._open = lambda: os.open(folder / "GPU-1.lock", os.O_WRONLY)
    assert not other.acquire()
    assert other.problem == "Another evalpool server on this machine holds it."


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDONLY], ids=["writable", "read-only"])
def test_a_pipe_in_the_place_of_the_file_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, flags: int) -> None:
    folder.mkdir()
    os.mkfifo(folder / "GPU-1.lock")
    if flags == os.O_RDONLY:
        monkeypatch.setattr(os, "O_RDWR", os.O_RDONLY)  # root may write every file
    lock = GpuLock("GPU-1", folder)
    for attempt in (lock.acquire, lock.look):
        assert not attempt()
        assert lock.problem == f"Its lock file {folder / 'GPU-1.lock'} cannot be opened: Not a regular file."


def test_a_lock_dies_with_its_process(folder: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        lock = GpuLock("GPU-1", folder)
        assert not lock.acquire()
        holder.kill()
    assert lock.acquire()


def test_a_child_does_not_inherit_a_lock(folder: Path) -> None:
    lock = GpuLock("GPU-1", folder)
    assert lock.acquire()
    command = [sys.executable, "-c", "import sys; print('started', flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, close_fds=False) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n"
        lock.release()
        assert GpuLock("GPU-1", folder).acquire()


def test_other_users_can_lock_whatever_the_umask(folder: Path) -> None:
    umask = os.umask(0o077)
    try:
        assert GpuLock("MIG-GPU-1/2/3", folder).acquire()
    finally:
        os.umask(umask)
    (file,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777
    assert stat.S_IMODE(file.stat().st_mode) == 0o666


def test_links_are_not_followed(tmp_path: Path, folder: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    folder.symlink_to(target)
    through_folder = GpuLock("GPU-1", folder)
    assert not through_folder.acquire()
    assert "cannot be opened" in (through_folder.problem or "")
    (target / "GPU-2.lock").symlink_to(tmp_path / "victim")
    assert not GpuLock("GPU-2", target).acquire()
    assert not (tmp_path / "victim").exists()


def test_the_default_folder_is_the_same_whatever_the_temporary_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As slurm and systemd give each job or service one of its own."""
    command = [sys.executable, "-c", "from gpu_pool.gpu_locks import default_folder; print(default_folder())"]

    def folder(temporary: str) -> str:
        (tmp_path / temporary).mkdir()
        environment = os.environ | {"TMPDIR": str(tmp_path / temporary)}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert folder("one") == folder("other")


def test_the_default_folder_is_where_everybody_may_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared = tuple(tmp_path / name for name in ("none", "file", "root's", "everybody's", "another"))
    monkeypatch.setattr("gpu_pool.gpu_locks.SHARED_FOLDERS", shared)
    assert default_folder() == tmp_path / "another" / "evalpool-locks"
    (tmp_path / "file").touch()
    for name, mode in (("root's", 0o755), ("everybody's", 0o1777), ("another", 0o1777)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    assert default_folder() == tmp_path / "everybody's" / "evalpool-locks"
