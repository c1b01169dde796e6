"""What jobs compute for each other: several on one cache file, each as its own process would be, with fake workers."""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from fake_worker import Behaviour, Chunk, FakeWorker, answer, failing_on, poisoned, score, unanswered

from gpu_pool import cache_file
from gpu_pool.cache import CachedModel, ResponseCache
from gpu_pool.evaluator import shared_answers
from gpu_pool.evaluator.dispatch import Dispatcher
from gpu_pool.evaluator.requests import Unit
from gpu_pool.evaluator.shared_answers import SharedAnswers
from gpu_pool.messages import Message

TIMEOUT_S = 120.0  # only for a test that fails
MODEL = CachedModel("fingerprint", "/models/tiny")
POISON = 300
pause = threading.Event()


class Job:
    """Dispatcher and shared answers, tied together as `JobRun` does it."""

    def __init__(self, path: Path, units: Sequence[Unit]) -> None:
        self.units = units
        self.cache = ResponseCache(path)
        self.failures: list[str] = []
        self._settled: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.dispatcher = Dispatcher("job", None, self._on_answers, self._settle, self.failures.append)
        self.shared = SharedAnswers(self.cache, MODEL, self._settle, self.dispatcher.submit, self.failures.append)
        self.dispatcher.shared = self.shared
        self.dispatcher.submit(units)

    def _on_answers(self, worker_id: str, units: Sequence[Unit]) -> None:
        self.shared.keep(units)
        self._settle(units)

    def _settle(self, units: Sequence[Unit]) -> None:
        self._settled.put(len(units))

    def wait(self) -> None:
        """Until every unit has an answer or an error."""
        left = len(self.units)
        while left:
            left -= self._settled.get(timeout=TIMEOUT_S)
        assert left == 0

    def errored(self) -> list[int]:
        """Numbers of the units without an answer; all others have the right one."""
        for unit in self.units:
            expected = -score([*unit.prompt, *unit.continuation]), False
            assert unit.error is not None or unit.answer == expected
        return [number for number, unit in enumerate(self.units) if unit.error is not None]

    def close(self) -> None:
        self.dispatcher.close()
        self.shared.close()
        self.cache.close()


OpenJob = Callable[..., Job]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "responses.sqlite"


@pytest.fixture
def open_job(path: Path) -> Iterator[OpenJob]:
    """`open_job(count)`: a job of so many units, equal in all jobs."""
    with ExitStack() as jobs:

        def start(count: int) -> Job:
            units = [Unit(prompt=(i,) * 50, continuation=(i + 1,), key=b"%d" % i) for i in range(count)]
            return jobs.enter_context(closing(Job(path, units)))

        yield start


@pytest.fixture
def replaced(tmp_path: Path) -> Iterator[Callable[[Sequence[Job], Behaviour], list[FakeWorker]]]:
    """A worker for these jobs together, that is replaced whenever it dies, as the server does it; all there were."""
    workers: list[FakeWorker] = []
    needed: queue.SimpleQueue[bool] = queue.SimpleQueue()
    with ThreadPoolExecutor(1) as thread:

        def serve(jobs: Sequence[Job], behaviour: Behaviour) -> list[FakeWorker]:
            def behave(worker: FakeWorker, chunk: Chunk) -> Message | None:
                if (reply := behaviour(worker, chunk)) is None:
                    worker.die()
                    needed.put(True)
                return reply

            def replace() -> None:
                while needed.get():
                    if workers:
                        for job in jobs:
                            job.dispatcher.detach(workers[-1].worker_id, cause="killed by SIGSEGV")
                    name = f"w{len(workers)}"
                    workers.append(FakeWorker(name, tmp_path / name, behave))
                    for job in jobs:
                        job.dispatcher.attach(name, str(workers[-1].address))

            needed.put(True)
            thread.submit(replace)
            return workers

        yield serve
        needed.put(False)
    for worker in workers:
        worker.close()


def computed(workers: Sequence[FakeWorker]) -> int:
    return sum(len(chunk.sequences) for worker in workers for chunk in worker.chunks)


def test_what_two_jobs_need_is_computed_once(open_job: OpenJob, replaced) -> None:
    jobs = [open_job(200), open_job(200)]
    workers = replaced(jobs, answer)
    for job in jobs:
        job.wait()
        assert job.errored() == []
    assert computed(workers) == 200


def test_a_request_that_kills_ends_in_an_error_in_both_jobs(open_job: OpenJob, replaced) -> None:
    jobs = [open_job(POISON), open_job(POISON)]
    workers = replaced(jobs, poisoned(POISON))  # the last unit's continuation
    for job in jobs:
        job.wait()
        assert job.errored() == [POISON - 1]
        assert job.units[-1].error == "its worker process ended: killed by SIGSEGV"
        assert job.failures == []
    assert computed(workers) == POISON - 1
    assert len(workers) <= 18


def test_suspects_stay_with_a_job_that_has_another_worker(open_job: OpenJob, path: Path, tmp_path: Path) -> None:
    """Others would lose their workers to find out the same."""
    job = open_job(0)
    units = [Unit(prompt=(i,) * 50, continuation=(i + 1,), key=b"%d" % i) for i in range(300)]
    has_chunk, may_go = threading.Event(), threading.Event()

    def hold(worker: FakeWorker, chunk: Chunk) -> None:
        has_chunk.set()
        may_go.wait(TIMEOUT_S)

    with (
        closing(FakeWorker("busy", tmp_path / "busy", hold)) as busy,
        closing(FakeWorker("dies", tmp_path / "dies", unanswered)) as dies,
        closing(ResponseCache(path)) as other,
    ):
        job.dispatcher.attach("busy", str(busy.address))
        job.dispatcher.submit(units[:10])
        assert has_chunk.wait(TIMEOUT_S)
        job.dispatcher.attach("dies", str(dies.address))
        link = job.dispatcher._links["dies"]
        job.dispatcher.submit(units[10:])
        link.join()
        [suspect] = job.dispatcher._suspects._waiting
        keys = [unit.key for unit in suspect.units if unit.key]
        assert other.unclaimed(keys) == set()
        last = job.dispatcher._links["busy"]
        job.dispatcher.detach("busy")  # given back: the job waits for another one
        last.join()
        may_go.set()
        assert other.unclaimed(keys) == set(keys)


def test_a_job_without_workers_keeps_nobody_waiting(open_job: OpenJob, path: Path, tmp_path: Path) -> None:
    job = open_job(0)
    units = [Unit(prompt=(i,) * 50, continuation=(i + 1,), key=b"%d" % i) for i in range(300)]
    with closing(FakeWorker("w", tmp_path / "w", unanswered)) as worker, closing(ResponseCache(path)) as other:
        job.dispatcher.attach("w", str(worker.address))
        link = job.dispatcher._links["w"]
        job.dispatcher.submit(units)
        link.join()
        assert job.dispatcher._suspects
        assert other.unclaimed([unit.key for unit in units if unit.key]) == {unit.key for unit in units}


def test_a_request_that_cannot_be_computed_ends_in_an_error_in_both_jobs(open_job: OpenJob, replaced) -> None:
    jobs = [open_job(POISON), open_job(POISON)]
    workers = replaced(jobs, failing_on(POISON))
    for job in jobs:
        job.wait()
        assert job.errored() == [POISON - 1]
        assert job.units[-1].error == "ValueError: no such word"
    assert computed(workers) == POISON - 1


def test_what_is_waited_for_in_vain_is_computed(
    open_job: OpenJob, replaced, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner lives, but hangs."""
    monkeypatch.setattr(shared_answers, "PATIENCE_SECONDS", 0.1)
    with closing(ResponseCache(path)) as hanging:
        hanging.reserve([b"0", b"5"])
        job = open_job(10)
        replaced([job], answer)
        job.wait()
        assert job.errored() == []


def test_answers_that_could_not_be_written_are_written_while_others_are_waited_for(
    open_job: OpenJob, replaced, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or each of two jobs would wait for what the other one has."""
    job = open_job(2)
    with closing(ResponseCache(path)) as other, closing(sqlite3.connect(path, isolation_level=None)) as holder:
        other.reserve([b"1"])
        assert len(job.shared.reserve(job.units)) == 1
        monkeypatch.setattr(cache_file, "PATIENCE_S", 0.05)
        holder.execute("BEGIN IMMEDIATE")
        job.units[0].answer = (-score([*job.units[0].prompt, *job.units[0].continuation]), False)
        job._on_answers("w", job.units[:1])
        assert other.lookup([b"0"]) == {}
        holder.execute("ROLLBACK")
        while not other.lookup([b"0"]):
            pause.wait(0.01)


def test_a_job_that_cannot_look_any_more_fails(path: Path) -> None:
    failures: queue.SimpleQueue[str] = queue.SimpleQueue()

    def on_answers(units: Sequence[Unit]) -> None:
        raise KeyError("a defect")

    unit = Unit(prompt=(1,), continuation=(2,), key=b"1")
    with closing(ResponseCache(path)) as cache, closing(ResponseCache(path)) as other:
        other.reserve([b"1"])
        shared = SharedAnswers(cache, MODEL, on_answers, lambda units: None, failures.put)
        with closing(shared):
            assert shared.reserve([unit]) == []
            other.store({b"1": "text"})
            assert "a defect" in failures.get(timeout=TIMEOUT_S)
