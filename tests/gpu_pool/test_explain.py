"""When jobs are said to start: in the order in which they will, or not at all where that cannot be said."""

from __future__ import annotations

import pytest
from scheduler_box import Box, spec

from gpu_pool import events as ev
from gpu_pool.explain import explain
from gpu_pool.ledger import MEMORY_SECONDS
from gpu_pool.losses import PATIENT_KILLS
from gpu_pool.placer import PATIENCE_SECONDS

GPU = {name: spec(name, "cuda") for name in "abcd"}
LOAD_S = 5.0


def box_of(gpus: int, **options: object) -> Box:
    return Box(slots=0, gpus=gpus, evaluators=6, **options)


def run_on(box: Box, job_id: str, model: str, **fields: object) -> str:
    """Submit a job that gets a new worker, and load that."""
    (start,) = box.of(ev.StartWorker, box.submit(job_id, spec=GPU[model], **fields))
    box.now += LOAD_S
    box.load(start.worker_id)
    return start.worker_id


def end(box: Box, worker: str, job_id: str) -> None:
    box.end(job_id)
    if worker in box.ledger.workers:
        box.gone(worker)


def starts(box: Box, **seconds_left: float) -> dict[str, float | None]:
    return {wait.job_id: wait.starts_in for wait in explain(box.ledger, seconds_left, 10)}


def test_a_job_that_would_share_a_replica_waits_for_the_one_that_its_gpu_is_kept_for() -> None:
    box = box_of(1)
    run_on(box, "j", "a")
    box.submit("head", spec=GPU["b"])
    box.now += PATIENCE_SECONDS
    box.do(ev.Tick)
    box.submit("k", spec=GPU["a"])
    assert starts(box, j=42.0) == {"head": 42.0, "k": None}
    box.ledger.run_seconds, box.ledger.load_seconds[GPU["b"].replica_key] = 50.0, 7.0
    assert starts(box, j=42.0) == {"head": 42.0, "k": 99.0}
    [_, k] = explain(box.ledger, {}, 10)
    assert k.reason.endswith("Kept for others: GPU 0 (job head).")


def test_a_worker_that_loads_is_not_said_to_compute() -> None:
    box = box_of(1)
    (start,) = box.of(ev.StartWorker, box.submit("j", spec=GPU["a"]))
    box.submit("k", spec=GPU["b"])

    def held() -> str:
        [k] = explain(box.ledger, {"j": 42.0}, 10)
        return k.reason.partition("Held: ")[2]

    assert held() == f"GPU 0 by {start.worker_id} (loading for job j, about 42 s left)."
    box.load(start.worker_id)
    assert held() == f"GPU 0 by {start.worker_id} (job j, about 42 s left)."


def test_a_job_on_a_gpu_that_is_gone_waits_for_it() -> None:
    box = box_of(2)
    run_on(box, "j", "a")
    box.submit("k", spec=GPU["b"], slot_id="GPU-7")
    [k] = explain(box.ledger, {"j": 42.0}, 10)
    assert k.needs.endswith("and only GPU-7")
    assert k.reason.endswith("No GPU that would do is there.")
    assert k.starts_in is None


def test_jobs_behind_a_set_that_takes_an_idle_gpu_are_not_said_to_start_now() -> None:
    box = box_of(2)
    worker = run_on(box, "short", "a")
    run_on(box, "important", "b", priority=5)
    box.submit("large", spec=GPU["c"], gpus=2, priority=5)
    box.now += PATIENCE_SECONDS
    box.do(ev.Tick)
    end(box, worker, "short")
    box.submit("small", spec=GPU["d"])
    box.ledger.run_seconds = 50.0
    assert starts(box, important=30.0) == {"large": 0.0, "small": 50.0}


def test_free_gpus_above_the_cap_are_not_counted() -> None:
    box = box_of(3, max_gpus=1)
    box.ledger.run_seconds = 50.0
    run_on(box, "j", "a")
    box.submit("k", spec=GPU["b"])
    box.submit("elsewhere", spec=GPU["c"], slot_id="GPU-2")
    assert starts(box, j=42.0) == {"k": 42.0, "elsewhere": None}


def test_a_job_that_needs_more_gpus_than_may_be_held_is_told_so() -> None:
    box = box_of(2, max_gpus=1)
    box.submit("large", spec=GPU["a"], gpus=2)  # from before the cap
    [large] = explain(box.ledger, {}, 10)
    assert large.reason.endswith(
        "2 of the 2 GPUs that would do are free. No more than 1 GPU may be held (setting max_gpus)."
    )


def test_who_holds_the_gpus_that_are_counted_against_the_cap_is_said() -> None:
    box = box_of(2, max_gpus=1)
    worker = run_on(box, "j", "a")
    box.submit("k", spec=GPU["b"], slot_id="GPU-1")
    [k] = explain(box.ledger, {"j": 42.0}, 10)
    assert k.reason == (
        "The only GPU that would do is free. "
        f"No more than 1 GPU may be held (setting max_gpus): GPU 0 by {worker} (job j, about 42 s left)."
    )


def test_a_gpu_that_rests_after_many_kills_is_said_to() -> None:
    box = box_of(1)
    (start,) = box.of(ev.StartWorker, box.submit("j", spec=GPU["a"]))
    reasons: list[str] = []
    while not (reasons and "rests" in reasons[-1]):
        box.do(ev.WorkerDied, worker_id=start.worker_id, cause="killed by SIGKILL", from_outside=True)
        [j] = explain(box.ledger, {}, 10)
        reasons.append(j.reason)
        if "rests" not in j.reason:
            (start,) = box.of(ev.StartWorker, box.do(ev.SlotsReturned, worker_id=start.worker_id))
    assert len(reasons) == PATIENT_KILLS
    held, rests = f"Held: GPU 0 by {start.worker_id}", "killed as those before it; what it held rests for 1 s"
    assert reasons[-1].endswith(f"{held} ({rests}).")
    for passed, what in ((0.5, rests), (0.5 + MEMORY_SECONDS, "gone, its memory is not back yet")):
        box.now += passed
        box.do(ev.Tick)
        [j] = explain(box.ledger, {}, 10)
        assert j.reason.endswith(f"{held} ({what}).")
    box.now += 1.0
    box.do(ev.Tick)
    [j] = explain(box.ledger, {}, 10)
    assert j.reason.endswith("Not usable: GPU 0: its memory should be back by now.")


def test_what_is_wrong_with_gpus_that_are_held_is_said() -> None:
    box = box_of(2)
    workers = [run_on(box, "i", "a"), run_on(box, "j", "b")]
    box.submit("k", spec=GPU["c"])
    box.see(dict.fromkeys(("GPU-0", "GPU-1"), "No GPU can be used: Driver Not Loaded (NVML error 9)."))
    [k] = explain(box.ledger, {}, 10)
    assert k.reason == (
        "0 of the 2 GPUs that would do are free. "
        f"Held: GPU 0 by {workers[0]} (job i); GPU 1 by {workers[1]} (job j). "
        "Of those held: GPU 0, GPU 1: No GPU can be used: Driver Not Loaded (NVML error 9)."
    )


def test_an_evaluator_that_starts_is_waited_for_a_moment() -> None:
    box = Box(slots=0, gpus=1, evaluators=1)
    (evaluator,) = box.ledger.evaluators
    box.do(ev.EvaluatorDied, evaluator_id=evaluator, cause="x")
    box.submit("j", spec=GPU["a"])
    assert starts(box) == {"j": 0.0}


@pytest.mark.parametrize("known", [True, False])
def test_estimates_follow_one_another_on_one_gpu(known: bool) -> None:
    box = box_of(1)
    run_on(box, "j", "a")
    if known:
        box.ledger.run_seconds = 50.0
    for job_id, model in [("k", "b"), ("l", "c")]:
        box.submit(job_id, spec=GPU[model])
    assert starts(box, j=42.0) == {"k": 42.0, "l": 92.0 if known else None}
    assert starts(box) == {"k": None, "l": None}
