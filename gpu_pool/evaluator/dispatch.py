"""Units to workers and answers back: one thread and one socket for each worker, at most two chunks in flight on it.

What a lost worker had goes to the others; without any worker the units wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, assert_never

import msgspec

from gpu_pool.evaluator.chunking import Pace, UnitQueue, total_cost
from gpu_pool.messages import (
    MAX_MESSAGE_BYTES,
    ChunkFailed,
    GenerationChunk,
    GenerationDone,
    Hello,
    LoglikelihoodChunk,
    LoglikelihoodDone,
    Message,
    Welcome,
    decode_from_worker_data,
    encode,
)

if TYPE_CHECKING:
    from gpu_pool.cache import Answer
    from gpu_pool.evaluator.requests import Unit

IN_FLIGHT = 2  # one runs, the next is there when it ends

_log = logging.getLogger(__name__)


class Dispatcher:
    """The units of one job that are not answered yet, and the workers that answer them."""

    def __init__(
        self,
        job_id: str,
        batch_size: int | None,
        on_answers: Callable[[str, Sequence[Unit]], None],
        on_failure: Callable[[str, Sequence[Unit]], None],
    ) -> None:
        """`on_answers(worker_id, units)` and `on_failure(error, units)` are called from the workers' threads."""
        self.job_id = job_id
        self.batch_size = batch_size
        self.on_answers = on_answers
        self.on_failure = on_failure
        self.welcome: Welcome | None = None
        """What the latest worker said of the loaded model."""
        self._queues: dict[str, UnitQueue] = {}
        self._links: dict[str, _Link] = {}
        self._changed = threading.Condition()
        self._closed = False

    def submit(self, units: Sequence[Unit]) -> None:
        """Queue units, in the order in which they should be asked."""
        with self._changed:
            for kind, some in _by_kind(units).items():
                self._queues.setdefault(kind, UnitQueue()).add(some)
            self._changed.notify_all()

    def attach(self, worker_id: str, address: str) -> None:
        """Use this worker from now on."""
        link = _Link(self, worker_id, address)
        with self._changed:
            if self._closed:
                return
            self._links[worker_id] = link
        link.start()

    def detach(self, worker_id: str) -> None:
        """Stop using this worker at once; others get what it had."""
        with self._changed:
            link = self._links.get(worker_id)
        if link is not None:
            self._hang_up(link)

    def close(self) -> None:
        """Let go of all workers and units."""
        with self._changed:
            self._closed = True
            self._queues.clear()
            links = list(self._links.values())
        for link in links:
            self._hang_up(link)

    def take(self, link: _Link) -> list[Unit]:
        """The next chunk for `link`. Empty: nothing before the next answer or, with nothing in flight, never again."""
        with self._changed:
            while not (self._closed or link.hung_up):
                chunk = self._next_chunk(link)
                if chunk or link.in_flight:
                    return chunk
                self._changed.wait()
            return []

    def left(self, link: _Link) -> None:
        """A worker is gone: what it did not answer is asked next. (It may have been attached again meanwhile.)"""
        with self._changed:
            if self._links.get(link.worker_id) is link:
                del self._links[link.worker_id]
            if not self._closed:
                for units in link.in_flight.values():
                    self._queues.setdefault(units[0].kind, UnitQueue()).put_back(units)
            self._changed.notify_all()

    def _hang_up(self, link: _Link) -> None:
        link.hang_up()
        with self._changed:
            self._changed.notify_all()

    def _next_chunk(self, link: _Link) -> list[Unit]:
        for kind, queue in self._queues.items():
            if len(queue):
                share = self._fair_share(link, kind)
                if share > 0 or not link.in_flight:
                    return queue.cut(min(link.pace.budget(queue.first), share))
        return []

    def _fair_share(self, link: _Link, kind: str) -> float:
        """What `link` may still take of this kind if all workers, those still connecting too, are to end together."""
        held = {other: other.held_cost(kind) for other in {link, *self._links.values()}}
        work = self._queues[kind].cost + sum(held.values())
        return work / len(held) - held[link]


class _Link(threading.Thread):
    """The connection to one worker."""

    def __init__(self, dispatcher: Dispatcher, worker_id: str, address: str) -> None:
        super().__init__(name=f"worker-{worker_id}", daemon=True)
        self.worker_id = worker_id
        self.pace = Pace(dispatcher.batch_size)
        self.in_flight: dict[int, list[Unit]] = {}
        self.hung_up = False
        self._dispatcher = dispatcher
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._chunks = 0

    def run(self) -> None:
        try:
            self._socket.connect(self._address)
            with Connection(os.dup(self._socket.fileno())) as connection:
                self._serve(connection)
        except (OSError, EOFError, msgspec.DecodeError) as error:
            if not self.hung_up:
                _log.warning("Worker %s is lost (%r); its requests go elsewhere", self.worker_id, error)
        except Exception as error:  # a job must end, not wait for a thread that died
            _log.exception("Worker %s cannot be used", self.worker_id)
            self._dispatcher.on_failure(f"Worker {self.worker_id} cannot be used: {error!r}", ())
        finally:
            self._socket.close()
            self._dispatcher.left(self)

    def hang_up(self) -> None:
        """End the connection from another thread."""
        self.hung_up = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def held_cost(self, kind: str) -> int:
        """Cost of what the worker has of this kind."""
        return sum(total_cost(units) for units in list(self.in_flight.values()) if units[0].kind == kind)

    def _serve(self, connection: Connection[Any, Any]) -> None:
        connection.send_bytes(encode(Hello(job_id=self._dispatcher.job_id)))
        self._receive(connection)
        while True:
            while len(self.in_flight) < IN_FLIGHT and (units := self._dispatcher.take(self)):
                self._chunks += 1
                self.in_flight[self._chunks] = units
                connection.send_bytes(encode(_chunk(self._chunks, units, self._dispatcher.batch_size)))
            if not self.in_flight:
                return
            self._receive(connection)

    def _receive(self, connection: Connection[Any, Any]) -> None:
        message = decode_from_worker_data(connection.recv_bytes(MAX_MESSAGE_BYTES))
        match message:
            case Welcome():
                self._dispatcher.welcome = message
            case LoglikelihoodDone():
                self._answered(message.chunk_id, message.answers, message.seconds)
            case GenerationDone():
                self._answered(message.chunk_id, message.texts, message.seconds)
            case ChunkFailed():
                self._dispatcher.on_failure(message.error, self.in_flight.pop(message.chunk_id))
            case _:
                assert_never(message)

    def _answered(self, chunk_id: int, answers: Sequence[Answer], seconds: float) -> None:
        units = self.in_flight.pop(chunk_id)
        for unit, answer in zip(units, answers, strict=True):
            unit.answer = answer
        self.pace.measured(units[0].kind, total_cost(units), seconds)
        self._dispatcher.on_answers(self.worker_id, units)


def _by_kind(units: Sequence[Unit]) -> dict[str, list[Unit]]:
    kinds: dict[str, list[Unit]] = {}
    for unit in units:
        kinds.setdefault(unit.kind, []).append(unit)
    return kinds


def _chunk(chunk_id: int, units: Sequence[Unit], batch_size: int | None) -> Message:
    options = units[0].options
    if options is None:
        pairs = tuple((unit.prompt, unit.continuation) for unit in units)
        return LoglikelihoodChunk(chunk_id=chunk_id, requests=pairs, batch_size=batch_size)
    return GenerationChunk(
        chunk_id=chunk_id,
        prompts=tuple(unit.prompt for unit in units),
        options=options,
        seeds=() if units[0].key else tuple(unit.seed for unit in units),
        batch_size=batch_size,
    )
