"""Jobs that pause for a set of GPUs, and get workers again."""

from __future__ import annotations

from scheduler_box import Box, spec

from gpu_pool import events as ev
from gpu_pool.explain import explain
from gpu_pool.order import AGEING_SECONDS
from gpu_pool.placer import PATIENCE_SECONDS
from gpu_pool.records import EvaluatorState

GPU = {name: spec(name, "cuda") for name in "abcde"}


def box_with_small_jobs(gpus: int, evaluators: int) -> tuple[Box, list[str]]:
    """A loaded worker with one job on each GPU: jobs a, b, …; and the workers in that order."""
    box = Box(slots=0, gpus=gpus, evaluators=evaluators)
    for name in "abcde"[:gpus]:
        box.submit(name, spec=GPU[name])
    workers = [start.worker_id for start in box.of(ev.StartWorker)]
    for worker_id in workers:
        box.load(worker_id)
    return box, workers


def later(box: Box, seconds: float) -> list[ev.Action]:
    box.now += seconds
    return box.do(ev.Tick)


def give_back(box: Box, detach: ev.Detach) -> list[ev.Action]:
    """The job leaves its worker, which was asked to end by then and does."""
    actions = box.do(ev.WorkerGivenBack, job_id=detach.job_id, worker_id=detach.worker_id)
    return actions + box.gone(detach.worker_id)


def test_as_soon_as_a_gpu_of_a_set_is_idle_jobs_on_the_others_pause_and_go_on_afterwards() -> None:
    box, workers = box_with_small_jobs(2, evaluators=4)
    box.submit("large", spec=GPU["e"], gpus=2)
    assert not box.of(ev.Detach, later(box, PATIENCE_SECONDS))  # both GPUs compute: nothing is idle
    box.end("a")
    (detach,) = box.of(ev.Detach)
    assert (detach.job_id, detach.worker_id, detach.at_once) == ("b", workers[1], False)
    box.gone(workers[0])
    (start,) = box.of(ev.StartWorker, give_back(box, detach))
    assert start.spec == GPU["e"]
    assert not box.ledger.running["b"].workers
    box.load(start.worker_id)
    box.end("large")
    (again,) = box.of(ev.StartWorker, box.gone(start.worker_id))
    assert again.spec == GPU["b"]
    assert box.ledger.running["b"].workers == [again.worker_id]


def test_a_job_that_has_paused_is_left_alone_until_it_has_worked_for_a_while() -> None:
    box, workers = box_with_small_jobs(2, evaluators=6)
    box.submit("large", spec=GPU["e"], gpus=2)
    later(box, PATIENCE_SECONDS)
    box.end("a")
    box.gone(workers[0])
    (start,) = box.of(ev.StartWorker, give_back(box, box.of(ev.Detach)[0]))
    box.load(start.worker_id)
    box.submit("c", spec=GPU["c"])
    box.submit("larger", spec=GPU["d"], gpus=2)
    box.end("large")
    for new in box.of(ev.StartWorker, box.gone(start.worker_id)):  # b goes on, c begins
        box.load(new.worker_id)
    seen = len(box.log)
    later(box, PATIENCE_SECONDS - 1)
    box.end("c")
    assert not box.of(ev.Detach, box.log[seen:])
    later(box, 1)
    assert [detach.job_id for detach in box.of(ev.Detach, box.log[seen:])] == ["b"]


def test_no_job_pauses_for_one_that_no_evaluator_is_ready_for() -> None:
    box, workers = box_with_small_jobs(3, evaluators=4)
    box.submit("large", spec=GPU["e"], gpus=3)
    box.submit("d", spec=GPU["b"])  # has the last evaluator, and shares the replica of b
    later(box, PATIENCE_SECONDS)
    evaluator_id = box.ledger.running["a"].evaluator_id
    assert not box.of(ev.Detach, box.do(ev.JobEnded, job_id="a"))
    actions = box.do(ev.EvaluatorIsReady, evaluator_id=evaluator_id)
    assert {detach.job_id for detach in box.of(ev.Detach, actions)} == {"b", "c", "d"}
    assert [stop.worker_id for stop in box.of(ev.StopWorker, actions)] == [workers[0]]


def test_paused_jobs_on_one_model_share_what_the_first_of_them_gets() -> None:
    box = Box(slots=0, gpus=3, evaluators=6)
    for job_id, model in [("j", "a"), ("k", "a"), ("l", "b"), ("m", "c")]:
        box.submit(job_id, spec=GPU[model])
        box.load(box.of(ev.StartWorker)[-1].worker_id)
    workers = [worker.id for worker in box.ledger.workers.values()]
    box.submit("large", spec=GPU["e"], gpus=3)
    later(box, PATIENCE_SECONDS)
    box.end("m")
    box.gone(workers[2])
    for detach in box.of(ev.Detach):
        box.do(ev.WorkerGivenBack, job_id=detach.job_id, worker_id=detach.worker_id)
    starts = [action for worker_id in workers[:2] for action in box.of(ev.StartWorker, box.gone(worker_id))]
    box.load(starts[0].worker_id)
    box.end("large")
    resumed = box.of(ev.StartWorker, box.gone(starts[0].worker_id))
    assert {start.spec.replica_key for start in resumed} == {GPU["a"].replica_key, GPU["b"].replica_key}
    assert box.ledger.running["j"].workers[0] == box.ledger.running["k"].workers[0]


def test_a_paused_job_leaves_an_unused_replica_to_jobs_on_its_model_while_patience_lasts() -> None:
    box, workers = box_with_small_jobs(2, evaluators=3)
    box.submit("large", spec=GPU["e"], gpus=2)
    later(box, PATIENCE_SECONDS)
    box.end("a")
    box.gone(workers[0])
    (start,) = box.of(ev.StartWorker, give_back(box, box.of(ev.Detach)[0]))
    box.load(start.worker_id)
    (ready,) = box.ledger.evaluators_that_are(EvaluatorState.READY)
    box.do(ev.EvaluatorDied, evaluator_id=ready, cause="x")
    box.submit("large too", spec=GPU["e"], gpus=2)
    assert not box.of(ev.StopWorker, box.do(ev.JobEnded, job_id="large"))
    assert [(wait.job_id, wait.starts_in) for wait in explain(box.ledger, {}, 1)] == [
        ("b", None),
        ("large too", 0.0),
    ]
    box.now += PATIENCE_SECONDS
    assert [stop.worker_id for stop in box.of(ev.StopWorker, box.do(ev.Tick))] == [start.worker_id]


def test_loading_again_counts_neither_as_work_before_the_next_pause_nor_as_run() -> None:
    box, workers = box_with_small_jobs(2, evaluators=6)
    box.end("a")
    box.gone(workers[0])
    box.submit("timed", spec=GPU["a"], timeout_s=1.5 * PATIENCE_SECONDS)
    (start,) = box.of(ev.StartWorker)[2:]
    box.load(start.worker_id)
    box.submit("large", spec=GPU["e"], gpus=2)
    later(box, PATIENCE_SECONDS)
    box.end("b")
    detach = box.of(ev.Detach)[-1]
    assert detach.job_id == "timed"
    box.gone(workers[1])
    (large,) = box.of(ev.StartWorker, give_back(box, detach))
    box.load(large.worker_id)
    box.end("large")
    (again,) = box.of(ev.StartWorker, box.gone(large.worker_id))
    box.submit("larger", spec=GPU["d"], gpus=2)
    assert not box.of(ev.Detach, later(box, 2 * PATIENCE_SECONDS))  # for so long it loads
    box.load(again.worker_id)
    assert "timed" in box.ledger.running
    later(box, 0.4 * PATIENCE_SECONDS)
    assert "timed" in box.ledger.running
    later(box, 0.2 * PATIENCE_SECONDS)
    assert "timed" not in box.ledger.running


def test_two_sets_that_do_not_fit_together_take_turns_and_do_not_thrash() -> None:
    box = Box(slots=0, gpus=3, evaluators=6)
    box.submit("a", spec=GPU["a"], gpus=2)
    box.load(box.of(ev.StartWorker)[0].worker_id)
    box.submit("b", spec=GPU["b"], gpus=2)
    for _ in range(10):
        later(box, PATIENCE_SECONDS)
    assert not box.of(ev.Detach)  # the end of a makes room, a pause would gain nothing
    box.end("a")
    (start,) = box.of(ev.StartWorker, box.gone(box.of(ev.StopWorker)[0].worker_id))
    assert start.spec == GPU["b"]


def test_nobody_pauses_for_slots_that_cannot_be_used() -> None:
    box, workers = box_with_small_jobs(2, evaluators=6)
    box.submit("large", spec=GPU["e"], gpus=2)
    later(box, PATIENCE_SECONDS)
    box.see({"GPU-1": "a stranger computes there"})
    box.end("a")
    box.gone(workers[0])
    later(box, PATIENCE_SECONDS)
    assert not box.of(ev.Detach)
    box.see({})
    assert [detach.job_id for detach in box.of(ev.Detach)] == ["b"]


def test_the_least_important_job_pauses() -> None:
    box = Box(slots=0, gpus=3, evaluators=5)
    for job_id, model, priority in [("important", "a", 1), ("usual", "b", 0), ("short", "c", 0)]:
        box.submit(job_id, spec=GPU[model], priority=priority)
        box.load(box.of(ev.StartWorker)[-1].worker_id)
    box.submit("large", spec=GPU["e"], gpus=2, priority=1)
    later(box, PATIENCE_SECONDS)
    box.end("short")
    assert [detach.job_id for detach in box.of(ev.Detach)] == ["usual"]


def test_a_more_important_job_does_not_pause_until_waiting_outweighs_it() -> None:
    box = Box(slots=0, gpus=2, evaluators=5)
    for job_id, model, priority in [("short", "a", 0), ("important", "b", 1)]:
        box.submit(job_id, spec=GPU[model], priority=priority)
        box.load(box.of(ev.StartWorker)[-1].worker_id)
    box.submit("large", spec=GPU["e"], gpus=2)
    later(box, PATIENCE_SECONDS)
    box.end("short")
    assert not box.of(ev.Detach, later(box, AGEING_SECONDS - PATIENCE_SECONDS - 1))
    assert [detach.job_id for detach in box.of(ev.Detach, later(box, 1))] == ["important"]


def test_rather_a_job_pauses_whose_model_can_be_loaded_again() -> None:
    box, _ = box_with_small_jobs(3, evaluators=5)
    box.do(ev.ModelsSeen, changed=frozenset({GPU["a"].replica_key}))
    box.submit("large", spec=GPU["d"], gpus=2)
    later(box, PATIENCE_SECONDS)
    box.end("c")
    assert [detach.job_id for detach in box.of(ev.Detach)] == ["b"]


def box_with_a_job_that_cannot_pause() -> tuple[Box, list[str]]:
    """Jobs a, b and c on three GPUs, for which a large job has waited with patience; the model of b has changed."""
    box, workers = box_with_small_jobs(3, evaluators=8)
    box.do(ev.ModelsSeen, changed=frozenset({GPU["b"].replica_key}))
    box.submit("large", spec=GPU["e"], gpus=3)
    later(box, PATIENCE_SECONDS)
    return box, workers


def test_while_a_job_runs_whose_model_could_not_be_loaded_again_others_use_what_is_idle_and_then_make_way() -> None:
    box, workers = box_with_a_job_that_cannot_pause()
    box.end("a")
    (start,) = box.of(ev.StartWorker, [*box.submit("d", spec=GPU["d"]), *box.gone(workers[0])])
    assert start.spec == GPU["d"]
    box.load(start.worker_id)
    box.submit("b too", spec=GPU["b"])
    later(box, 10 * PATIENCE_SECONDS)
    assert "b too" in box.ledger.waiting  # nobody joins those who cannot pause
    assert not box.of(ev.Detach)
    box.end("b")
    assert {detach.job_id for detach in box.of(ev.Detach)} == {"c", "d"}


def test_jobs_that_cannot_pause_either_by_then_are_waited_for_with_the_slots_held() -> None:
    box, workers = box_with_a_job_that_cannot_pause()
    box.do(ev.ModelsSeen, changed=frozenset({GPU["b"].replica_key, GPU["c"].replica_key}))
    box.end("b")
    box.gone(workers[1])
    later(box, PATIENCE_SECONDS)
    assert not box.of(ev.StartWorker, box.submit("d", spec=GPU["d"]))  # else there might be no end of it
    box.end("c")
    assert {detach.job_id for detach in box.of(ev.Detach)} == {"a"}


def pause(box: Box, workers: list[str]) -> str:
    """Let job b pause for a large one on two GPUs, and that one end; the worker that b gets then."""
    box.submit("large", spec=GPU["e"], gpus=2)
    later(box, PATIENCE_SECONDS)
    box.end("a")
    box.gone(workers[0])
    (start,) = box.of(ev.StartWorker, give_back(box, box.of(ev.Detach)[0]))
    box.load(start.worker_id)
    [paused] = [wait for wait in explain(box.ledger, {}, 10) if wait.job_id == "b"]
    assert paused.reason.startswith("It has paused for job large. 0 of the 2 GPUs")
    box.end("large")
    (again,) = box.of(ev.StartWorker, box.gone(start.worker_id))
    assert again.spec == GPU["b"]
    return again.worker_id


def test_a_job_whose_model_vanishes_while_it_pauses_fails_and_says_so() -> None:
    box, workers = box_with_small_jobs(2, evaluators=4)
    again = pause(box, workers)
    box.do(ev.WorkerLoadFailed, worker_id=again, error="/b cannot be served: it is not there")
    assert box.ledger.ending["b"].error == "it had paused for job large, and then /b cannot be served: it is not there"


def test_a_job_whose_model_is_overwritten_while_it_pauses_begins_anew_and_says_so() -> None:
    box, workers = box_with_small_jobs(2, evaluators=4)
    again = pause(box, workers)
    actions = box.do(ev.WorkerLoadFailed, worker_id=again, error="changed", content_changed=True)
    (refresh,) = box.of(ev.RefreshModel, actions)
    assert (refresh.job_id, refresh.cause) == ("b", "the model's files changed while it paused for job large")
    assert "b" not in box.ledger.running
