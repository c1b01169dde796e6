from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from fake_worker import Behaviour, FakeWorker, answer, failing, score, silent, unanswered

from gpu_pool.evaluator.dispatch import Dispatcher
from gpu_pool.evaluator.requests import Unit
from gpu_pool.messages import GenerationOptions, LoglikelihoodDone

TIMEOUT_S = 30.0  # only for a test that fails
Events = queue.Queue[tuple[str, list[Unit]]]
StartWorker = Callable[..., FakeWorker]


@pytest.fixture
def events() -> Events:
    return queue.Queue()


@pytest.fixture
def dispatcher(events: Events) -> Iterator[Dispatcher]:
    def report(what: str, units: Sequence[Unit]) -> None:
        events.put((what, list(units)))

    with closing(Dispatcher("job", None, report, report)) as dispatcher:
        yield dispatcher


@pytest.fixture
def start_worker(tmp_path: Path, dispatcher: Dispatcher) -> Iterator[StartWorker]:
    """Start a fake worker and attach it."""
    with ExitStack() as workers:

        def start(name: str, behaviour: Behaviour = answer) -> FakeWorker:
            worker = workers.enter_context(closing(FakeWorker(name, tmp_path / name, behaviour)))
            dispatcher.attach(name, str(worker.address))
            return worker

        yield start


def make_units(count: int, length: int = 50) -> list[Unit]:
    return [Unit(prompt=(i,) * length, continuation=(i + 1,), key=b"%d" % i) for i in range(count)]


def collect(events: Events, count: int) -> dict[str, list[Unit]]:
    """Answered units by worker, once `count` are."""
    found: dict[str, list[Unit]] = {}
    while sum(map(len, found.values())) < count:
        worker, units = events.get(timeout=TIMEOUT_S)
        found.setdefault(worker, []).extend(units)
    return found


def assert_answered(units: Sequence[Unit]) -> None:
    assert [unit.answer for unit in units] == [(-score(unit.prompt + unit.continuation), False) for unit in units]


def test_every_unit_is_answered_once(dispatcher: Dispatcher, events: Events, start_worker: StartWorker) -> None:
    units = make_units(500)
    dispatcher.submit(units)
    worker = start_worker("a")
    assert len(set(collect(events, 500)["a"])) == 500
    assert_answered(units)
    assert sum(len(chunk.requests) for chunk in worker.chunks) == 500
    assert len(worker.chunks) > 2


def test_both_workers_get_their_share(dispatcher: Dispatcher, events: Events, start_worker: StartWorker) -> None:
    together = threading.Barrier(3)

    def wait_for_the_other(worker: FakeWorker, chunk: object) -> object:
        if not worker.chunks:
            together.wait(TIMEOUT_S)
        return answer(worker, chunk)

    start_worker("a", wait_for_the_other)
    start_worker("b", wait_for_the_other)
    units = make_units(8)
    dispatcher.submit(units)
    together.wait(TIMEOUT_S)  # both hold a chunk: neither has taken all of a small job
    assert set(collect(events, 8)) == {"a", "b"}
    assert_answered(units)


def test_what_a_lost_worker_had_goes_to_another(
    dispatcher: Dispatcher, events: Events, start_worker: StartWorker
) -> None:
    units = make_units(300)
    dispatcher.submit(units)
    start_worker("a", unanswered)
    start_worker("b")
    assert set(collect(events, 300)) == {"b"}
    assert_answered(units)


def test_a_detached_worker_is_not_waited_for(dispatcher: Dispatcher, events: Events, start_worker: StartWorker) -> None:
    has_chunk = threading.Event()

    def hang(worker: FakeWorker, chunk: object) -> None:
        has_chunk.set()
        silent(worker, chunk)

    units = make_units(10)
    dispatcher.submit(units)
    start_worker("a", hang)
    assert has_chunk.wait(TIMEOUT_S)
    dispatcher.detach("a")
    start_worker("b")
    assert set(collect(events, 10)) == {"b"}


def test_an_address_nobody_listens_at(
    dispatcher: Dispatcher, events: Events, start_worker: StartWorker, tmp_path: Path
) -> None:
    dispatcher.attach("gone", str(tmp_path / "gone"))
    dispatcher.submit(make_units(1))
    start_worker("b")
    assert set(collect(events, 1)) == {"b"}


def test_failed_chunk(dispatcher: Dispatcher, events: Events, start_worker: StartWorker) -> None:
    units = make_units(2)
    dispatcher.submit(units)
    start_worker("a", failing)
    assert events.get(timeout=TIMEOUT_S) == ("out of memory", units)


def test_too_few_answers_are_a_failure(dispatcher: Dispatcher, events: Events, start_worker: StartWorker) -> None:
    dispatcher.submit(make_units(2))
    start_worker("a", lambda _, chunk: LoglikelihoodDone(chunk_id=chunk.chunk_id, answers=(), seconds=0.1))
    error, _ = events.get(timeout=TIMEOUT_S)
    assert "Worker a cannot be used" in error


def test_kinds_do_not_share_chunks(dispatcher: Dispatcher, events: Events, start_worker: StartWorker) -> None:
    short, long = GenerationOptions(max_gen_toks=3), GenerationOptions(max_gen_toks=300)
    units = make_units(2)
    units += [Unit(prompt=(1,), options=short, kind="short", key=b"x"), Unit(prompt=(1,), options=long, kind="long")]
    dispatcher.submit(units)
    worker = start_worker("a")
    collect(events, 4)
    assert [type(chunk).__name__ for chunk in worker.chunks] == ["LoglikelihoodChunk", *["GenerationChunk"] * 2]
    assert [chunk.options for chunk in worker.chunks[1:]] == [short, long]
    assert [chunk.seeds for chunk in worker.chunks[1:]] == [(), (0,)]
