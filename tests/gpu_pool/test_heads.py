"""Which jobs others may not pass for ever: heads on one kind of device, one behind another, for what is left."""

from __future__ import annotations

import pytest
from scheduler_box import Box, spec

from gpu_pool import events as ev
from gpu_pool.events import Demand
from gpu_pool.explain import explain
from gpu_pool.heads import Heads
from gpu_pool.ledger import MEMORY_SECONDS
from gpu_pool.order import AGEING_SECONDS
from gpu_pool.placer import PATIENCE_SECONDS

GPU = {name: spec(name, "cuda") for name in "abcdef"}


def run_on(box: Box, job_id: str, model: str, **fields: object) -> str:
    (start,) = box.of(ev.StartWorker, box.submit(job_id, spec=GPU[model], **fields))
    box.load(start.worker_id)
    return start.worker_id


def later(box: Box, seconds: float) -> list[ev.Action]:
    box.now += seconds
    return box.do(ev.Tick)


def demand(job_id: str, order: float = 0.0, **fields: object) -> Demand:
    return Demand(job_id=job_id, spec=GPU["a"], max_replicas=1, order=order, **fields)


def due(heads: Heads, now: float) -> list[str]:
    return [head.demand.job_id for head in heads.due(now)]


def test_the_next_head_is_the_first_job_that_asks_for_something_else_once_patience_with_the_last_is_over() -> None:
    heads = Heads(patience_s=10.0)
    heads.note(demand("pinned", 1.0, slot_id="GPU-0"), now=0.0)
    heads.note(demand("pair", 2.0, gpus=2), now=9.0)
    assert due(heads, 10.0) == ["pinned"]
    heads.note(demand("pinned too", 3.0, slot_id="GPU-0"), now=10.0)
    heads.note(demand("pair", 4.0, gpus=2), now=10.0)
    heads.note(demand("third", 5.0), now=10.0)
    assert due(heads, 20.0) == ["pinned", "pair"]


def test_no_job_behind_a_head_that_others_may_still_pass_becomes_one() -> None:
    heads = Heads(patience_s=10.0)
    assert heads.last("cuda", 0.0) is None
    heads.note(demand("pinned", 1.0, slot_id="GPU-0"), now=0.0)
    heads.note(demand("pair", 2.0, gpus=2), now=10.0)
    last = heads.last("cuda", 15.0)
    assert last is not None
    assert last.demand.job_id == "pair"
    assert heads.last("cpu", 15.0) is None
    assert heads.last("cuda", 20.0) is None


def test_a_job_that_needs_less_memory_is_not_stood_for() -> None:
    heads = Heads(patience_s=10.0)
    for order, memory in [(1.0, 40), (2.0, 50), (3.0, 30)]:
        heads.note(demand(f"{memory}", order, memory_bytes=memory), now=10.0 * order)
    assert due(heads, 40.0) == ["40", "30"]


def test_a_better_ranked_job_is_served_first_and_the_clock_of_others_runs_on() -> None:
    heads = Heads(patience_s=10.0)
    heads.note(demand("pair", gpus=2), now=0.0)
    heads.note(demand("important", priority=5), now=8.0)
    heads.note(demand("important pair", gpus=2, priority=6), now=8.0)  # instead of the pair
    assert due(heads, 10.0) == []
    assert due(heads, 18.0) == ["important pair", "important"]


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_head_that_cannot_be_helped_for_hours_keeps_nobody_behind_it_from_becoming_one(gpus: int) -> None:
    """Pinned to a GPU where a long job runs, or asking for all GPUs where a more important one does."""
    box = Box(slots=0, gpus=3, evaluators=8)
    run_on(box, "long", "a", priority=5)
    run_on(box, "small", "b")
    run_on(box, "small too", "c")
    box.submit("first", spec=GPU["d"], **({"slot_id": "GPU-0"} if gpus == 1 else {"gpus": 3}))
    later(box, PATIENCE_SECONDS)
    box.submit("pair", spec=GPU["e"], gpus=2)
    assert not box.of(ev.Detach, later(box, PATIENCE_SECONDS))
    box.end("small")
    assert [detach.job_id for detach in box.of(ev.Detach)] == ["small too"]
    for worker_id in [stop.worker_id for stop in box.of(ev.StopWorker)]:
        box.gone(worker_id)
    (detach,) = box.of(ev.Detach)
    box.do(ev.WorkerGivenBack, job_id=detach.job_id, worker_id=detach.worker_id)
    assert box.of(ev.StartWorker, box.gone(detach.worker_id))[0].spec == GPU["e"]


def test_a_head_that_could_not_be_helped_is_as_soon_as_it_has_waited_long_enough() -> None:
    box = Box(slots=0, gpus=2, evaluators=8)
    run_on(box, "long", "a", priority=2)
    worker = run_on(box, "small", "b")
    box.submit("large", spec=GPU["d"], gpus=2)
    later(box, PATIENCE_SECONDS)
    box.end("small")
    assert box.of(ev.StartWorker, [*box.submit("next", spec=GPU["c"]), *box.gone(worker)])  # nothing is kept
    assert not box.of(ev.Detach, later(box, 2 * AGEING_SECONDS - PATIENCE_SECONDS - 1))
    later(box, 1)
    box.end("next")
    assert [detach.job_id for detach in box.of(ev.Detach)] == ["long"]


def test_no_evaluator_is_kept_while_a_head_waits_for_a_job_to_end() -> None:
    box = Box(slots=0, gpus=2, evaluators=2)
    run_on(box, "long", "a")
    box.submit("pinned", spec=GPU["b"], slot_id="GPU-0")
    later(box, PATIENCE_SECONDS)
    assert box.of(ev.StartWorker, box.submit("elsewhere", spec=GPU["c"]))
    (stop,) = box.of(ev.StopWorker, box.end("long"))  # and its evaluator is ready for the one that waited
    assert box.of(ev.StartWorker, box.gone(stop.worker_id))[0].spec == GPU["b"]


def test_nothing_is_kept_for_a_job_whose_gpu_does_not_come_back() -> None:
    box = Box(slots=2, gpus=1, evaluators=1)
    worker = run_on(box, "j", "a")
    box.now += 50.0
    box.end("j")
    box.do(ev.WorkerDied, worker_id=worker, cause="x")
    box.submit("gpu", spec=GPU["b"])
    box.submit("cpu", spec=spec("c"))
    [gpu, cpu] = explain(box.ledger, {}, 10)
    assert (gpu.starts_in, cpu.starts_in) == (0.0, 50.0)
    assert cpu.reason == (
        "Evaluators that are ready are kept for others (job gpu). 2 of the 2 CPU workers that would do are free."
    )
    later(box, MEMORY_SECONDS)
    assert "cpu" in box.ledger.waiting  # mostly the memory is back by then
    later(box, 1)
    assert "cpu" in box.ledger.running
    [gpu] = explain(box.ledger, {}, 10)
    assert gpu.starts_in is None
    assert gpu.reason.endswith("Not usable: GPU 0: its memory should be back by now.")
    box.end("cpu")
    assert box.of(ev.StartWorker, box.do(ev.SlotsReturned, worker_id=worker))[0].spec == GPU["b"]
