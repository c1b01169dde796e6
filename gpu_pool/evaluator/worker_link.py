"""The connection to one worker: at most two chunks in flight on it, a thread that sends them and takes the answers."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, assert_never

import msgspec

from gpu_pool.chunk_messages import (
    ChunkBegun,
    ChunkFailed,
    GenerationChunk,
    GenerationDone,
    Hello,
    LoglikelihoodChunk,
    LoglikelihoodDone,
    MediaGenerationChunk,
    MediaLoglikelihoodChunk,
    Welcome,
    decode_from_worker_data,
)
from gpu_pool.evaluator.failures import explain
from gpu_pool.evaluator.prefix_line import Chunk, tokens_bytes, unit_bytes
from gpu_pool.evaluator.sent_media import SentMedia
from gpu_pool.evaluator.suspects import Suspect
from gpu_pool.messages import MAX_MESSAGE_BYTES, Message, encode
from gpu_pool.token_sequences import TokenSequences

if TYPE_CHECKING:
    from gpu_pool.cache import Answer
    from gpu_pool.evaluator.dispatch import Dispatcher
    from gpu_pool.evaluator.requests import Unit

IN_FLIGHT = 2  # one runs, the next is there when it ends
SILENCE_SECONDS = 5.0
"""A worker that owes answers and says nothing for so long is reported to the server, who knows whether it computes."""

_log = logging.getLogger(__name__)


class Link(threading.Thread):
    """The connection to one worker."""

    def __init__(self, dispatcher: Dispatcher, worker_id: str, address: str) -> None:
        super().__init__(name=f"worker-{worker_id}", daemon=True)
        self.worker_id = worker_id
        self.pace = dispatcher.paces.of(worker_id)
        self.in_flight: dict[int, Chunk | Suspect] = {}
        self.begun: dict[int, float] = {}
        """Those in flight that the worker computes, and since when, in monotonic seconds."""
        self.hung_up = False
        self.leaving = False
        """It is asked for no more chunks."""
        self.gone = False
        """Its thread is about to end."""
        self._sent = SentMedia(dispatcher.read_media)
        self.then: Callable[[], None] | None = None
        """Called when it is used no more."""
        self.cause: str | None = None
        """How the worker's process ended, once the server has said so."""
        self.from_outside = False
        """Whether somebody killed it; known with the cause."""
        self._dispatcher = dispatcher
        self._address = address
        # descriptors are taken here: an evaluator that has none left ends with its job, and blames no worker
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connection = Connection(os.dup(self._socket.fileno()))
        except OSError:
            self._socket.close()
            raise
        self._chunks = 0
        self._no_media: str | None = None
        """Why it cannot be shown what it should be."""

    def run(self) -> None:
        try:
            with self._connection as connection:
                self._socket.connect(self._address)
                self._serve(connection)
        except (OSError, EOFError, msgspec.DecodeError) as error:
            if self.has_died:
                _log.warning("Worker %s is lost (%r); its requests go elsewhere", self.worker_id, error)
                if self.cause is None:
                    self._dispatcher.on_unreachable(self.worker_id, f"{_in_words(error)} ({self._address})")
        except Exception as error:  # a job must end, not wait for a thread that died
            _log.exception("Worker %s cannot be used", self.worker_id)
            self.hung_up = True
            self._dispatcher.on_failure(f"Worker {self.worker_id} cannot be used: {error!r}")
        finally:
            self._socket.close()
            self._dispatcher.left(self)

    @property
    def has_died(self) -> bool:
        """Whether the worker ended the connection, or its end is known otherwise; asked when the connection is gone."""
        return self.cause is not None or not self.hung_up

    def hang_up(self) -> None:
        """End the connection from another thread."""
        self.hung_up = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _serve(self, connection: Connection[Any, Any]) -> None:
        try:
            self._ask(connection)
        except OSError:  # nothing more can be sent; what the worker has said before is still there
            with contextlib.suppress(OSError, EOFError):
                while True:
                    self._receive(connection)
            raise

    def _ask(self, connection: Connection[Any, Any]) -> None:
        connection.send_bytes(encode(Hello(job_id=self._dispatcher.job_id, api=self._dispatcher.api)))
        self._receive(connection)
        while True:
            while len(self.in_flight) < self._dispatcher.most_in_flight and (chunk := self._dispatcher.take(self)):
                if self._no_media and chunk.units[0].shown is not None:
                    self.hung_up = True
                    self._dispatcher.on_failure(self._no_media)  # once, not for each request
                    return
                self._chunks += 1
                self.in_flight[self._chunks] = chunk
                self._send_media(connection, chunk.units)
                connection.send_bytes(encode(_message(self._chunks, chunk.units, self._dispatcher)))
            if not self.in_flight:
                return
            self._receive(connection)

    def _send_media(self, connection: Connection[Any, Any], units: Sequence[Unit]) -> None:
        digests = [digest for unit in units if unit.shown for digest in unit.shown.files]
        for message in self._sent.before(digests) if digests else ():
            connection.send_bytes(encode(message))

    def _receive(self, connection: Connection[Any, Any]) -> None:
        while not connection.poll(SILENCE_SECONDS):
            self._dispatcher.on_silence(self.worker_id)
        message = decode_from_worker_data(connection.recv_bytes(MAX_MESSAGE_BYTES))
        match message:
            case Welcome():
                self._no_media = message.no_media
                self._dispatcher.welcomed(message)
            case ChunkBegun():
                self.begun[message.chunk_id] = time.monotonic()
            case LoglikelihoodDone():
                if message.plainly:
                    self._dispatcher.computed_plainly(message.plainly)
                self._answered(message.chunk_id, message.answers, message.seconds, message.errors)
            case GenerationDone():
                if message.plainly:
                    self._dispatcher.computed_plainly(message.plainly)
                self._answered(message.chunk_id, message.texts, message.seconds, message.errors)
            case ChunkFailed():
                self._dispatcher.failed(self, self._ended(message.chunk_id), message.error)
            case _:
                assert_never(message)

    def _answered(
        self, chunk_id: int, answers: Sequence[Answer | None], seconds: float, errors: Mapping[int, str]
    ) -> None:
        asked = list(zip(self.in_flight[chunk_id].units, answers, strict=True))
        for unit, answer in asked:
            unit.answer = answer
        chunk = self._ended(chunk_id)
        if isinstance(chunk, Chunk):
            self.pace.measured(chunk.kind, chunk.cost, seconds)
        answered = [unit for unit, answer in asked if answer is not None]
        if answered:
            self._dispatcher.on_answers(self.worker_id, answered)
        for place, (unit, answer) in enumerate(asked):
            if answer is None:
                self._dispatcher.end_in_error(unit, errors[place])

    def _ended(self, chunk_id: int) -> Chunk | Suspect:
        chunk = self.in_flight.pop(chunk_id)
        self.begun.pop(chunk_id, None)
        self._dispatcher.done(self, chunk)
        return chunk


def _in_words(error: OSError | EOFError | msgspec.DecodeError) -> str:
    return "it closed the connection" if isinstance(error, EOFError) else explain(error)


def _message(chunk_id: int, units: Sequence[Unit], asked: Dispatcher) -> Message:
    options = units[0].options
    if units[0].shown is not None:
        return _message_with_images(chunk_id, units, asked)
    if options is None:
        return LoglikelihoodChunk(
            chunk_id=chunk_id,
            sequences=TokenSequences.pack_bytes(map(unit_bytes, units)),
            scored=tuple(len(unit.continuation) for unit in units),
            batch_size=asked.batch_size,
            deterministic=asked.deterministic,
        )
    return GenerationChunk(
        chunk_id=chunk_id,
        prompts=TokenSequences.pack_bytes(map(unit_bytes, units)),
        options=options,
        seeds=() if units[0].key else tuple(unit.seed for unit in units),
        batch_size=asked.batch_size,
        deterministic=asked.deterministic,
    )


def _message_with_images(chunk_id: int, units: Sequence[Unit], asked: Dispatcher) -> Message:
    options = units[0].options
    prompts = [unit.shown for unit in units if unit.shown is not None]
    if options is not None:
        return MediaGenerationChunk(
            chunk_id=chunk_id,
            prompts=tuple(prompts),
            options=options,
            seeds=() if units[0].key else tuple(unit.seed for unit in units),
            batch_size=asked.batch_size,
            deterministic=asked.deterministic,
        )
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return MediaLoglikelihoodChunk(
        chunk_id=chunk_id,
        prompts=tuple(numbers),
        continuations=TokenSequences.pack_bytes(tokens_bytes(unit.continuation) for unit in units),
        prompt_of=tuple(numbers[prompt] for prompt in prompts),
        batch_size=asked.batch_size,
        deterministic=asked.deterministic,
    )
