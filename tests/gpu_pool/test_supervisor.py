"""Real spawned processes: messages, deaths, groups, and what a child does that hangs or talks nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import multiprocessing
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path

import fake_children
import pytest

from gpu_pool.messages import DropJob, Dropped, FromWorker, decode_from_worker
from gpu_pool.supervisor import Child, describe_exit, spawn

PATIENCE_SECONDS = 120  # a bound for a loaded machine, not an expectation


class Watched:
    """A child, what it said, and how it ended."""

    def __init__(self, child: Child[FromWorker]) -> None:
        self.child = child
        self.said: asyncio.Queue[str] = asyncio.Queue()
        self.causes: list[str] = []
        child.watch(self.on_message, self.on_death)

    async def on_message(self, message: FromWorker) -> None:
        assert isinstance(message, Dropped)
        self.said.put_nowait(message.job_id)

    async def on_death(self, cause: str) -> None:
        self.causes.append(cause)


async def start(target: Callable[..., None], folder: Path) -> Watched:
    return Watched(await spawn("child", target, str(folder), decode_from_worker))


def ends(descriptor: int) -> bool:
    """Whether the process of this pidfd, which need not be a child of ours, ends in time."""
    readable, _, _ = select.select([descriptor], [], [], PATIENCE_SECONDS)
    os.close(descriptor)
    return bool(readable)


async def test_messages_go_both_ways_and_output_goes_to_the_log(tmp_path: Path) -> None:
    watched = await start(fake_children.echo, tmp_path)
    for word in ("a", "b"):
        watched.child.send(DropJob(job_id=word))
        assert await watched.said.get() == word
    await watched.child.stop(PATIENCE_SECONDS)
    assert watched.causes == ["exit code 0"]
    assert (tmp_path / "child.log").read_text() == "started\nfrom below python\n"


async def test_a_log_that_cannot_be_written_costs_the_log_not_the_child(tmp_path: Path) -> None:
    (tmp_path / "no folder").touch()
    (tmp_path / "a folder" / "child.log").mkdir(parents=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "child.log").symlink_to("/dev/full")
    for folder in ("no folder", "a folder", "full"):
        watched = await start(fake_children.echo, tmp_path / folder)
        watched.child.send(DropJob(job_id=folder))
        assert await watched.said.get() == folder
        await watched.child.stop(PATIENCE_SECONDS)
        assert watched.causes == ["exit code 0"]


async def test_last_words_are_heard_before_the_death(tmp_path: Path) -> None:
    watched = await start(fake_children.last_words, tmp_path)
    assert await watched.child.gone == "killed by SIGSEGV"
    assert watched.said.get_nowait() == "last words"


async def test_a_child_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    watched = await start(fake_children.deaf, tmp_path)
    await watched.said.get()
    await watched.child.stop(grace_seconds=0.1)
    assert watched.causes == ["killed by SIGKILL"]


async def test_one_that_cannot_be_ended_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As what waits for a driver in the kernel, which no signal reaches."""
    monkeypatch.setattr("gpu_pool.supervisor.END_SECONDS", 0.5)
    before = _children()
    watched = await start(fake_children.deaf, tmp_path)
    child = watched.child
    await watched.said.get()
    monkeypatch.setattr(child, "_signal_group", lambda: None)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await child.stop(grace_seconds=0.1)
    assert watched.causes == [f"it was killed; but process {child.pid} is still there after 0.5 s"]
    assert child.pid not in {process.pid for process in multiprocessing.active_children()}  # or exit waits for it
    os.kill(child.pid, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await child._burial
    assert len(watched.causes) == 1
    assert _children() == before
    assert "is gone now" in caplog.text


async def test_half_a_frame_blocks_nobody_else(tmp_path: Path) -> None:
    hung = await start(fake_children.half_a_frame, tmp_path / "hung")
    watched = await start(fake_children.echo, tmp_path / "well")
    watched.child.send(DropJob(job_id="a"))
    assert await watched.said.get() == "a"
    hung.child.kill()
    watched.child.kill()
    await asyncio.gather(hung.child.gone, watched.child.gone)


@pytest.mark.parametrize("target", [fake_children.nonsense, fake_children.oversize])
async def test_a_child_that_talks_nonsense_is_killed(target: Callable[..., None], tmp_path: Path) -> None:
    watched = await start(target, tmp_path)
    assert await watched.child.gone == "killed by SIGKILL"


async def test_a_grandchild_that_holds_the_pipe_dies_with_its_parent(tmp_path: Path) -> None:
    watched = await start(fake_children.with_grandchild, tmp_path)
    grandchild = os.pidfd_open(int(await watched.said.get()))
    watched.child.send(DropJob(job_id="die"))
    assert await watched.child.gone == "exit code 3"
    assert ends(grandchild)


async def test_a_pipe_that_somebody_else_holds_open_ends_with_the_child(tmp_path: Path) -> None:
    watched = await start(fake_children.with_an_escaped_grandchild, tmp_path)
    assert await watched.child.gone == "exit code 3"
    os.kill(int(watched.said.get_nowait()), signal.SIGKILL)


async def test_a_death_is_told_when_all_that_was_said_before_is_handled(tmp_path: Path) -> None:
    order: list[str] = []

    async def on_message(message: FromWorker) -> None:
        await asyncio.sleep(1)  # as on a slow database
        order.append("message")

    async def on_death(cause: str) -> None:
        order.append("death")

    child = await spawn("child", fake_children.last_words, str(tmp_path), decode_from_worker)
    await child.watch(on_message, on_death)
    assert order == ["message", "death"]


async def test_a_child_whose_messages_cannot_be_handled_is_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody would hear it any more."""
    causes: list[str] = []

    async def on_message(message: FromWorker) -> None:
        raise KeyError("a defect")

    async def on_death(cause: str) -> None:
        causes.append(cause)

    child = await spawn("child", fake_children.busy, str(tmp_path), decode_from_worker)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await child.watch(on_message, on_death)
    assert causes == ["what it said could not be handled: KeyError('a defect')"]
    assert "a defect" in caplog.text


async def test_whatever_a_child_has_started_dies_with_it(tmp_path: Path) -> None:
    bystander = await start(fake_children.echo, tmp_path / "bystander")
    watched = await start(fake_children.with_scattered_offspring, tmp_path)
    offspring = [os.pidfd_open(int(pid)) for pid in (await watched.said.get()).split()]
    watched.child.send(DropJob(job_id="die"))
    assert await watched.child.gone == "exit code 3"
    assert all(map(ends, offspring))
    bystander.child.send(DropJob(job_id="a"))
    assert await bystander.said.get() == "a"
    bystander.child.kill()
    await bystander.child.gone


async def test_what_a_killed_child_still_says_is_not_heard(tmp_path: Path) -> None:
    watched = await start(fake_children.echo, tmp_path)
    watched.child.kill()
    watched.child.send(DropJob(job_id="a"))
    await watched.child.gone
    assert watched.said.empty()
    watched.child.kill()  # its process is gone: nothing to signal


@pytest.mark.usefixtures("no_more_threads")
async def test_a_death_is_told_where_nothing_can_be_looked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = await start(fake_children.last_words, tmp_path)
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await watched.child.gone == "killed by SIGSEGV"
    assert watched.causes == ["killed by SIGSEGV"]
    assert "cannot be looked for now" in caplog.text


async def test_a_death_by_a_signal_without_a_name_is_told(tmp_path: Path) -> None:
    watched = await start(fake_children.deaf, tmp_path)
    await watched.said.get()
    os.kill(watched.child.pid, 40)
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await watched.child.gone == "killed by signal 40"
    assert watched.causes == ["killed by signal 40"]


async def test_who_waits_for_an_end_hears_of_it_whatever_others_make_of_it(tmp_path: Path) -> None:
    async def on_message(message: FromWorker) -> None:
        pass

    async def on_death(cause: str) -> None:
        raise KeyError("a defect")

    child = await spawn("child", fake_children.last_words, str(tmp_path), decode_from_worker)
    with pytest.raises(KeyError):
        await child.watch(on_message, on_death)
    assert await asyncio.wait_for(child.gone, PATIENCE_SECONDS) == "killed by SIGSEGV"


async def test_without_descriptors_no_process_is_left(tmp_path: Path) -> None:
    """However many there are left: it is started and watched, or it is not there."""
    resource_tracker.ensure_running()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    failures = 0
    for left in itertools.count():
        before = (_children(), _descriptors())
        with contextlib.ExitStack() as stack:
            while (gap := os.open(os.devnull, os.O_RDONLY)) < max(before[1]):
                stack.callback(os.close, gap)
            os.close(gap)
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[1]) + 1 + left, limits[1]))
            try:
                watched = await start(fake_children.echo, tmp_path)
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                failures += 1
                watched = None
        if watched is not None:
            await watched.child.stop(PATIENCE_SECONDS)
            assert watched.causes == ["exit code 0"]
        assert (_children(), _descriptors()) == before
        if watched is not None:
            break
    assert failures > 5  # it needs the two ends of the control pipe, those of another one, and a pidfd


def _children() -> set[str]:
    """Pids of all processes that this one has started and not yet reaped."""
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def _descriptors() -> set[int]:
    found = {int(name) for name in os.listdir("/proc/self/fd")}
    return {descriptor for descriptor in found if os.path.exists(f"/proc/self/fd/{descriptor}")}


def test_children_die_with_a_parent_that_is_killed_even_while_they_compute(tmp_path: Path) -> None:
    script = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(fake_children.__file__).parent)!r})
import fake_children
from gpu_pool.messages import decode_from_worker
from gpu_pool.supervisor import spawn

async def main():
    child = await spawn("busy", fake_children.busy, {str(tmp_path)!r}, decode_from_worker)
    async def on_message(message): print(child.pid, flush=True)
    async def on_death(cause): pass
    await child.watch(on_message, on_death)

if __name__ == "__main__":
    asyncio.run(main())
"""
    (tmp_path / "parent.py").write_text(script)
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        descriptor = os.pidfd_open(pid)
        parent.send_signal(signal.SIGKILL)
    assert ends(descriptor)


def test_exit_codes_in_words() -> None:
    assert describe_exit(0) == "exit code 0"
    assert describe_exit(-9) == "killed by SIGKILL"
    assert describe_exit(-34) == "killed by SIGRTMIN"
    assert describe_exit(-40) == "killed by signal 40"
    assert describe_exit(None) == "not ended"
