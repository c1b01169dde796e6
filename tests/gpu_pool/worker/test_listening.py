"""Sockets of workers, in a folder that may be gone when they are made."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_pool.worker.listening import listen_at


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="evalpool-test-") as folder:
        yield Path(folder)


async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"hello")
    writer.close()


async def test_a_folder_that_is_gone_is_made_for_our_user_alone(folder: Path) -> None:
    path = folder / "run" / "worker-1.sock"
    async with await listen_at(str(path), greet), asyncio.timeout(60):
        reader, writer = await asyncio.open_unix_connection(path)
        assert await reader.read() == b"hello"
        writer.close()
    assert [each.stat().st_mode & 0o777 for each in (path.parent, path)] == [0o700, 0o600]


async def test_what_cannot_be_made_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'/.*/gone/run'$"):
        await listen_at(str(folder / "gone" / "run" / "worker-1.sock"), greet)
    (folder / "worker-1.sock").mkdir()
    with pytest.raises(OSError, match=r"/worker-1.sock'"):
        await listen_at(str(folder / "worker-1.sock"), greet)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give folders away")
async def test_a_folder_that_somebody_else_has_made_is_not_used(folder: Path) -> None:
    (folder / "run").mkdir()
    os.chown(folder / "run", 65534, 65534)
    with pytest.raises(PermissionError, match="is not ours"):
        await listen_at(str(folder / "run" / "worker-1.sock"), greet)
