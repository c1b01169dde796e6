"""Child processes: spawn one, talk to it, learn of its death, end it. The seam to other machines."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import uuid
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Generic

import msgspec

from gpu_pool.channel import Channel, OversizeFrame, Received
from gpu_pool.daemon_thread import in_daemon_thread
from gpu_pool.messages import Message, Shutdown
from gpu_pool.offspring import SWEEP_SECONDS, end_all, hidden, mark_process, marked

POLITE_SECONDS = 2.0
"""How long a child may take to end after Shutdown before it is killed."""

logger = logging.getLogger(__name__)
_spawn = multiprocessing.get_context("spawn")


class Child(Generic[Received]):
    """One spawned process that leads its own process group, and the server's end of its control pipe."""

    def __init__(self, name: str, process: Any, channel: Channel[Received], mark: str) -> None:
        """`mark` is that of all that the process starts."""
        self.name = name
        self.pid: int = process.pid
        self.gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Resolves to the cause when the process is dead and its last message was handed over."""
        self.why: str | None = None
        """Why we killed it, for people; or what it said itself before it ended. Its exit status tells less."""
        self.killed = False
        """Ended by us: whatever it still says is not wanted."""
        self._process = process
        self._channel = channel
        self._mark = mark
        self._dead = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def watch(
        self, on_message: Callable[[Received], Awaitable[None]], on_death: Callable[[str], Awaitable[None]]
    ) -> asyncio.Task[None]:
        """Start to read messages and to wait for the end; the task is done after `on_death`."""
        loop = asyncio.get_running_loop()
        descriptor = os.pidfd_open(self.pid)

        def died() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            self._dead.set()

        loop.add_reader(descriptor, died)
        self._task = asyncio.create_task(self._live(on_message, on_death), name=f"watch {self.name}")
        return self._task

    def send(self, message: Message) -> None:
        """Queue a message for the child."""
        self._channel.send(message)

    def kill(self, why: str | None = None) -> None:
        """End the child and everything in its process group, now; `why` becomes the cause of its end."""
        self.killed = True
        if not self._dead.is_set():
            self.why = why or self.why
            self._signal_group()

    async def stop(self, grace_seconds: float = POLITE_SECONDS) -> None:
        """Ask it to end, then make it; returns when it is gone."""
        self.send(Shutdown())
        try:
            async with asyncio.timeout(grace_seconds):
                await self._dead.wait()
        except TimeoutError:
            logger.warning("%s did not end within %g s and is killed", self.name, grace_seconds)
        self.kill()
        await asyncio.shield(self.gone)

    async def _live(
        self, on_message: Callable[[Received], Awaitable[None]], on_death: Callable[[str], Awaitable[None]]
    ) -> None:
        reading = asyncio.create_task(self._read(on_message), name=f"read {self.name}")
        await self._dead.wait()
        self._signal_group()  # before the process is reaped: until then its group's number cannot be reused
        await self._end_offspring()
        self._channel.end_input()
        await reading
        self._channel.close()
        self._process.join()
        cause = self.why or describe_exit(self._process.exitcode)
        self._process.close()
        await on_death(cause)
        self.gone.set_result(cause)

    async def _end_offspring(self) -> None:
        """What left the group too: it may hold the pipe, or memory of a GPU."""
        sweep = in_daemon_thread(partial(end_all, self._mark), "sweep")
        _, unfinished = await asyncio.wait([sweep], timeout=SWEEP_SECONDS)
        if unfinished:
            logger.warning("processes that %s may have started cannot be looked for now", self.name)

    async def _read(self, on_message: Callable[[Received], Awaitable[None]]) -> None:
        try:
            async for message in self._channel.messages():
                if not self.killed:
                    await on_message(message)
        except (OversizeFrame, msgspec.DecodeError) as error:
            logger.error("%s sent nonsense and is killed: %s", self.name, error)
            self.kill()
        except Exception as error:  # nobody would hear the child any more
            logger.exception("what %s says cannot be handled, and it is killed", self.name)
            self.kill(f"what it said could not be handled: {error!r}")

    def _signal_group(self) -> None:
        for end in (lambda: os.killpg(self.pid, signal.SIGKILL), lambda: os.kill(self.pid, signal.SIGKILL)):
            try:  # the group does not exist before the child has called setsid
                end()
            except ProcessLookupError:
                continue


async def spawn(
    name: str,
    target: Callable[[Connection, Any, int], None],
    start: Any,
    decode: Callable[[bytes], Received],
    server_mark: str = "",
    secrets: Collection[str] = (),
) -> Child[Received]:
    """Start `target(connection, start, parent_pid)` in a new interpreter; `server_mark` is on all that it starts.

    It finds the variables `secrets` of the environment empty. Must run on the main thread's loop: the kernel ends the
    child with the *thread* that started it.
    """
    ours, theirs = _spawn.Pipe(duplex=True)
    process = _spawn.Process(target=target, args=(theirs, start, os.getpid()), name=name)
    mark = f"{server_mark or uuid.uuid4().hex}/{uuid.uuid4().hex}"
    with hidden(secrets):
        resource_tracker.ensure_running()  # it serves all children: it is nobody's offspring
        with marked(mark):
            process.start()
    mark_process(process.pid or 0, mark)
    theirs.close()  # or its death would never show as the end of the pipe
    return Child(name, process, await Channel[Received].over(ours, decode), mark)


def describe_exit(exitcode: int | None) -> str:
    """An exit code in words: "killed by SIGKILL", "exit code 1"."""
    if exitcode is None:
        return "not ended"
    if exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exit code {exitcode}"
