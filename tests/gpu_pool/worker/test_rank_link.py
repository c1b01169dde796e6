"""Rank 0 and another, in two threads over a real pipe: together, and out of step."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn

import pytest
from chunks import generating
from worker_process import PATIENCE_SECONDS, SCORE

from gpu_pool.chunk_messages import FromRank, GenerationChunk, decode_from_rank
from gpu_pool.worker.rank_link import follow, lead

Step = Callable[[], bool]
Join = Callable[[], GenerationChunk | None]
Run = Callable[[Step, Join], Iterator[Any]]


class Lost(BaseException):
    """In place of the end of the process."""


def lost(reason: str) -> NoReturn:
    raise Lost(reason)


class Pair:
    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.ours, self.theirs = multiprocessing.Pipe()
        self.received: queue.SimpleQueue[FromRank] = queue.SimpleQueue()
        self._threads = threads
        threads.submit(self._watch)

    def lead(
        self,
        run: Run,
        should_stop: Step = lambda: False,
        take_alike: Join = lambda: None,
        lag_seconds: float = 60.0,
    ) -> list[Any]:
        return list(lead(run, should_stop, take_alike, SCORE, [(self.ours, self.received)], lost, lag_seconds))

    def follow(self, run: Run, lag_seconds: float = 60.0) -> Future[None]:
        """In another thread."""
        return self._threads.submit(follow, lambda _, step, join: run(step, join), self.theirs, lost, lag_seconds)

    def _watch(self) -> None:
        """Puts what `theirs` sends into `received`, as a worker's watching thread does, until it is closed."""
        with contextlib.suppress(EOFError):
            while True:
                self.received.put(decode_from_rank(self.ours.recv_bytes()))


@pytest.fixture
def pair():
    with ThreadPoolExecutor(4) as threads:
        both = Pair(threads)
        yield both
        both.theirs.close()
        both.ours.close()


def asks(count: int, then: type[Exception] | None = None) -> Run:
    """A run of so many steps, unless it is told to stop, that ends with an exception if one is given."""

    def run(step: Step, join: Join) -> Iterator[int]:
        for asked in range(count):
            if step():
                yield asked + 1
                return
        if then:
            raise then
        yield count

    return run


def test_all_stop_at_the_same_step(pair):
    answers = iter([False, False, True])
    followed: list[int] = []

    def noting(step: Step, join: Join) -> Iterator[int]:
        for answer in asks(100)(step, join):
            followed.append(answer)
            yield answer

    following = pair.follow(noting)
    assert pair.lead(asks(100), lambda: next(answers)) == [3]
    following.result(PATIENCE_SECONDS)
    assert followed == [3]


def test_what_joins_rank_0_joins_all(pair):
    joining = [generating([(5, 6)], 2), None, generating([(7,)], 3)]
    joined: list[list[Any]] = [[], []]

    def run(place: int) -> Run:
        def joins(step: Step, join: Join) -> Iterator[int]:
            for _ in range(3):
                step()
                joined[place].append(join())
                yield len(joined[place])

        return joins

    following = pair.follow(run(1))
    waiting = iter(joining)
    assert pair.lead(run(0), take_alike=lambda: next(waiting)) == [1, 2, 3]
    following.result(PATIENCE_SECONDS)
    assert joined == [joining, joining]


def test_another_order_of_steps_and_joins_is_noticed(pair):
    def joins(step: Step, join: Join) -> Iterator[int]:
        join()
        yield 1

    following = pair.follow(joins)
    with pytest.raises(Lost, match=r"a chunk ended differently|a rank is not through"):
        pair.lead(asks(2, IndexError), lag_seconds=0.2)
    with pytest.raises(Lost, match="rank 0 does not ask for more chunks at step 0"):
        following.result(PATIENCE_SECONDS)


def test_the_same_error_on_all_is_survived(pair):
    for error in (ValueError, None):
        following = pair.follow(asks(2, error))
        if error:
            with pytest.raises(error):
                pair.lead(asks(2, error))
        else:
            assert pair.lead(asks(2)) == [2]
        following.result(PATIENCE_SECONDS)


@pytest.mark.parametrize("theirs", [asks(2, ValueError), asks(1), asks(2, KeyError)])
def test_another_end_than_that_of_rank_0_is_noticed_by_it(theirs, pair):
    pair.follow(theirs)
    with pytest.raises(Lost, match="a chunk ended differently"):
        pair.lead(asks(2, IndexError))


def test_an_end_before_that_of_rank_0_is_noticed_by_the_other(pair):
    pair.follow(asks(1))
    with pytest.raises(Lost):
        pair.lead(asks(2))
    with pytest.raises(Lost, match="a chunk that rank 0 still computes has ended here"):
        pair.follow(asks(1)).result(PATIENCE_SECONDS)


def test_a_rank_that_lags_behind_is_given_up(pair):
    """One after the other: each finds all that the other said, and waits for what does not come."""
    with pytest.raises(Lost, match="a rank is not through with a chunk that has ended here"):
        pair.lead(asks(2), lag_seconds=0.2)
    with pytest.raises(Lost, match="rank 0 does not go on after step 3"):
        pair.follow(asks(3), lag_seconds=0.2).result(PATIENCE_SECONDS)


def test_a_rank_that_is_gone_is_noticed_at_the_next_step(pair):
    pair.theirs.close()
    with pytest.raises(Lost, match="a rank is gone"):
        pair.lead(asks(1))
