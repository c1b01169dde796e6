"""The worker's end of the control pipe: what the server asks of the process, and what it is told."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NoReturn, assert_never

import msgspec

from gpu_pool.messages import (
    MAX_MESSAGE_BYTES,
    Alive,
    DropJob,
    Dropped,
    FromWorker,
    LoadFailed,
    Ping,
    Shutdown,
    WorkerFailed,
    WorkerReady,
    decode_to_worker,
    encode,
)
from gpu_pool.process_table import is_stopped


class Control:
    """Sends from any thread; one thread of its own reads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._ending = threading.Lock()
        self._ready = False
        self.drop: Callable[[str], None] = lambda job_id: self.send(Dropped(job_id=job_id))
        """Forgets a job, and says so; before there is a queue there is nothing to forget."""

    def send(self, message: FromWorker) -> None:
        """Tell the server; ends the process when there is no server any more."""
        try:
            with self._sending:
                self._connection.send_bytes(encode(message))
        except OSError:
            end_process(0)

    def send_ready(self, message: WorkerReady) -> None:
        """Say that the model is served."""
        with self._ending:
            self.send(message)
            self._ready = True

    def fail(self, message: LoadFailed, reason: str) -> NoReturn:
        """End, saying why: by `message` while the server still waits for the model, later by the mere `reason`.

        Of several threads only the first is heard.
        """
        self._ending.acquire()
        self.send(WorkerFailed(error=reason) if self._ready else message)
        end_process(1)

    def watch(self) -> None:
        """Obey the server from now on, whatever the main thread does: importing, loading and computing included."""
        threading.Thread(target=self._obey, name="control", daemon=True).start()

    def _obey(self) -> None:
        while True:
            try:
                message = decode_to_worker(self._connection.recv_bytes(MAX_MESSAGE_BYTES))
            except (EOFError, OSError):
                end_process(0)
            except msgspec.DecodeError:
                traceback.print_exc()
                end_process(1)
            match message:
                case DropJob(job_id=job_id):
                    self.drop(job_id)
                case Ping():
                    if not is_stopped(os.getpid()):  # a rank of it, that is
                        self.send(Alive())
                case Shutdown():
                    end_process(0)
                case _:
                    assert_never(message)


def end_process(status: int) -> NoReturn:
    """Exit now, in the middle of a step too: nothing here needs to be put in order."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
