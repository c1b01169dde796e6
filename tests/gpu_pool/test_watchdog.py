"""A process that is stopped is killed; one that computes, or whose server was busy itself, is not."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import fake_children
import pytest

from gpu_pool.messages import Alive, FromMerger, decode_from_merger
from gpu_pool.supervisor import Child, spawn
from gpu_pool.watchdog import QUESTIONS, Watchdog

LIMIT_SECONDS = 8.0
"""More than a process needs to start to answer, on a loaded machine."""
PATIENCE_SECONDS = 120.0


class Watched:
    """A process that computes for ever, how often it has answered, and how it ended."""

    def __init__(self, child: Child[FromMerger]) -> None:
        self.child = child
        self.answers: asyncio.Queue[float] = asyncio.Queue()
        self._watchdog = Watchdog(child, LIMIT_SECONDS)
        child.watch(self._on_message, self._on_death)

    async def _on_message(self, message: FromMerger) -> None:
        assert isinstance(message, Alive)
        self._watchdog.alive()
        self.answers.put_nowait(time.monotonic())

    async def _on_death(self, cause: str) -> None:
        pass


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    watched = Watched(await spawn("child", fake_children.watched, str(tmp_path), decode_from_merger))
    async with asyncio.timeout(PATIENCE_SECONDS):
        yield watched
    watched.child.kill()
    await watched.child.gone


async def test_one_that_computes_lives_and_one_that_is_stopped_does_not(watched: Watched) -> None:
    first = await watched.answers.get()
    for _ in range(QUESTIONS + 1):
        last = await watched.answers.get()
    assert last - first > LIMIT_SECONDS
    os.kill(watched.child.pid, signal.SIGSTOP)
    assert await watched.child.gone == "it did not answer for 8 s (unresponsive_s) and was killed"


async def test_a_server_that_hears_nothing_for_a_while_kills_nobody(watched: Watched) -> None:
    await watched.answers.get()
    loop = asyncio.get_running_loop()
    asked = loop.time() + LIMIT_SECONDS / QUESTIONS
    while loop.time() < asked + 0.1:  # the next question is on its way, and its answer not heard
        await asyncio.sleep(0)
    time.sleep(LIMIT_SECONDS + 2)  # as a server that is stopped, or waits for its disk
    await watched.answers.get()
    await watched.answers.get()
    assert not watched.child.killed
