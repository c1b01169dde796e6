"""A small worker that speaks the data channel honestly: its answers are a function of the tokens alone."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from gpu_pool import chunk_messages as data
from gpu_pool import messages as msg

Chunk = data.LoglikelihoodChunk | data.GenerationChunk
Behaviour = Callable[["FakeWorker", Chunk], msg.Message | None]
"""What to answer to a chunk; None hangs up."""


def answer(worker: FakeWorker, chunk: Chunk) -> msg.Message:
    """The honest answer."""
    worker.chunks.append(chunk)
    if isinstance(chunk, data.LoglikelihoodChunk):
        scores = tuple((-score(tokens), False) for tokens in chunk.sequences.unpack())
        return data.LoglikelihoodDone(chunk_id=chunk.chunk_id, answers=scores, seconds=0.001)
    seeds = chunk.seeds or (0,) * len(chunk.prompts)
    texts = tuple(f"{score(tokens)} {seed}" for tokens, seed in zip(chunk.prompts.unpack(), seeds, strict=True))
    return data.GenerationDone(chunk_id=chunk.chunk_id, texts=texts, seconds=0.001)


def score(tokens: Iterable[int]) -> float:
    """Some number that depends on every token."""
    return sum((i % 7 + 1) * token for i, token in enumerate(tokens)) / 100


class FakeWorker:
    """Listens at `address` from the beginning, for any number of evaluators; computes one chunk at a time."""

    def __init__(
        self, worker_id: str, address: Path, behaviour: Behaviour = answer, route_reason: str = "it has no model"
    ) -> None:
        self.worker_id = worker_id
        self._route_reason = route_reason
        self.address = address
        self.chunks: list[Chunk] = []
        self._behaviour = behaviour
        self._computing = threading.Lock()
        """Held until the answer is sent: who dies with one has not begun another, and has answered all before."""
        self._dead = False
        self._clients: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(address))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more evaluators."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def die(self) -> None:
        """As a process that is killed, while it computes: every connection ends, and nothing more is computed."""
        self._dead = True
        self.close()
        for client in self._clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._clients.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError, EOFError), client, Connection(os.dup(client.fileno())) as connection:
            assert isinstance(data.decode_to_worker_data(connection.recv_bytes()), data.Hello)
            welcome = data.Welcome(
                worker_id=self.worker_id,
                max_length=2048,
                prefix_token_id=0,
                dtype="float32",
                attn_implementation="none",
                route="plain",
                route_reason=self._route_reason,
            )
            connection.send_bytes(msg.encode(welcome))
            while True:
                chunk = data.decode_to_worker_data(connection.recv_bytes())
                assert not isinstance(chunk, data.Hello)
                with self._computing:
                    if self._dead:
                        return
                    connection.send_bytes(msg.encode(data.ChunkBegun(chunk_id=chunk.chunk_id)))
                    if (reply := self._behaviour(self, chunk)) is None:
                        return
                    connection.send_bytes(msg.encode(reply))


def unanswered(_: FakeWorker, chunk: Chunk) -> None:
    """Die with the first chunk."""


def poisoned(*tokens: int) -> Behaviour:
    """Die with any sequence that holds one of these."""

    def behave(worker: FakeWorker, chunk: Chunk) -> msg.Message | None:
        return None if _holds(chunk, tokens) else answer(worker, chunk)

    return behave


def failing_on(*tokens: int) -> Behaviour:
    """Fail, politely, on any sequence that holds one of these."""

    def behave(worker: FakeWorker, chunk: Chunk) -> msg.Message:
        failed = data.ChunkFailed(chunk_id=chunk.chunk_id, error="ValueError: no such word")
        return failed if _holds(chunk, tokens) else answer(worker, chunk)

    return behave


def _holds(chunk: Chunk, tokens: Collection[int]) -> bool:
    sequences = chunk.sequences if isinstance(chunk, data.LoglikelihoodChunk) else chunk.prompts
    return any(token in tokens for some in sequences.unpack() for token in some)


def silent(_: FakeWorker, chunk: Chunk) -> None:
    """Never answer, as a worker that hangs."""
    threading.Event().wait()


def failing(_: FakeWorker, chunk: Chunk) -> msg.Message:
    """Fail every chunk."""
    return data.ChunkFailed(chunk_id=chunk.chunk_id, error="out of memory")


def socket_path(folder: Path, name: str) -> Path:
    """A path short enough for a unix socket, whatever the folder."""
    link = Path(f"/tmp/evalpool-{os.getpid()}-{name}.sock")
    return folder / f"{name}.sock" if len(str(folder)) < 80 else link
