"""Which workers jobs cannot do without, and on which slots those are."""

from __future__ import annotations

from scheduler_box import Box, spec

from gpu_pool import events as ev
from gpu_pool.needed import Needed
from gpu_pool.records import Worker


def worker(worker_id: str, *slots: str) -> Worker:
    return Worker(id=worker_id, spec=spec("a"), slots=slots, idle_since=0.0)


def test_a_worker_is_needed_while_it_is_the_last_of_any_job() -> None:
    needed = Needed()
    wide = worker("w", "GPU-0", "GPU-1")
    needed.note("j", wide)
    needed.note("k", wide)
    needed.note("k", wide)
    assert needed.workers == {"w": 2}
    assert needed.slots == {"GPU-0": 2, "GPU-1": 2}
    needed.note("j", None)
    needed.note("j", None)
    assert needed.workers == {"w": 1}
    needed.note("k", worker("other", "GPU-1"))
    assert needed.workers == {"other": 1}
    assert needed.slots == {"GPU-1": 1}


def test_a_job_with_two_workers_needs_neither_and_the_other_one_once_one_is_asked_back() -> None:
    box = Box(slots=2)
    box.submit("j", "a", max_replicas=2)
    first, second = box.ledger.running["j"].workers
    for each in (first, second):
        box.load(each)
    assert not box.ledger.needed.workers
    box.submit("k", "b")  # it gets one of the two
    (detach,) = box.of(ev.Detach)
    (kept,) = {first, second} - {detach.worker_id}
    assert box.ledger.needed.workers == {kept: 1}
    box.do(ev.WorkerGivenBack, worker_id=detach.worker_id, job_id="j")
    assert box.ledger.needed.workers == {kept: 1}
    box.end("j")
    assert kept not in box.ledger.needed.workers
