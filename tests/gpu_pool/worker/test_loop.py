"""Chunks from the queue to their answers, with a small stand-in for the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chunks import generating

from gpu_pool.chunk_messages import ChunkBegun, ChunkFailed, FromWorkerData, GenerationChunk, GenerationDone
from gpu_pool.messages import BatchProgress
from gpu_pool.worker.chunk_queue import ChunkQueue, Client
from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.loop import Replica, step
from gpu_pool.worker.pulse import Pulse

Take = Callable[[], GenerationChunk | None]


def numbers(chunk: GenerationChunk) -> list[int]:
    return [tokens[0] for tokens in chunk.prompts.unpack()]


class Engine:
    """Repeats the first token of each prompt, of all chunks that it can get together; 13 ends everything."""

    def __init__(self) -> None:
        self.together: list[list[int]] = []

    def compute(self, first: GenerationChunk, should_stop: Callable[[], bool], take: Take) -> Iterator[GenerationDone]:
        chunks = [first]
        while (chunk := take()) is not None:
            chunks.append(chunk)
        self.together.append([chunk.chunk_id for chunk in chunks])
        for chunk in chunks:
            if should_stop():
                raise Cancelled
            if 13 in numbers(chunk):
                raise IndexError("thirteen")
            yield GenerationDone(chunk_id=chunk.chunk_id, texts=tuple(map(str, numbers(chunk))), seconds=0.1)


@pytest.fixture
def engine() -> Engine:
    return Engine()


def answered(engine: Engine, *firsts: int, hang_up_after: int | None = None) -> list[FromWorkerData]:
    """What an evaluator is answered that sends chunks 0, 1, … whose first tokens are these."""
    sent: list[FromWorkerData] = []
    begun: list[int] = []
    queue = ChunkQueue(lambda job_id: None)

    def send(message: FromWorkerData) -> None:
        if isinstance(message, ChunkBegun):
            begun.append(message.chunk_id)
            return
        assert not isinstance(message, GenerationDone | ChunkFailed) or message.chunk_id in begun
        sent.append(message)
        if len(sent) == hang_up_after:
            queue.leave(client)

    client = Client("job", send, lambda: None)
    queue.join(client)
    for number, first in enumerate(firsts):
        queue.put(client, generating([(first,)], number))
    loaded: Any = None
    beats: list[BatchProgress] = []
    pulse = Pulse(beats.append, now=lambda: 0.0)
    step(Replica(loaded=loaded, memory_bytes=0, compute=engine.compute), queue, pulse)
    assert len(beats) == 1, "one report a second is enough"
    return sent


def done(chunk_id: int, text: str) -> GenerationDone:
    return GenerationDone(chunk_id=chunk_id, texts=(text,), seconds=0.1)


def test_chunks_that_are_computed_together_are_answered_each(engine):
    assert answered(engine, 5, 6, 7) == [done(0, "5"), done(1, "6"), done(2, "7")]
    assert engine.together == [[0, 1, 2]]


def test_what_fails_together_is_computed_again_one_by_one(engine):
    failed = ChunkFailed(chunk_id=1, error="IndexError: thirteen")
    assert answered(engine, 5, 13, 7, 8) == [done(0, "5"), failed, done(2, "7"), done(3, "8")]
    assert engine.together == [[0, 1, 2, 3], [1], [2], [3]]


def test_a_chunk_that_fails_alone_is_not_tried_again(engine):
    assert answered(engine, 13) == [ChunkFailed(chunk_id=0, error="IndexError: thirteen")]
    assert engine.together == [[0]]


def test_nothing_is_computed_for_who_has_gone(engine):
    assert answered(engine, 5, 6, 13, hang_up_after=1) == [done(0, "5")]
    assert engine.together == [[0, 1, 2]]
