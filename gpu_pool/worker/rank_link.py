"""How rank 0 leads the other ranks of a sharded model through a chunk, over a pipe to each.

The model's collectives match only as long as every rank takes the same decisions. The engine decides by the chunk and
by outputs that are equal, bit for bit, on every rank; what only rank 0 knows, that nobody waits for a chunk any more,
and which chunks join it, it tells the others. That all had an answer after as many steps, and ended in the same way,
is checked before it is given.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import NoReturn, TypeVar

from gpu_pool.chunk_messages import (
    FromRank,
    GenerationChunk,
    LoglikelihoodChunk,
    RankDone,
    RankJoin,
    RankStep,
    ToRank,
    decode_to_rank,
)
from gpu_pool.messages import MAX_MESSAGE_BYTES, encode

LAG_SECONDS = 60.0
"""How far one rank may lag behind another from step to step: they compute the same, so one that does is stuck."""

TextChunk = LoglikelihoodChunk | GenerationChunk
"""What several ranks compute."""

T = TypeVar("T")
Run = Callable[[Callable[[], bool], Callable[[], GenerationChunk | None]], Iterator[T]]
"""Computes a chunk and those that join it, asking before each step whether to stop, and for chunks that join."""


def lead(
    run: Run[T],
    should_stop: Callable[[], bool],
    take_alike: Callable[[], GenerationChunk | None],
    chunk: TextChunk,
    ranks: Sequence[tuple[Connection, queue.SimpleQueue[FromRank]]],
    lost: Callable[[str], NoReturn],
    lag_seconds: float = LAG_SECONDS,
) -> Iterator[T]:
    """Rank 0's part: `run` the chunk, and what `take_alike` has to join it, here and on the other `ranks`.

    Of each rank a pipe to it, and what came from it. `lost(why)` is called when they cannot go on together. Whatever
    `run` raises is raised when every rank raised it.
    """
    steps = 0

    def tell(message: ToRank) -> None:
        payload = encode(message)
        try:
            for connection, _ in ranks:
                connection.send_bytes(payload)
        except OSError as error:
            lost(f"a rank is gone: {error}")

    def step() -> bool:
        nonlocal steps
        steps += 1
        stop = should_stop()
        tell(RankStep(number=steps, stop=stop))
        return stop

    def join() -> GenerationChunk | None:
        joining = take_alike()
        tell(RankJoin(chunk=joining))
        return joining

    def confirm(outcome: str) -> None:
        mine = RankDone(outcome=outcome, steps=steps)
        for _, received in ranks:
            try:
                theirs = received.get(timeout=lag_seconds)
            except queue.Empty:
                lost(f"a rank is not through with a chunk that has ended here ({mine})")
            if theirs != mine:
                lost(f"a chunk ended differently on a rank ({theirs}) and here ({mine})")

    tell(chunk)
    try:
        for answer in run(step, join):
            confirm("answered")
            yield answer
    except Exception as error:
        confirm(type(error).__name__)
        raise
    confirm("done")


def follow(
    run: Callable[[TextChunk, Callable[[], bool], Callable[[], GenerationChunk | None]], Iterable[object]],
    connection: Connection,
    lost: Callable[[str], NoReturn],
    lag_seconds: float = LAG_SECONDS,
) -> None:
    """Another rank's part: `run` the next chunk that rank 0 takes, stopping where it does.

    `lost(why)` is called when they cannot go on together.

    Raises:
        EOFError, OSError: rank 0 is gone.
    """
    steps = 0

    def receive() -> ToRank:
        if not connection.poll(lag_seconds):
            lost(f"rank 0 does not go on after step {steps}")
        return decode_to_rank(connection.recv_bytes(MAX_MESSAGE_BYTES))

    def step() -> bool:
        nonlocal steps
        steps += 1
        message = receive()
        if not isinstance(message, RankStep) or message.number != steps:
            lost(f"rank 0 is not at step {steps}, but sends {message}")
        return message.stop

    def join() -> GenerationChunk | None:
        message = receive()
        if not isinstance(message, RankJoin):
            lost(f"rank 0 does not ask for more chunks at step {steps}, but sends {message}")
        return message.chunk

    def say(outcome: str) -> None:
        connection.send_bytes(encode(RankDone(outcome=outcome, steps=steps)))

    chunk = decode_to_rank(connection.recv_bytes(MAX_MESSAGE_BYTES))
    if isinstance(chunk, RankStep | RankJoin):
        lost(f"a chunk that rank 0 still computes has ended here ({chunk})")
    outcome = "done"
    try:
        for _ in run(chunk, step, join):
            say("answered")
    except Exception as error:
        outcome = type(error).__name__
    say(outcome)
