"""Where workers listen for evaluators: sockets in a private folder, which whoever tidies up may remove at any time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path


def make_private(folder: Path) -> None:
    """Make the folder unless it is there. Raises OSError, also where somebody else has made it."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if folder.lstat().st_uid != os.geteuid():
            raise PermissionError(f"{folder} is not ours: it is to hold the sockets of workers") from None


async def listen_at(
    path: str, on_connection: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> asyncio.Server:
    """Listen on the unix socket at `path`, which is for our user alone. Raises OSError, which names the path."""
    make_private(Path(path).parent)
    try:
        server = await asyncio.start_unix_server(on_connection, path)
    except OSError as error:
        error.filename = error.filename or path  # the kernel does not say what could not be bound
        raise
    os.chmod(path, 0o600)
    return server
