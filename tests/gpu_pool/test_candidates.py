"""Which of the waiting jobs a pass looks at."""

from __future__ import annotations

from scheduler_box import Box, spec

from gpu_pool import events as ev
from gpu_pool.candidates import Candidates
from gpu_pool.placer import PATIENCE_SECONDS

GPU = {name: spec(name, "cuda") for name in "abcd"}


def full_box() -> Box:
    """Two GPUs with a job each, and one that waits for a GPU: a head."""
    box = Box(slots=0, gpus=2, evaluators=8)
    for job_id in "ab":
        box.submit(job_id, spec=GPU[job_id])
    for worker_id in box.ledger.loading_since.copy():
        box.load(worker_id)
    box.submit("head", spec=GPU["c"])
    return box


def wait(box: Box, job_id: str, model: str, **fields: object) -> None:
    """The job waits, and no pass has seen it."""
    order = float(next(box.orders))
    box.ledger.waiting.add(ev.Demand(job_id=job_id, spec=GPU[model], max_replicas=1, order=order, **fields))


def seen(box: Box) -> list[str]:
    """What the next pass looks at, where nothing of that finds room."""
    candidates = Candidates(box.ledger, box.scheduler.placer.heads, {}, set(), bonus=PATIENCE_SECONDS)
    found: list[str] = []
    while demand := candidates.next():
        found.append(demand.job_id)
        candidates.close()
    return found


def test_on_a_full_box_none_behind_the_head_is_looked_at_whatever_it_needs() -> None:
    box = full_box()
    wait(box, "pair", "d", gpus=2)
    wait(box, "pinned", "d", slot_id="GPU-1")
    wait(box, "small", "d", memory_bytes=10)
    assert seen(box) == []


def test_what_goes_before_the_head_is_looked_at_as_it_may_be_one_and_so_is_what_has_a_replica() -> None:
    box = full_box()
    wait(box, "important", "d", priority=1, slot_id="GPU-1")
    wait(box, "shares", "a")
    wait(box, "elsewhere", "a", slot_id="GPU-1")
    assert seen(box) == ["important", "shares"]


def test_once_patience_with_the_head_is_over_what_it_does_not_stand_for_is_looked_at() -> None:
    box = full_box()
    box.ledger.pass_time(box.now + PATIENCE_SECONDS)
    wait(box, "pair", "d", gpus=2)
    wait(box, "pinned", "d", slot_id="GPU-1")
    assert seen(box) == ["head", "pair", "pinned"]


def test_where_a_slot_is_in_reach_all_are_looked_at_until_there_is_none() -> None:
    box = full_box()
    wait(box, "pair", "d", gpus=2)
    wait(box, "pinned", "d", slot_id="GPU-1")
    worker_id = box.ledger.running["a"].workers[0]
    box.ledger.release(box.ledger.running["a"], worker_id)  # its worker could be stopped
    assert seen(box) == ["head", "pair", "pinned"]
    box.ledger.slots.promised.update({slot_id: "x" for slot_id in box.ledger.workers[worker_id].slots})
    assert seen(box) == []
