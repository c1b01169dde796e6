"""Workers that live and that a job cannot reach: the job gets another one, and who else uses them keeps them."""

from __future__ import annotations

from scheduler_box import Box

from gpu_pool import events as ev
from gpu_pool.scheduler import MAX_LOSSES


def run_on_new_worker(box: Box, job_id: str, model: str = "a", **fields: object) -> str:
    """Submit a job that gets a new worker, and load that."""
    (start,) = box.of(ev.StartWorker, box.submit(job_id, model, **fields))
    box.load(start.worker_id)
    return start.worker_id


def lose_link(box: Box, job_id: str, worker_id: str) -> list[ev.Action]:
    return box.do(ev.WorkerUnreachable, job_id=job_id, worker_id=worker_id, cause="no such file")


def test_a_worker_that_its_only_job_cannot_reach_is_replaced() -> None:
    box = Box(slots=1)
    worker = run_on_new_worker(box, "j")
    note, stop = lose_link(box, "j", worker)
    assert note == ev.NoteLoss(job_id="j", cause=f"{worker} cannot be reached: no such file")
    assert stop == ev.StopWorker(worker_id=worker)
    (start,) = box.of(ev.StartWorker, box.gone(worker))
    (attach,) = box.of(ev.Attach, box.load(start.worker_id))
    assert (attach.job_id, attach.worker_id) == ("j", start.worker_id)


def test_a_job_goes_on_with_the_other_worker_that_it_has() -> None:
    box = Box(slots=2)
    box.submit("j", max_replicas=2)
    first, second = box.ledger.workers
    for worker_id in (first, second):
        box.load(worker_id)
    assert box.of(ev.StopWorker, lose_link(box, "j", first))
    assert box.ledger.running["j"].workers == [second]


def test_who_else_uses_it_keeps_it_until_they_are_done_and_nobody_new_is_given_it() -> None:
    box = Box(slots=1)
    worker = run_on_new_worker(box, "j")
    box.submit("k")
    assert not box.of(ev.StopWorker, lose_link(box, "k", worker))
    assert box.ledger.running["j"].workers == [worker]
    assert box.ledger.running["k"].workers == []
    assert not box.of(ev.Attach, box.submit("l"))
    actions = box.end("j")
    assert [stop.worker_id for stop in box.of(ev.StopWorker, actions)] == [worker]
    assert not box.of(ev.Attach, actions)
    (start,) = box.of(ev.StartWorker, box.gone(worker))
    attached = {attach.job_id for attach in box.of(ev.Attach, box.load(start.worker_id))}
    assert "k" in attached


def test_what_is_heard_of_a_worker_that_the_job_has_no_more_changes_nothing() -> None:
    box = Box(slots=1)
    worker = run_on_new_worker(box, "j")
    box.end("j")
    assert lose_link(box, "j", worker) == []
    box.submit("k")
    assert lose_link(box, "j", worker) == []
    assert box.ledger.running["k"].workers == [worker]
    box.gone(worker)
    assert lose_link(box, "k", worker) == []


def test_a_job_that_reaches_no_worker_ends() -> None:
    box = Box(slots=1)
    worker = run_on_new_worker(box, "j")
    for _ in range(MAX_LOSSES - 1):
        lose_link(box, "j", worker)
        (start,) = box.of(ev.StartWorker, box.gone(worker))
        worker = start.worker_id
        box.load(worker)
    lose_link(box, "j", worker)
    assert box.ledger.ending["j"].error == (
        f"it lost its workers {MAX_LOSSES} times without progress in between; "
        f"the last: {worker} cannot be reached: no such file"
    )
