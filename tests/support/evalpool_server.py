"""A real `evalpool serve` process for tests: started on a free port, ended politely, nothing left behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from local_server import PROGRAM, START_SECONDS, STOP_SECONDS, evalpool_command, start

ROOT = Path(__file__).parents[2]
LOCK_FOLDER = "EVALPOOL_GPU_LOCK_DIR"
"""The variable with a server's setting `gpu_lock_dir`: fake GPUs are not those of other test processes."""
NO_VARIABLES: Mapping[str, str] = MappingProxyType({})


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
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(STOP_SECONDS) == 0, self.log.read_text()
        self._await_end()

    def kill(self) -> None:
        """SIGKILL, as a crash would; asserts that nothing that it started outlives it."""
        self.process.kill()
        self.process.wait()
        self._await_end()

    def bury(self) -> None:
        """Wait for a server that has been killed; asserts that nothing that it started outlives it."""
        self.process.wait(STOP_SECONDS)
        self._await_end()

    def _await_end(self) -> None:
        """Until nothing is left, what was being started when the server ended included."""
        deadline = time.monotonic() + STOP_SECONDS
        while left := self.processes():
            assert time.monotonic() < deadline, f"left behind: {left}\n{self.log.read_text()}"
            for pid in left:
                with suppress(ProcessLookupError):
                    descriptor = os.pidfd_open(pid)
                    select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
                    os.close(descriptor)


def _mentions(environ: Path, token: str) -> bool:
    try:
        return token.encode() in environ.read_bytes()
    except OSError:  # the process ended meanwhile, or is someone else's
        return False


def failing_serve(*arguments: object) -> str:
    """What `evalpool serve` says when it cannot start."""
    command = [sys.executable, "-m", "server", "serve", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=START_SECONDS)
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr
    return done.stderr


Serve = Callable[..., Server]


@contextmanager
def run_server(
    data_dir: Path, *arguments: object, program: Sequence[object] = PROGRAM, variables: Mapping[str, str] = NO_VARIABLES
) -> Generator[Server]:
    """A real server on a free loopback port, for as long as the context lasts.

    `program` are the words before `serve` on its command line; `variables` are added to its environment.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    log, token = data_dir.with_name(f"{data_dir.name}.log"), uuid.uuid4().hex
    environ = {name: os.environ[name] for name in os.environ if name == LOCK_FOLDER or not name.startswith("EVALPOOL_")}
    command = evalpool_command(data_dir, *arguments, program=program)
    started = start(command, log, cwd=ROOT, env={**environ, **variables, "STARTED_BY_TEST": token})
    server = Server(started.url, data_dir, started.process, log, token)
    try:
        yield server
        if server.process.poll() is None:
            server.stop()
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
