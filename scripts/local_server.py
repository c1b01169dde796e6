"""A server of one's own on this machine, for scripts."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import httpx

START_SECONDS = 60.0  # it answers in about one
STOP_SECONDS = 30.0


@contextlib.contextmanager
def running_server(folder: Path, *arguments: object, keep: bool = False) -> Generator[str]:
    """`evalpool serve` on a free loopback port, its URL; ended afterwards unless all went well and it is to be kept."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "server", "serve", "--port", port, "--data-dir", folder / "data", *arguments]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    kept = False
    try:
        _await_health(url, process, folder / "server.log")
        yield url
        kept = keep
    finally:
        if kept:
            print(f"The server goes on as process {process.pid}; end it with: kill {process.pid}")
        else:
            process.terminate()
            process.wait(STOP_SECONDS)


def _await_health(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the server answers; raises RuntimeError when it ended or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{url}/health").raise_for_status()
            return
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start:\n{log.read_text()}")
