from __future__ import annotations

import os
import queue
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
import pytest
from fake_worker import (
    Behaviour,
    Chunk,
    FakeWorker,
    answer,
    failing,
    failing_on,
    poisoned,
    score,
    silent,
    unanswered,
)

from gpu_pool.chunk_messages import GenerationOptions, LoglikelihoodChunk, LoglikelihoodDone
from gpu_pool.evaluator.dispatch import Dispatcher
from gpu_pool.evaluator.requests import Unit
from gpu_pool.evaluator.suspects import MOST_DEATHS_ALONE
from gpu_pool.messages import Message

TIMEOUT_S = 120.0  # only for a test that fails
Events = queue.Queue[tuple[str, list[Unit]]]
StartWorker = Callable[..., FakeWorker]


@pytest.fixture
def events() -> Events:
    return queue.Queue()


@pytest.fixture
def dispatcher(events: Events) -> Iterator[Dispatcher]:
    def answered(worker_id: str, units: Sequence[Unit]) -> None:
        events.put((worker_id, list(units)))

    def errored(units: Sequence[Unit]) -> None:
        events.put(("error", list(units)))

    with closing(Dispatcher("job", None, answered, errored, lambda error: events.put((error, [])))) as dispatcher:
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


def waiting_for(others: threading.Barrier) -> Behaviour:
    """Answer once all `others` have a chunk."""

    def behave(worker: FakeWorker, chunk: Chunk) -> Message:
        if not worker.chunks:
            others.wait(TIMEOUT_S)
        return answer(worker, chunk)

    return behave


def assert_answered(units: Sequence[Unit]) -> None:
    assert [unit.answer for unit in units] == [(-score([*unit.prompt, *unit.continuation]), False) for unit in units]


def test_every_unit_is_answered_once(dispatcher: Dispatcher, events: Events, start_worker: StartWorker) -> None:
    units = make_units(500)
    dispatcher.submit(units)
    worker = start_worker("a")
    assert len(set(collect(events, 500)["a"])) == 500
    assert_answered(units)
    assert sum(len(chunk.sequences) for chunk in worker.chunks) == 500
    assert len(worker.chunks) > 2


def test_both_workers_get_their_share(dispatcher: Dispatcher, events: Events, start_worker: StartWorker) -> None:
    together = threading.Barrier(3)
    start_worker("a", waiting_for(together))
    start_worker("b", waiting_for(together))
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


def test_a_worker_that_is_given_back_answers_what_it_was_asked_and_no_more(
    dispatcher: Dispatcher, events: Events, start_worker: StartWorker
) -> None:
    has_chunk, may_answer, given_back = threading.Event(), threading.Event(), threading.Event()

    def late(worker: FakeWorker, chunk: Chunk) -> Message:
        has_chunk.set()
        assert may_answer.wait(TIMEOUT_S)
        return answer(worker, chunk)

    units = make_units(500)
    dispatcher.submit(units)
    giving = start_worker("a", late)
    assert has_chunk.wait(TIMEOUT_S)
    dispatcher.detach("a", at_once=False, then=given_back.set)
    assert not given_back.is_set()
    may_answer.set()
    assert given_back.wait(TIMEOUT_S)
    start_worker("b")
    answered = collect(events, 500)
    assert len(answered["a"]) == sum(len(chunk.sequences) for chunk in giving.chunks)
    assert 1 <= len(giving.chunks) <= 2
    assert len(answered["a"]) + len(answered["b"]) == 500
    assert_answered(units)


def test_giving_back_a_worker_that_is_gone_is_said_at_once(dispatcher: Dispatcher) -> None:
    given_back = threading.Event()
    dispatcher.detach("nobody", at_once=False, then=given_back.set)
    assert given_back.is_set()


def test_an_address_nobody_listens_at(
    dispatcher: Dispatcher, events: Events, start_worker: StartWorker, tmp_path: Path
) -> None:
    dispatcher.attach("gone", str(tmp_path / "gone"))
    dispatcher.submit(make_units(1))
    start_worker("b")
    assert set(collect(events, 1)) == {"b"}


Reports = queue.Queue[tuple[str, str]]


@pytest.fixture
def reporting(events: Events) -> Iterator[tuple[Dispatcher, Reports]]:
    """A dispatcher, and what it reports of workers that it cannot reach."""
    reports: Reports = queue.Queue()

    def report(worker_id: str, error: str) -> None:
        reports.put((worker_id, error))

    silent_about_answers = (lambda *_: None, lambda _: None, lambda error: events.put((error, [])))
    with closing(Dispatcher("job", None, *silent_about_answers, on_unreachable=report)) as dispatcher:
        yield dispatcher, reports


def test_a_worker_that_cannot_be_reached_is_reported(reporting: tuple[Dispatcher, Reports], tmp_path: Path) -> None:
    dispatcher, reports = reporting
    dispatcher.submit(make_units(1))
    dispatcher.attach("gone", str(tmp_path / "gone"))
    why = f"FileNotFoundError: [Errno 2] No such file or directory ({tmp_path / 'gone'})"
    assert reports.get(timeout=TIMEOUT_S) == ("gone", why)
    with closing(FakeWorker("a", tmp_path / "a", unanswered)) as worker:
        dispatcher.attach("a", str(worker.address))
        assert reports.get(timeout=TIMEOUT_S) == ("a", f"it closed the connection ({worker.address})")


def test_a_worker_whose_end_is_known_or_that_is_wanted_elsewhere_is_not_reported(
    reporting: tuple[Dispatcher, Reports], tmp_path: Path
) -> None:
    dispatcher, reports = reporting
    dispatcher.submit(make_units(2))
    for cause in ("killed by SIGSEGV", None):
        with closing(FakeWorker("a", tmp_path / str(cause), silent)) as worker:
            dispatcher.attach("a", str(worker.address))
            link = dispatcher._links["a"]
            dispatcher.detach("a", cause=cause)
            worker.die()
            link.join(TIMEOUT_S)
    assert reports.empty()


def test_an_evaluator_without_descriptors_blames_no_worker(
    reporting: tuple[Dispatcher, Reports], tmp_path: Path
) -> None:
    dispatcher, reports = reporting
    dispatcher.submit(make_units(1))
    with closing(FakeWorker("a", tmp_path / "a")) as worker:
        os.close(lowest := os.dup(0))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, limits[1]))  # one is left, and a connection takes two
        try:
            with pytest.raises(OSError, match="Too many open files"):
                dispatcher.attach("a", str(worker.address))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert reports.empty()


def test_requests_that_cannot_be_computed(dispatcher: Dispatcher, events: Events, start_worker: StartWorker) -> None:
    units = make_units(2)
    dispatcher.submit(units)
    start_worker("a", failing)
    assert collect(events, 2) == {"error": units}
    assert [unit.error for unit in units] == ["out of memory"] * 2


def test_the_one_that_cannot_be_computed_is_found(
    dispatcher: Dispatcher, events: Events, start_worker: StartWorker
) -> None:
    units = make_units(300)
    dispatcher.submit(units)
    start_worker("a", failing_on(300))  # the last unit's continuation
    found = collect(events, 300)
    assert found["error"] == [units[-1]]
    assert units[-1].error == "ValueError: no such word"
    assert_answered(units[:-1])


def die_one_after_another(
    dispatcher: Dispatcher,
    start_worker: StartWorker,
    behaviour: Behaviour,
    cause: str | None,
    most: int,
    *,
    from_outside: bool = False,
) -> list[FakeWorker]:
    """Workers that take over from each other, as the server replaces what died; `cause` is what it says of each."""
    workers: list[FakeWorker] = []
    died = threading.Semaphore(0)

    def behave(worker: FakeWorker, chunk: Chunk) -> Message | None:
        reply = behaviour(worker, chunk)
        if reply is None:
            died.release()
        return reply

    def replace() -> None:
        for number in range(most):
            workers.append(start_worker(f"w{number}", behave))
            died.acquire()
            if cause:
                dispatcher.detach(f"w{number}", cause=cause, from_outside=from_outside)

    threading.Thread(target=replace, daemon=True).start()
    return workers


@pytest.mark.parametrize(
    ("cause", "error"),
    [
        ("killed by SIGSEGV", "its worker process ended: killed by SIGSEGV"),
        (None, "its worker process ended: it closed the connection"),
    ],
)
def test_the_request_that_kills_is_found(
    cause: str | None,
    error: str,
    dispatcher: Dispatcher,
    events: Events,
    start_worker: StartWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpu_pool.evaluator.dispatch.CAUSE_SECONDS", 0.1 if cause is None else TIMEOUT_S)
    units = make_units(300)
    dispatcher.submit(units)
    workers = die_one_after_another(dispatcher, start_worker, poisoned(300), cause, 20)
    found = collect(events, 300)
    assert found["error"] == [units[-1]]
    assert units[-1].error == error
    assert_answered(units[:-1])
    assert len(workers) <= 16
    sizes = [len(chunk.sequences) for worker in workers[1:] for chunk in worker.chunks]
    assert sum(sizes) <= 300, "what was answered is not asked again"


def test_a_request_is_not_blamed_for_workers_that_somebody_kills(
    dispatcher: Dispatcher, events: Events, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_pool.evaluator.suspects.SOON_SECONDS", 0.0)  # it is a slow one
    monkeypatch.setattr("gpu_pool.evaluator.dispatch.CAUSE_SECONDS", TIMEOUT_S)
    [unit] = make_units(1)
    dispatcher.submit([unit])
    lives = iter([False] * (3 * MOST_DEATHS_ALONE) + [True])

    def killed_often(worker: FakeWorker, chunk: Chunk) -> Message | None:
        return answer(worker, chunk) if next(lives) else None

    how = ("killed by SIGKILL", 3 * MOST_DEATHS_ALONE + 1)
    die_one_after_another(dispatcher, start_worker, killed_often, *how, from_outside=True)
    assert "error" not in collect(events, 1)
    assert_answered([unit])


def test_what_waits_behind_a_request_that_kills_is_not_suspected(
    dispatcher: Dispatcher, events: Events, start_worker: StartWorker
) -> None:
    both = threading.Semaphore(0)

    def die_with_two(worker: FakeWorker, chunk: Chunk) -> None:
        assert both.acquire(timeout=TIMEOUT_S)  # another one is in flight, too

    worker = start_worker("a", die_with_two)
    dispatcher.submit(make_units(300))
    link = dispatcher._links["a"]
    while len(link.in_flight) < 2 or not link.begun:
        threading.Event().wait(0.001)
    first, second = link.in_flight.values()
    both.release()
    link.join()
    suspect = dispatcher._suspects.take()
    assert suspect is not None
    assert suspect.units == first.units
    assert not dispatcher._suspects
    start_worker("b")
    rest = collect(events, 300 - len(first.units))["b"]
    assert set(second.units) <= set(rest)
    assert not worker.chunks


def test_suspects_are_asked_alone(dispatcher: Dispatcher, events: Events, start_worker: StartWorker) -> None:
    in_flight: list[int] = []

    def look(worker: FakeWorker, chunk: Chunk) -> Message:
        in_flight.append(len(dispatcher._links["b"].in_flight))
        return answer(worker, chunk)

    start_worker("a", unanswered)
    link = dispatcher._links["a"]  # it goes with the first chunk
    dispatcher.submit(make_units(300))
    link.join()
    assert len(dispatcher._suspects) == 1
    start_worker("b", look)
    collect(events, 300)
    assert in_flight[0] == 1


def test_a_worker_that_says_nothing_is_reported(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_pool.evaluator.worker_link.SILENCE_SECONDS", 0.01)
    silence: queue.Queue[str] = queue.Queue()
    dispatcher = Dispatcher("job", None, lambda *_: None, lambda _: None, lambda _: None, silence.put)
    with closing(dispatcher), closing(FakeWorker("a", tmp_path / "a", silent)) as worker:
        dispatcher.submit(make_units(1))
        dispatcher.attach("a", str(worker.address))
        assert [silence.get(timeout=TIMEOUT_S) for _ in range(3)] == ["a"] * 3


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


def test_several_workers_begin_with_long_generation(
    dispatcher: Dispatcher, events: Events, start_worker: StartWorker
) -> None:
    both = waiting_for(threading.Barrier(2))
    workers = [start_worker("a", both), start_worker("b", both)]
    options = GenerationOptions(max_gen_toks=300)
    prompts = [Unit(prompt=(i,), options=options, kind="long", key=b"%d" % i) for i in range(100)]
    dispatcher.submit(make_units(100) + prompts)
    collect(events, 200)
    assert [type(worker.chunks[0]).__name__ for worker in workers] == ["GenerationChunk"] * 2


def answering_but(*tokens: int) -> Behaviour:
    """Answer all sequences but those that hold one of these, and say what is wrong with them."""

    def behave(worker: FakeWorker, chunk: Chunk) -> Message:
        done = answer(worker, chunk)
        assert isinstance(done, LoglikelihoodDone)
        assert isinstance(chunk, LoglikelihoodChunk)
        wrong = {place for place, some in enumerate(chunk.sequences.unpack()) if {*tokens} & {*some}}
        answers = tuple(None if place in wrong else one for place, one in enumerate(done.answers))
        return msgspec.structs.replace(done, answers=answers, errors=dict.fromkeys(wrong, "it cannot be shown"))

    return behave


def test_requests_of_an_answered_chunk_may_be_in_error(
    dispatcher: Dispatcher, events: Events, start_worker: StartWorker
) -> None:
    units = make_units(60)
    dispatcher.submit(units)
    start_worker("a", answering_but(7, 30))  # tokens of the units 6 and 7, 29 and 30
    found = collect(events, 60)
    errored = {units.index(unit) for unit in found["error"]}
    assert errored == {6, 7, 29, 30}
    assert {unit.error for unit in found["error"]} == {"it cannot be shown"}
    assert_answered([unit for place, unit in enumerate(units) if place not in errored])
