"""Running jobs grow onto whatever nobody else will take, and give it back."""

from __future__ import annotations

import pytest
from scheduler_box import Box, spec

from gpu_pool import events as ev
from gpu_pool.placer import PATIENCE_SECONDS

GPU = {name: spec(name, "cuda") for name in "abcd"}


def load_all(box: Box) -> None:
    for worker_id in box.ledger.loading_since.copy():
        box.load(worker_id)


@pytest.mark.parametrize("fields", [{"slot_id": "GPU-0"}, {"gpus": 4}], ids=["pinned", "large"])
def test_a_job_that_waits_for_another_to_end_keeps_nobody_from_growing(fields: dict[str, object]) -> None:
    box = Box(slots=0, gpus=4, evaluators=8)
    box.submit("long", spec=GPU["a"], priority=5)
    load_all(box)
    box.submit("waits", spec=GPU["b"], **fields)
    box.submit("grows", spec=GPU["c"], max_replicas=4)
    load_all(box)
    for _ in range(3):
        box.now += PATIENCE_SECONDS
        box.do(ev.Tick)
        load_all(box)
    assert len(box.ledger.running["grows"].workers) == 3
    assert not box.of(ev.Detach)


def test_a_job_grows_beside_a_set_that_waits_and_gives_it_back_to_one_that_fits() -> None:
    box = Box(slots=0, gpus=2, evaluators=8)
    box.submit("short", spec=GPU["a"])
    box.submit("grows", spec=GPU["b"], max_replicas=2)
    load_all(box)
    box.submit("large", spec=GPU["c"], gpus=2)
    box.end("short")
    (stop,) = box.of(ev.StopWorker)  # nobody else wants that GPU
    box.gone(stop.worker_id)
    load_all(box)
    assert len(box.ledger.running["grows"].workers) == 2
    box.submit("small", spec=GPU["d"])
    assert [detach.job_id for detach in box.of(ev.Detach)] == ["grows"]


def test_nobody_grows_onto_what_a_job_could_start_on_when_an_evaluator_is_ready_in_a_moment() -> None:
    box = Box(slots=0, gpus=2, evaluators=2)
    box.submit("grows", spec=GPU["a"], max_replicas=2, order=1.0)
    box.submit("short", spec=GPU["b"])
    load_all(box)
    (stop,) = box.of(ev.StopWorker)  # it had grown, and makes way
    box.gone(stop.worker_id)
    load_all(box)
    box.submit("next", spec=GPU["c"])
    evaluator_id = box.ledger.running["short"].evaluator_id
    assert not box.of(ev.StopWorker, box.do(ev.JobEnded, job_id="short"))
    (stop,) = box.of(ev.StopWorker, box.do(ev.EvaluatorIsReady, evaluator_id=evaluator_id))
    assert [start.spec for start in box.of(ev.StartWorker, box.gone(stop.worker_id))] == [GPU["c"]]
