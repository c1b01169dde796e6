"""Whose doing the end of a process was: real ones that are killed, fail, and end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import fake_children
import pytest

from gpu_pool.messages import Shutdown, decode_from_worker
from gpu_pool.post_mortem import PostMortem
from gpu_pool.supervisor import Child, spawn


async def nothing(*_: object) -> None:
    """Nobody hears."""


async def ended(folder: Path, target: Callable[..., None], end: Callable[[Child], None]) -> Child:
    """A child after its end."""
    child = await spawn("child", target, str(folder), decode_from_worker)
    child.watch(nothing, nothing)
    end(child)
    await child.gone
    return child


def send(number: int) -> Callable[[Child], None]:
    return lambda child: os.kill(child.pid, number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_who_is_killed_did_nothing_unless_memory_ran_out(tmp_path: Path, number: int) -> None:
    oom_kills = 7
    post_mortem = PostMortem(lambda: oom_kills)
    child = await ended(tmp_path, fake_children.deaf, send(number))
    assert child.exitcode == -number
    assert post_mortem.is_from_outside(child) == (number == signal.SIGKILL)
    oom_kills += 1
    assert not post_mortem.is_from_outside(child)
    assert post_mortem.is_from_outside(child) == (number == signal.SIGKILL)


@pytest.mark.parametrize("end", [Child.kill, lambda child: child.send(Shutdown())])
async def test_what_we_end_ourselves_and_what_exits_was_killed_by_nobody(
    tmp_path: Path, end: Callable[[Child], None]
) -> None:
    child = await ended(tmp_path, fake_children.echo, end)
    assert not PostMortem(lambda: 0).is_from_outside(child)
