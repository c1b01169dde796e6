"""The warden: a small process that outlives the server, to end all that the server's children have started.

Children themselves die with the server (`child.die_with_parent`), but then nobody is left who knows what they started.
The warden reads from a pipe that closes with the server, however that ends. When it was killed as well, the next server
on the data folder ends what has the last one's mark.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Collection
from functools import partial
from pathlib import Path

from gpu_pool.daemon_thread import in_daemon_thread
from gpu_pool.offspring import SWEEP_SECONDS, VARIABLE, end_all, proc_is_ours

RESTART_SECONDS = 1.0
"""Before another one is started in the place of one that ended."""
END_SECONDS = 5.0
"""How long it may take to end, once it is not needed."""

logger = logging.getLogger(__name__)


class Warden:
    """The server's side: starts the process, and replaces it where it ends. `start` it, use its mark, `close` it."""

    def __init__(self, data_dir: Path, secrets: Collection[str] = ()) -> None:
        self._secrets = frozenset(secrets)
        """Variables of the environment that are not for it."""
        self.mark = uuid.uuid4().hex
        """Of everything that this server starts."""
        self._record = data_dir / "processes.mark"
        """Identity of the folder, which is another one in a copy, and the mark of the last server that ran here."""
        folder = data_dir.stat()
        self._identity = f"{folder.st_dev}:{folder.st_ino}"
        self._recorded = False
        self._mark_before = ""
        """Of what this process starts, when no server runs in it."""
        self._process: subprocess.Popen[bytes] | None = None
        self._restart: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """End what the last server on this data folder has left, and watch over what this one will start."""
        self._mark_before = os.environ.get(VARIABLE, "")
        if not proc_is_ours():
            logger.warning(
                "/proc is not that of this server's process namespace (mount it anew, as unshare --mount-proc does): "
                "what children start outlives them"
            )
        await self._end_left()
        self._write_record()
        self._start()

    def close(self) -> None:
        """No child runs any more; what this process starts from now on is none of the server's."""
        if os.environ.get(VARIABLE, "").partition("/")[0] == self.mark:
            os.environ[VARIABLE] = self._mark_before  # not removed, see `marked`
        if self._restart:
            self._restart.cancel()
        if process := self._process:
            self._let_go(process)
            try:
                if process.wait(END_SECONDS) == 0:
                    self._forget_record()
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    async def _end_left(self) -> None:
        try:
            identity, _, mark = self._record.read_text("utf-8", "replace").partition(" ")
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("what the last server's children may have left is not known: %s", error)
            return
        if identity != self._identity:
            return
        try:
            left = await asyncio.wait_for(in_daemon_thread(partial(end_all, mark), "end-left"), SWEEP_SECONDS)
        except OSError as error:  # a TimeoutError, as a rule
            logger.warning("what the last server's children may have left cannot be looked for now: %r", error)
            return
        if left:
            logger.warning("%d processes that the last server's children had started are ended", len(left))

    def _write_record(self) -> None:
        new = self._record.with_suffix(".new")
        try:
            new.write_text(f"{self._identity} {self.mark}")
            new.replace(self._record)
            self._recorded = True
        except OSError as error:
            logger.warning("the next server will not know what this one's children may leave: %s", error)
            with contextlib.suppress(OSError):
                new.unlink()

    def _forget_record(self) -> None:
        """The warden has ended all: the next server need not look."""
        if self._recorded:
            with contextlib.suppress(OSError):
                self._record.unlink()

    def _start(self) -> None:
        self._restart = None
        environment = {name: value for name, value in os.environ.items() if name not in (VARIABLE, *self._secrets)}
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "gpu_pool.warden", self.mark],
                stdin=subprocess.PIPE,
                start_new_session=True,  # what is sent to the server's group is not meant for it
                cwd=Path(__file__).parents[1],
                env=environment,
            )
            descriptor = _pidfd(process)
        except OSError as error:
            logger.warning("no process can be started that would outlive the server: %s", error)
            self._start_later()
            return
        self._process, self._descriptor = process, descriptor
        asyncio.get_running_loop().add_reader(self._descriptor, self._on_end, process)

    def _on_end(self, process: subprocess.Popen[bytes]) -> None:
        self._let_go(process)
        logger.warning("the warden process ended (%s); another one is started", process.wait())
        self._start_later()

    def _start_later(self) -> None:
        self._restart = asyncio.get_running_loop().call_later(RESTART_SECONDS, self._start)

    def _let_go(self, process: subprocess.Popen[bytes]) -> None:
        self._process = None
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        assert process.stdin is not None
        process.stdin.close()


def _pidfd(process: subprocess.Popen[bytes]) -> int:
    """Of a warden that has just been started. Raises OSError when there is none; then the warden is gone too."""
    try:
        return os.pidfd_open(process.pid)
    except OSError:
        process.kill()  # before its pipe closes, at which it would end the server's children
        process.communicate()
        raise


def main(mark: str) -> None:
    """Wait until the server is gone; then end what is left of its children and what they have started."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with the server, not before
    sys.stdin.read()
    end_all(mark)


if __name__ == "__main__":
    main(*sys.argv[1:])
