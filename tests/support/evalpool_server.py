"""A real `evalpool serve` process for tests: started on a free port, ended politely, nothing left behind."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import httpx

ROOT = Path(__file__).parents[2]
START_SECONDS = 60.0  # a server answers in about one; a loaded machine may be slow
STOP_SECONDS = 15.0  # SIGTERM to exit, as the design promises it


class Server(NamedTuple):
    """A running `evalpool serve`."""

    url: str
    data_dir: Path
    process: subprocess.Popen[bytes]
    log: Path
    token: str

    def processes(self) -> list[int]:
        """Pids of the server and of everything that it started, wherever it is in the process tree."""
        return [
            int(entry.parent.name) for entry in Path("/proc").glob("[0-9]*/environ") if _mentions(entry, self.token)
        ]

    def stop(self) -> None:
        """SIGTERM; asserts a clean exit in time, with every process that it started gone."""
        started = self.processes()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(STOP_SECONDS) == 0, self.log.read_text()
        self._await_end(started)

    def kill(self) -> None:
        """SIGKILL, as a crash would; asserts that nothing that it started outlives it."""
        started = self.processes()
        self.process.kill()
        self.process.wait()
        self._await_end(started)

    def _await_end(self, pids: list[int]) -> None:
        deadline = time.monotonic() + STOP_SECONDS
        for pid in pids:
            with suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
                os.close(descriptor)
        assert self.processes() == [], f"left behind: {self.processes()}\n{self.log.read_text()}"


def _mentions(environ: Path, token: str) -> bool:
    try:
        return token.encode() in environ.read_bytes()
    except OSError:  # the process ended meanwhile, or is someone else's
        return False


Serve = Callable[..., Server]


@contextmanager
def run_server(data_dir: Path, *arguments: object) -> Generator[Server]:
    """A real server on a free loopback port, for as long as the context lasts."""
    data_dir.mkdir(parents=True, exist_ok=True)
    log = data_dir.with_name(f"{data_dir.name}.log")
    port, token = free_port(), uuid.uuid4().hex
    command = [sys.executable, "-m", "server", "serve", "--port", port, "--data-dir", data_dir, *arguments]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("EVALPOOL_")}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env={**environ, "STARTED_BY_TEST": token},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", data_dir, process, log, token)
    try:
        _await_health(server)
        yield server
        if process.poll() is None:
            server.stop()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def _await_health(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health").status_code == httpx.codes.OK:
                return
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{server.log.read_text()}")
