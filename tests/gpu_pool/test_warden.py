"""What is left when a server and its children are killed at once: real processes, all of them."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import fake_children
import pytest

from gpu_pool import warden as warden_module
from gpu_pool.offspring import VARIABLE, marked
from gpu_pool.warden import Warden

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 120  # a bound for a loaded machine, not an expectation
SERVER = """
import asyncio, subprocess, sys
from pathlib import Path
sys.path.insert(0, {fakes!r})
import fake_children
from gpu_pool.messages import decode_from_worker
from gpu_pool.supervisor import spawn
from gpu_pool.warden import Warden

async def main():
    folder = Path({folder!r})
    warden = Warden(folder)
    await warden.start()
    child = await spawn("child", fake_children.with_scattered_offspring, str(folder), decode_from_worker, warden.mark)
    async def on_message(message): print(warden._process.pid, child.pid, message.job_id, flush=True)
    async def on_death(cause): pass
    await child.watch(on_message, on_death)

if __name__ == "__main__":
    asyncio.run(main())
"""

START_AND_CLOSE = """
import asyncio, sys
from pathlib import Path
from gpu_pool.warden import Warden

async def main():
    warden = Warden(Path(sys.argv[1]))
    await warden.start()
    warden.close()

asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def _wardens_may_be_slow() -> Generator[None]:
    """To start and to look for what is left; not by the test's own `monkeypatch`, which may be undone meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warden_module, "END_SECONDS", PATIENCE_SECONDS)
        patch.setattr(warden_module, "SWEEP_SECONDS", PATIENCE_SECONDS)
        yield


class Running(NamedTuple):
    """Pids of a server, its warden, its child, and what that has started."""

    server: subprocess.Popen[str]
    warden: int
    child: int
    offspring: Sequence[int]

    def kill(self, *pids: int) -> None:
        """SIGKILL to the server, its child and these, with none of them left to see another one die."""
        together = (self.server.pid, self.child, *pids)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in together:
                os.kill(pid, number)
        self.server.wait()


@contextmanager
def running(folder: Path) -> Generator[Running]:
    (folder / "server.py").write_text(SERVER.format(fakes=str(Path(fake_children.__file__).parent), folder=str(folder)))
    command = [sys.executable, folder / "server.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        warden, child, *offspring = map(int, server.stdout.readline().split())
        try:
            yield Running(server, warden, child, offspring)
        finally:
            server.kill()
            for pid in (warden, child, *offspring):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def watched(pids: Sequence[int]) -> list[int]:
    """A pidfd of each, while they live."""
    return [os.pidfd_open(pid) for pid in pids]


def ends(descriptor: int) -> bool:
    readable, _, _ = select.select([descriptor], [], [], PATIENCE_SECONDS)
    os.close(descriptor)
    return bool(readable)


@contextmanager
def sleeping(**options: Any) -> Generator[subprocess.Popen[bytes]]:
    """A process that would live for ever."""
    with subprocess.Popen(["sleep", "1000"], **options) as process:
        try:
            yield process
        finally:
            process.kill()


async def replaced(warden: Warden, first: subprocess.Popen[bytes] | None) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while warden._process in (None, first):
            await asyncio.sleep(0.01)


async def pass_by(folder: Path) -> None:
    """As a server that starts on the folder, and ends."""
    warden = Warden(folder)
    await warden.start()
    warden.close()


def test_all_that_children_started_ends_with_the_server(tmp_path: Path) -> None:
    with running(tmp_path) as all_of_them:
        left = watched([all_of_them.warden, *all_of_them.offspring])
        all_of_them.kill()
        assert all(map(ends, left))


async def test_the_next_server_ends_what_no_warden_was_left_for(tmp_path: Path) -> None:
    with running(tmp_path) as all_of_them:
        left = watched(all_of_them.offspring)
        all_of_them.kill(all_of_them.warden)
        await pass_by(Path(shutil.copytree(tmp_path, tmp_path.with_name("copy"))))
        assert select.select(left, [], [], 0)[0] == []
        await pass_by(tmp_path)
        assert all(map(ends, left))


async def test_a_warden_that_ends_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warden = Warden(tmp_path)
    await warden.start()
    first = warden._process
    assert first is not None
    first.kill()
    await replaced(warden, first)
    assert "another one is started" in caplog.text
    warden.close()
    warden.close()


async def test_a_warden_that_cannot_be_watched_ends_nothing_and_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    warden = Warden(tmp_path)
    wardens: list[int] = []

    def without_descriptors(pid: int) -> int:
        monkeypatch.undo()
        wardens.append(pid)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with sleeping(env={**os.environ, VARIABLE: f"{warden.mark}/child"}) as child:
        monkeypatch.setattr(os, "pidfd_open", without_descriptors)
        await warden.start()
        assert warden._process is None
        assert "Too many open files" in caplog.text
        with pytest.raises(ProcessLookupError):
            os.kill(wardens[0], 0)
        assert child.poll() is None
        await replaced(warden, None)
        warden.close()
        assert child.wait(PATIENCE_SECONDS) == -signal.SIGKILL


@pytest.mark.parametrize("before", [None, "another-server/its-child"])
async def test_a_program_that_had_a_server_in_it_starts_what_it_likes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, before: str | None
) -> None:
    monkeypatch.setenv(VARIABLE, before or "")
    if before is None:
        monkeypatch.delenv(VARIABLE)
    warden = Warden(tmp_path)
    await warden.start()
    record = tmp_path / "processes.mark"
    text = record.read_text()
    with marked(f"{warden.mark}/child"):
        pass
    warden.close()
    assert os.environ[VARIABLE] == (before or "")
    assert not record.exists()
    with sleeping() as later:
        for left in (text, text.partition(" ")[0] + " "):  # of a server that was killed, or found no room
            record.write_text(left)
            await pass_by(tmp_path)
        assert "are ended" not in caplog.text
        assert later.poll() is None


@pytest.mark.parametrize(("mounted", "warns"), [([], True), (["--mount-proc"], False)])
def test_a_warden_that_cannot_know_processes_is_announced(tmp_path: Path, mounted: list[str], warns: bool) -> None:
    unshare = ["unshare", "--pid", "--fork", *mounted]
    if subprocess.run([*unshare, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("namespaces may not be made here")
    command = [*unshare, sys.executable, "-c", START_AND_CLOSE, tmp_path]
    ran = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ("/proc is not that of this server's process namespace" in ran.stderr) == warns


async def test_a_full_disk_keeps_the_record_not_the_server_from_starting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = tmp_path / "processes.mark"
    record.write_text("another-folder another-mark")
    warden = Warden(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # Python ignores the signal: to write is an error
    try:
        await warden.start()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the next server will not know" in caplog.text
    assert record.read_text() == "another-folder another-mark"
    assert list(tmp_path.iterdir()) == [record]
    assert warden._process is not None, "it works without a record"
    warden.close()


async def test_a_start_does_not_wait_for_ever_for_what_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stuck, sweepers = threading.Event(), list[threading.Thread]()

    def end_all(mark: str) -> set[int]:
        """As where the kernel does not tell a process's environment."""
        sweepers.append(threading.current_thread())
        stuck.wait()
        return set()

    first = Warden(tmp_path)
    first._write_record()
    monkeypatch.setattr(warden_module, "end_all", end_all)
    monkeypatch.setattr(warden_module, "SWEEP_SECONDS", 0.05)
    try:
        await pass_by(tmp_path)
        assert "cannot be looked for now" in caplog.text
        [sweeper] = sweepers
        assert sweeper.daemon, "nor does the end of the process wait for it"
    finally:
        stuck.set()
    sweeper.join()
