"""The real REST face over real sockets, with a fake pool behind it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Generator
from pathlib import Path

import uvicorn
from fake_pool import FakePool

from server.app import create_app
from server.settings import Settings


@contextlib.contextmanager
def live_server(folder: Path) -> Generator[tuple[str, FakePool]]:
    """(URL, pool) of a server that runs in a thread for as long as the context lasts."""
    pool = FakePool(folder)
    server = uvicorn.Server(uvicorn.Config(create_app(Settings(), pool), log_config=None, lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", pool
        finally:
            server.should_exit = True
            thread.join()
