"""Real worker processes: spawned as the server does it, driven over their control pipe and data socket."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from chunks import generating, scoring

from gpu_pool.chunk_messages import ChunkBegun, Hello, decode_from_worker_data
from gpu_pool.fingerprint import fingerprint_model, memo_path
from gpu_pool.messages import BatchProgress, Message, WorkerStart, decode_from_worker, encode
from gpu_pool.records import ModelArgs, ModelSpec
from gpu_pool.worker.entry import worker_main

PATIENCE_SECONDS = 300.0  # a test that waits longer hangs: loading takes seconds, or a minute on a busy machine
SCORE = scoring([((5, 6, 7), (8,)), ((5, 6), (9, 10))])
ENDLESS = generating([(5, 6)] * 5000, 2, max_gen_toks=200, batch_size=1)
"""Minutes of work."""


def received(connection: Connection, decode: Callable[[bytes], Any]) -> Any:
    assert connection.poll(PATIENCE_SECONDS), "no message in time"
    return decode(connection.recv_bytes())


class Evaluator:
    """A data channel, from the evaluator's side."""

    def __init__(self, socket_path: str, job_id: str) -> None:
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(socket_path)
        self.connection = Connection(connected.detach())
        self.send(Hello(job_id=job_id))
        self.welcome = self.receive()

    def send(self, message: Message) -> None:
        self.connection.send_bytes(encode(message))

    def receive(self) -> Any:
        """The next message that is not about a chunk's beginning."""
        while isinstance(message := received(self.connection, decode_from_worker_data), ChunkBegun):
            pass
        return message

    def is_closed(self) -> bool:
        """Waits for the worker to close the connection."""
        try:
            self.receive()
        except (EOFError, ConnectionResetError):
            return True
        return False


class Process:
    """Some process that runs now, by a handle that cannot come to mean another."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def has_ended(self) -> bool:
        """Waits for its end; asked once."""
        ended, _, _ = select.select([self._descriptor], [], [], PATIENCE_SECONDS)
        os.close(self._descriptor)
        return bool(ended)


class WorkerProcess:
    """One spawned worker, from the server's side."""

    def __init__(self, start: WorkerStart) -> None:
        self.start = start
        context = multiprocessing.get_context("spawn")
        self.control, theirs = context.Pipe(duplex=True)
        self.process = context.Process(target=worker_main, args=(theirs, start, os.getpid()))
        self.process.start()
        theirs.close()

    def tell(self, message: Message) -> None:
        self.control.send_bytes(encode(message))

    def receive(self) -> Any:
        """The next message that is not progress."""
        while isinstance(message := received(self.control, decode_from_worker), BatchProgress):
            pass
        return message

    def connect(self, job_id: str = "job") -> Evaluator:
        return Evaluator(self.start.socket_path, job_id)

    def ranks(self) -> list[Process]:
        """The processes that it has started."""
        pid = self.process.pid
        return [Process(int(child)) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def exit_code(self) -> int | None:
        self.process.join(PATIENCE_SECONDS)
        return self.process.exitcode

    def close(self) -> None:
        self.control.close()
        self.process.join(PATIENCE_SECONDS)
        self.process.kill()
        self.process.join()
        self.process.close()


def worker_start(
    folder: Path, pretrained: Path, fingerprint: str | None = None, *, trust_remote_code: bool = False, **fields: Any
) -> WorkerStart:
    """`fields` are those of WorkerStart."""
    args = ModelArgs(pretrained=str(pretrained), trust_remote_code=trust_remote_code)
    memo = memo_path(folder)
    return WorkerStart(
        worker_id="w1",
        spec=ModelSpec(kind="hf", args=args, fingerprint=fingerprint or fingerprint_model(args, memo)),
        socket_path=str(folder / "w1.sock"),
        log_path=str(folder / "w1.log"),
        data_dir=str(folder),
        allow_remote_code=trust_remote_code,
        **fields,
    )
