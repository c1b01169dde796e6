"""A server of one's own on this machine."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx

START_SECONDS = 120.0  # it answers in about one; a loaded machine may be slow
STOP_SECONDS = 60.0  # the design promises 15, but not on a machine that others load
PROGRAM = ("-m", "server")
"""What the interpreter is given to be `evalpool`."""


class Started(NamedTuple):
    """A server that answers."""

    url: str
    port: int
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def running_server(folder: Path, *arguments: object, keep: bool = False) -> Generator[str]:
    """`evalpool serve` on a free loopback port, its URL; ended afterwards unless all went well and it is to be kept."""
    with running(evalpool_command(folder / "data", *arguments), folder / "server.log", keep=keep) as server:
        yield server.url


def evalpool_command(data_dir: Path, *arguments: object, program: Sequence[object] = PROGRAM) -> list[object]:
    """`evalpool serve`, but for the port."""
    return [sys.executable, *program, "serve", "--data-dir", data_dir, *arguments]


@contextlib.contextmanager
def running(command: Sequence[object], log: Path, *, keep: bool = False) -> Generator[Started]:
    """The server that `start` starts; ended afterwards unless all went well and it is to be kept."""
    with exit_on_sigterm():
        server = start(command, log)
        kept = False
        try:
            yield server
            kept = keep
        finally:
            if kept:
                print(f"The server goes on as process {server.process.pid}; end it with: kill {server.process.pid}")
            else:
                stop(server.process)


@contextlib.contextmanager
def exit_on_sigterm() -> Generator[None]:
    """Let SIGTERM raise SystemExit, so that this script takes along what it has started."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server politely. Raises subprocess.TimeoutExpired."""
    process.terminate()
    process.wait(STOP_SECONDS)


def start(
    command: Sequence[object], log: Path, *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Started:
    """A server that takes `--port` and answers GET /health, on a free loopback port.

    Raises:
        RuntimeError: it has ended, or does not answer in time and is killed.
    """
    with _reserved_port() as port:
        with log.open("ab") as output:
            process = subprocess.Popen(
                [str(word) for word in (*command, "--port", port)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=cwd,
                env=env,
            )
        server = Started(f"http://127.0.0.1:{port}", port, process)
        try:
            _await_health(server, log)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return server


@contextlib.contextmanager
def _reserved_port() -> Generator[int]:
    """A loopback port that nobody is given meanwhile, but that a server may bind by its number.

    That takes SO_REUSEADDR on both sides, which servers set, and that this one does not listen.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def _await_health(server: Started, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health").is_success:
                return
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start:\n{log.read_text()}")
