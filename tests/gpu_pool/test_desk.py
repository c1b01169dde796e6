"""The desk's process is kept alive; what it answers is tested with the service."""

from __future__ import annotations

import asyncio
import errno

import pytest

from gpu_pool import desk
from gpu_pool.desk import Desk


async def test_a_box_that_can_start_no_process_now_may_start_one_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "RESTART_SECONDS", 0.0)
    failures = [OSError(errno.EAGAIN, "no process"), OSError(errno.EMFILE, "no descriptor")]
    is_asked_again = asyncio.Event()

    async def spawn(name: str) -> None:
        if failures:
            raise failures.pop()
        is_asked_again.set()
        await asyncio.Event().wait()

    kept = Desk(spawn, unresponsive_s=60.0)
    keeping = kept.start()
    again = asyncio.create_task(is_asked_again.wait())
    await asyncio.wait([keeping, again], return_when=asyncio.FIRST_COMPLETED)
    assert not keeping.done()
    assert again.done()
    await kept.stop()
