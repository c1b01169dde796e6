"""Child processes: spawn one, talk to it, learn of its death, end it. The seam to other machines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import multiprocessing.process
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
END_SECONDS = 60.0
"""How long a killed one may take to be gone: it gives much memory back. What hangs in a driver may never be gone."""

logger = logging.getLogger(__name__)
_spawn = multiprocessing.get_context("spawn")


class Child(Generic[Received]):
    """One spawned process that leads its own process group, and the server's end of its control pipe."""

    def __init__(self, name: str, process: Any, pidfd: int, channel: Channel[Received], mark: str) -> None:
        """`pidfd` is readable once the process is dead; `mark` is that of all that it starts."""
        self.name = name
        self.pid: int = process.pid
        self.gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Resolves to the cause when the process is dead and its last message was handed over, or cannot be ended."""
        self.why: str | None = None
        """Why we killed it, for people; or what it said itself before it ended. Its exit status tells less."""
        self.exitcode: int | None = None
        """Once it is gone; negative: the signal that ended it."""
        self.killed = False
        """Ended by us: whatever it still says is not wanted."""
        self.was_stopped = False
        """Ended by us as somebody else had stopped it."""
        self._process = process
        self._pidfd = pidfd
        self._channel = channel
        self._mark = mark
        self._dead = asyncio.Event()
        self._over = asyncio.Event()
        """It is dead, or was given up: it will do nothing more, but keeps what it has."""
        self._giving_up: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def watch(
        self, on_message: Callable[[Received], Awaitable[None]], on_death: Callable[[str], Awaitable[None]]
    ) -> asyncio.Task[None]:
        """Start to read messages and to wait for the end; the task is done after `on_death`."""
        loop = asyncio.get_running_loop()

        def died() -> None:
            loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            if self._giving_up:
                self._giving_up.cancel()
            self._dead.set()
            self._over.set()

        loop.add_reader(self._pidfd, died)
        self._task = asyncio.create_task(self._live(on_message, on_death), name=f"watch {self.name}")
        return self._task

    def send(self, message: Message) -> None:
        """Queue a message for the child."""
        self._channel.send(message)

    def kill(self, why: str | None = None, *, from_outside: bool = False) -> None:
        """End the child and everything in its process group, now; `why` becomes the cause of its end, and somebody's
        who had stopped it, `from_outside`."""
        self.killed = True
        if not self._dead.is_set():
            self.why = why or self.why
            self.was_stopped = from_outside
            self._signal_group()
            if self._giving_up is None:
                self._giving_up = asyncio.get_running_loop().call_later(END_SECONDS, self._over.set)

    async def stop(self, grace_seconds: float = POLITE_SECONDS) -> None:
        """Ask it to end, then make it; returns when it is gone, or cannot be ended."""
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
        await self._over.wait()
        cause = "its process is gone"
        try:
            if self._dead.is_set():
                await self._clear_away()
                self._channel.end_input()
                await reading
                cause = self._reap()
            else:
                cause = self._give_up()
        except Exception:  # whatever is left of it, others wait to hear that it is gone
            logger.exception("what is left of %s cannot be cleared away", self.name)
        finally:
            reading.cancel()
            self._channel.close()
        try:
            await on_death(self.why or cause)
        finally:
            self.gone.set_result(self.why or cause)

    async def _clear_away(self) -> None:
        """What it has started ends with it."""
        self._signal_group()  # before the process is reaped: until then its group's number cannot be reused
        await self._end_offspring()

    def _give_up(self) -> str:
        """Go on without it: nobody waits for it any more, not even the end of this process."""
        multiprocessing.process._children.discard(self._process)  # pyright: ignore
        self._burial = asyncio.create_task(self._bury(), name=f"bury {self.name}")
        self.why = f"{self.why or 'it was killed'}; but process {self.pid} is still there after {END_SECONDS:g} s"
        logger.error("%s cannot be ended, as what hangs in a driver: %s", self.name, self.why)
        return self.why

    async def _bury(self) -> None:
        """Once it is dead after all."""
        await self._dead.wait()
        await self._clear_away()
        self._reap()
        logger.warning("%s, which could not be ended, is gone now", self.name)

    async def _end_offspring(self) -> None:
        """What left the group too: it may hold the pipe, or memory of a GPU."""
        sweep = in_daemon_thread(partial(end_all, self._mark), "sweep")
        await asyncio.wait([sweep], timeout=SWEEP_SECONDS)
        problem = sweep.exception() if sweep.done() else f"it takes longer than {SWEEP_SECONDS:g} s"
        if problem:
            logger.warning("processes that %s may have started cannot be looked for now: %s", self.name, problem)

    def _reap(self) -> str:
        """How the dead process ended."""
        self._process.join()
        self.exitcode = self._process.exitcode
        self._process.close()
        return describe_exit(self.exitcode)

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
        for end in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):  # the group does not exist before the child has called setsid
                end(self.pid, signal.SIGKILL)


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
    child with the *thread* that started it. Raises OSError when it cannot be started, or not be watched; then there is
    no process.
    """
    mark = f"{server_mark or uuid.uuid4().hex}/{uuid.uuid4().hex}"
    ours, theirs = _spawn.Pipe(duplex=True)
    with ours, theirs:  # once it has its end, ours must be closed here, or its death would never show as the end
        process = _spawn.Process(target=target, args=(theirs, start, os.getpid()), name=name)
        with hidden(secrets):
            resource_tracker.ensure_running()  # it serves all children: it is nobody's offspring
            with marked(mark):
                process.start()
        mark_process(process.pid or 0, mark)
        with contextlib.ExitStack() as unless_watched:
            unless_watched.callback(_end, process)
            pidfd = os.pidfd_open(process.pid or 0)
            unless_watched.callback(os.close, pidfd)
            channel = await Channel[Received].over(ours, decode)
            unless_watched.pop_all()
    return Child(name, process, pidfd, channel, mark)


def _end(process: Any) -> None:
    """End a process that has just been started, and has started nothing itself."""
    process.kill()
    process.join()
    process.close()


def describe_exit(exitcode: int | None) -> str:
    """An exit code in words: "killed by SIGKILL", "killed by signal 40", "exit code 1"."""
    if exitcode is None:
        return "not ended"
    if exitcode >= 0:
        return f"exit code {exitcode}"
    named = {member.value: member.name for member in signal.Signals}  # most of the real-time signals have no name
    return f"killed by {named.get(-exitcode, f'signal {-exitcode}')}"
