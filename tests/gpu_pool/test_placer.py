"""Who gets which slots: priorities, sets of GPUs, give-backs, memory, caps, patience, and what is said of it all."""

from __future__ import annotations

import msgspec
from scheduler_box import Box, spec

from gpu_pool import events as ev
from gpu_pool.explain import explain
from gpu_pool.losses import KILLS_SECONDS, MAX_REST_SECONDS, MOST_KILLS, PATIENT_KILLS
from gpu_pool.order import AGEING_SECONDS
from gpu_pool.placer import PATIENCE_SECONDS
from gpu_pool.scheduler import MAX_FAILED_STARTS, MAX_LOSSES

GPU = {name: spec(name, "cuda") for name in "abcd"}


def box_of(gpus: int, **options: object) -> Box:
    return Box(slots=0, gpus=gpus, evaluators=6, **options)


def run_on(box: Box, job_id: str, model: str, **fields: object) -> str:
    """Submit a job that gets a new worker, and load that."""
    (start,) = box.of(ev.StartWorker, box.submit(job_id, spec=GPU[model], **fields))
    box.load(start.worker_id)
    return start.worker_id


def lose_evaluator(box: Box, **how: object) -> list[ev.Action]:
    """The evaluator of the job j ends; another one becomes ready and takes it up, if it waits."""
    actions = box.do(ev.EvaluatorDied, evaluator_id=box.ledger.running["j"].evaluator_id, cause="x", **how)
    for start in box.of(ev.StartEvaluator, actions):
        actions += box.do(ev.EvaluatorIsReady, evaluator_id=start.evaluator_id)
    return actions


def test_priority_goes_first_and_waiting_outweighs_it() -> None:
    box = box_of(1)
    run_on(box, "j", "a")
    for job_id, model, priority, order in [
        ("low", "b", 0, 10.0),
        ("high", "c", 1, 10.0 + AGEING_SECONDS - 1),
        ("late", "d", 1, 10.0 + AGEING_SECONDS + 1),
    ]:
        box.submit(job_id, spec=GPU[model], priority=priority, order=order)
    assert list(box.ledger.waiting) == ["high", "low", "late"]
    assert box.ledger.waiting.position("late") == 2


def test_a_replica_of_two_gpus_takes_both_or_none() -> None:
    box = box_of(2)
    worker = run_on(box, "j", "a")
    assert not box.of(ev.StartWorker, box.submit("k", spec=GPU["b"], gpus=2))
    box.end("j")
    actions = box.gone(worker)
    assert [action.slot_ids for action in box.of(ev.StartWorker, actions)] == [("GPU-0", "GPU-1")]


def test_mig_instances_are_not_put_together_for_one_replica() -> None:
    box = box_of(4)
    box.slots[:2] = [msgspec.structs.replace(slot, is_mig=True) for slot in box.slots[:2]]
    box.see({})
    actions = box.submit("j", spec=GPU["a"], gpus=2)
    assert [action.slot_ids for action in box.of(ev.StartWorker, actions)] == [("GPU-2", "GPU-3")]
    assert not box.of(ev.StartWorker, box.submit("k", spec=GPU["b"], gpus=2))
    assert box.of(ev.StartWorker, box.submit("l", spec=GPU["c"]))


def test_a_stream_of_small_jobs_does_not_keep_out_one_that_needs_several_gpus() -> None:
    box = box_of(2)
    run_on(box, "s0", "a")
    run_on(box, "s1", "b")
    box.submit("large", spec=GPU["c"], gpus=2)
    for n in range(2, 40):  # each starts before the one before it on the same model ends
        box.now += PATIENCE_SECONDS / 8
        box.submit(f"s{n}", spec=GPU["ab"[n % 2]])
        if f"s{n - 2}" in box.ledger.running:
            box.end(f"s{n - 2}")
        for stop in box.of(ev.StopWorker):
            if stop.worker_id in box.ledger.workers:
                box.gone(stop.worker_id)
    assert "large" in box.ledger.running


def test_a_job_with_several_replicas_gives_one_back_at_a_chunk_boundary() -> None:
    box = box_of(2)
    box.submit("j", spec=GPU["a"], max_replicas=2)
    for start in box.of(ev.StartWorker):
        box.load(start.worker_id)
    (detach,) = box.of(ev.Detach, box.submit("k", spec=GPU["b"]))
    assert (detach.job_id, detach.at_once) == ("j", False)
    assert not box.of(ev.Detach, box.do(ev.Tick))
    (stop,) = box.of(ev.StopWorker, box.do(ev.WorkerGivenBack, job_id="j", worker_id=detach.worker_id))
    assert box.of(ev.StartWorker, box.gone(stop.worker_id))[0].spec == GPU["b"]
    assert len(box.ledger.running["j"].workers) == 1


def test_jobs_that_would_only_share_a_replica_leave_the_evaluators_to_jobs_that_get_a_gpu() -> None:
    box = Box(slots=0, gpus=2, evaluators=3)
    worker = run_on(box, "j", "a")
    run_on(box, "k", "b")
    for job_id, model in [("l", "b"), ("m", "b"), ("n", "c")]:  # l has the last evaluator
        box.submit(job_id, spec=GPU[model])
    box.end("j")
    assert list(box.ledger.waiting) == ["m", "n"]
    assert box.of(ev.StartWorker, box.gone(worker))[0].spec == GPU["c"]
    assert list(box.ledger.waiting) == ["m"]


def test_small_models_share_a_gpu_within_its_memory_where_that_is_allowed() -> None:
    for most, expected in [(1, 1), (2, 2), (3, 2)]:
        box = box_of(1, max_workers_per_gpu=most)
        for model in "abc":
            box.submit(model, spec=GPU[model], memory_bytes=35)  # of 80
        assert len(box.of(ev.StartWorker)) == expected


def test_a_job_that_fits_is_not_held_up_by_one_that_needs_a_little_more() -> None:
    box = box_of(1, max_workers_per_gpu=2)
    run_on(box, "j", "a", memory_bytes=35)  # of 80
    assert not box.of(ev.StartWorker, box.submit("large", spec=GPU["b"], memory_bytes=46))
    assert box.of(ev.StartWorker, box.submit("small", spec=GPU["c"], memory_bytes=45))
    assert list(box.ledger.waiting) == ["large"]


def test_a_job_whose_memory_is_not_known_does_not_hold_up_one_that_fits_beside_another() -> None:
    box = box_of(1, max_workers_per_gpu=2)
    run_on(box, "j", "a", memory_bytes=35)
    assert not box.of(ev.StartWorker, box.submit("unknown", spec=GPU["b"]))
    assert box.of(ev.StartWorker, box.submit("small", spec=GPU["c"], memory_bytes=45))


def test_a_refusal_names_the_gpu_once() -> None:
    box = box_of(1)
    (start,) = box.of(ev.StartWorker, box.submit("j", spec=GPU["a"]))
    box.do(ev.LeaseRefused, worker_id=start.worker_id, reason="GPU 0: Other processes use it: 7 (1.0 GiB).")
    [wait] = explain(box.ledger, {}, 10)
    assert wait.reason.endswith("Not usable: GPU 0: Other processes use it: 7 (1.0 GiB).")


def test_a_gpu_that_is_refused_beside_others_is_not_asked_for_again_before_the_next_look() -> None:
    box = box_of(1, max_workers_per_gpu=2)
    worker = run_on(box, "j", "a", memory_bytes=35)
    refused = {"reason": "GPU 0: too much is in use."}
    (start,) = box.of(ev.StartWorker, box.submit("k", spec=GPU["b"], memory_bytes=35))
    assert box.do(ev.LeaseRefused, worker_id=start.worker_id, **refused) == []
    assert box.do(ev.Tick) == []
    [wait] = explain(box.ledger, {}, 10)
    assert wait.reason == (
        f"It has no workers now. The only GPU that would do is not free. Held: GPU 0 by {worker} (job j). "
        "Refused beside them: GPU 0: too much is in use."
    )
    (start,) = box.of(ev.StartWorker, box.see({"GPU-0": "Only 10 of 80 are free."}))
    box.do(ev.LeaseRefused, worker_id=start.worker_id, **refused)
    (stop,) = box.of(ev.StopWorker, box.end("j"))  # without a job it makes way
    assert stop.worker_id == worker
    box.do(ev.WorkerDied, worker_id=worker, cause="stopped")
    assert box.of(ev.StartWorker, box.see({}))


def test_a_model_whose_memory_is_not_known_shares_nothing() -> None:
    box = box_of(1, max_workers_per_gpu=2)
    box.submit("j", spec=GPU["a"], memory_bytes=1)
    assert not box.of(ev.StartWorker, box.submit("k", spec=GPU["b"]))


def test_no_more_gpus_are_held_than_allowed_and_unused_ones_make_way() -> None:
    box = box_of(3, max_gpus=1)
    worker = run_on(box, "j", "a", max_replicas=3)
    assert len(box.ledger.workers) == 1
    box.end("j")
    (stop,) = box.of(ev.StopWorker, box.submit("k", spec=GPU["b"], slot_id="GPU-2"))
    assert stop.worker_id == worker
    assert box.of(ev.StartWorker, box.gone(worker))[0].slot_ids == ("GPU-2",)


def test_a_job_that_runs_too_long_fails_and_its_worker_stays() -> None:
    box = box_of(1)
    worker = run_on(box, "j", "a", timeout_s=10.0)
    box.now += 10.0
    assert not box.do(ev.Tick)
    box.now += 1.0
    kill, drop = box.do(ev.Tick)
    assert isinstance(drop, ev.DropJob)
    box.do(ev.WorkerDroppedJob, worker_id=worker, job_id="j")
    settle = box.do(ev.EvaluatorDied, evaluator_id=kill.evaluator_id, cause="killed")[0]
    assert (settle.outcome, settle.error) == ("failed", "it ran for longer than its timeout_s of 10 s")
    assert worker in box.ledger.workers


def test_time_without_a_worker_is_not_counted_as_run() -> None:
    box = box_of(1)
    worker = run_on(box, "j", "a", timeout_s=10.0)
    box.do(ev.WorkerDied, worker_id=worker, cause="x")
    box.now += 100.0
    assert not box.do(ev.Tick)


def test_a_lost_evaluator_gives_a_job_no_more_time() -> None:
    box = box_of(1)
    run_on(box, "j", "a", timeout_s=10.0)
    box.now += 6.0
    lose_evaluator(box)
    box.now += 4.0
    assert not box.do(ev.Tick)
    box.now += 1.0
    assert box.of(ev.KillEvaluator, box.do(ev.Tick))
    assert box.ledger.ending["j"].error == "it ran for longer than its timeout_s of 10 s"


def test_a_model_that_is_overwritten_gives_a_job_no_more_time() -> None:
    box = box_of(2)
    run_on(box, "j", "a", timeout_s=10.0)
    box.now += 6.0
    (refresh,) = box.of(ev.RefreshModel, box.do(ev.JobEnded, job_id="j", content_changed=True))
    assert refresh.ran_s == 6.0
    (start,) = box.of(ev.StartWorker, box.submit("j", spec=GPU["b"], timeout_s=10.0, ran_s=refresh.ran_s))
    box.now += 3.0
    changed = box.do(ev.WorkerLoadFailed, worker_id=start.worker_id, error="changed", content_changed=True)
    assert [refresh.ran_s for refresh in box.of(ev.RefreshModel, changed)] == [9.0]


def test_retries_are_the_job_s_own_where_it_says_so() -> None:
    box = box_of(1)
    run_on(box, "j", "a", max_retries=0)
    actions = box.do(ev.EvaluatorDied, evaluator_id=box.ledger.running["j"].evaluator_id, cause="killed")
    assert box.of(ev.SettleJob, actions)[0].error == "the evaluator process ended: killed (once)"


def test_kills_are_not_held_against_a_job_unless_there_is_no_end_of_them() -> None:
    box = box_of(1)
    run_on(box, "j", "a")
    for _ in range(2 * MOST_KILLS):  # within ten minutes
        box.now += 10.0
        assert box.of(ev.RequeueJob, lose_evaluator(box, from_outside=True))
    box.do(ev.JobProgressed, job_id="j", done=1)
    box.now += KILLS_SECONDS
    for _ in range(MOST_KILLS - 1):
        assert box.of(ev.RequeueJob, lose_evaluator(box, from_outside=True))
    box.now += KILLS_SECONDS
    (settle,) = box.of(ev.SettleJob, lose_evaluator(box, from_outside=True))
    assert settle.error == f"the evaluator process ended: x ({3 * MOST_KILLS} times)"


def test_an_attempt_that_gets_further_than_ever_is_the_first_of_a_new_count() -> None:
    box = box_of(1)
    run_on(box, "j", "a")
    for done in (5, 5, 6, 2):  # by default there are three attempts
        box.do(ev.JobProgressed, job_id="j", done=done)
        assert box.of(ev.RequeueJob, lose_evaluator(box))
    box.do(ev.JobProgressed, job_id="j", done=6)
    assert box.of(ev.SettleJob, lose_evaluator(box))


def test_a_limit_of_the_job_s_own_counts_all_that_is_lost() -> None:
    box = box_of(1)
    run_on(box, "j", "a", max_retries=2)
    for done in (1, 2):
        box.do(ev.JobProgressed, job_id="j", done=done)
        assert box.of(ev.RequeueJob, lose_evaluator(box, from_outside=True))
    box.do(ev.JobProgressed, job_id="j", done=3)
    assert box.of(ev.SettleJob, lose_evaluator(box, from_outside=True))


def test_workers_that_are_killed_while_they_load_say_nothing_of_the_model() -> None:
    box = box_of(1)
    (start,) = box.of(ev.StartWorker, box.submit("j", spec=GPU["a"]))
    rests: list[float] = []
    for _ in range(100):  # within ten minutes
        box.now += 6.0
        died = box.do(ev.WorkerDied, worker_id=start.worker_id, cause="killed by SIGKILL", from_outside=True)
        rests += [reclaim.rest_s for reclaim in box.of(ev.ReclaimSlots, died)]
        (start,) = box.of(ev.StartWorker, box.do(ev.SlotsReturned, worker_id=start.worker_id))
    assert rests[: PATIENT_KILLS + 4] == [0.0] * (PATIENT_KILLS - 1) + [1.0, 2.0, 4.0, 8.0, 16.0]
    assert set(rests[PATIENT_KILLS + 4 :]) == {MAX_REST_SECONDS}
    assert box.ledger.running["j"].may_grow
    box.now += KILLS_SECONDS
    box.do(ev.WorkerDied, worker_id=start.worker_id, cause="killed by SIGKILL", from_outside=True)
    error = box.ledger.ending["j"].error or ""
    assert error.startswith("its worker processes were killed 101 times in 4194 s without progress in between")


def test_workers_that_die_while_they_load_are_counted_and_those_under_progress_are_not() -> None:
    box = box_of(1)
    (start,) = box.of(ev.StartWorker, box.submit("j", spec=GPU["a"]))
    for _ in range(2 * MAX_LOSSES):
        box.load(start.worker_id)
        box.do(ev.JobProgressed, job_id="j", done=1)
        (start,) = box.of(ev.StartWorker, box.gone(start.worker_id))
    for _ in range(MAX_FAILED_STARTS - 1):
        (start,) = box.of(ev.StartWorker, box.gone(start.worker_id))
    assert "j" in box.ledger.running
    box.gone(start.worker_id)
    assert box.ledger.ending["j"].outcome == "failed"


def test_a_job_that_may_have_many_attempts_may_lose_as_many_workers_that_load() -> None:
    box = box_of(1)
    (start,) = box.of(ev.StartWorker, box.submit("j", spec=GPU["a"], max_retries=2 * MAX_FAILED_STARTS))
    for _ in range(2 * MAX_FAILED_STARTS):
        (start,) = box.of(ev.StartWorker, box.gone(start.worker_id))
    box.gone(start.worker_id)
    assert box.ledger.ending["j"].outcome == "failed"


def test_a_job_whose_workers_die_without_any_progress_ends() -> None:
    box = box_of(1)
    (start,) = box.of(ev.StartWorker, box.submit("j", spec=GPU["a"]))
    for _ in range(MAX_LOSSES - 1):
        box.load(start.worker_id)
        (start,) = box.of(ev.StartWorker, box.gone(start.worker_id))
    box.load(start.worker_id)
    box.gone(start.worker_id)
    assert "without progress" in (box.ledger.ending["j"].error or "")


def test_workers_on_a_lost_gpu_are_killed_once_and_their_jobs_go_elsewhere() -> None:
    box = box_of(2)
    worker = run_on(box, "j", "a")
    actions = box.see({"GPU-0": "it is lost"}, lost=frozenset({"GPU-0"}))
    assert [action.worker_id for action in box.of(ev.KillWorker, actions)] == [worker]
    assert box.of(ev.StartWorker, actions)[0].slot_ids == ("GPU-1",)
    assert not box.of(ev.KillWorker, box.see({"GPU-0": "it is lost"}, lost=frozenset({"GPU-0"})))


def test_unused_workers_end_when_others_want_their_gpu_or_after_a_time() -> None:
    box = box_of(2, idle_worker_s=60.0)
    first, second = run_on(box, "j", "a"), run_on(box, "k", "b")
    box.end("j")
    box.end("k")
    (stop,) = box.see({"GPU-0": "process 77 uses it"}, contested=frozenset({"GPU-0"}))
    assert stop.worker_id == first
    box.now += 61.0
    (stop,) = box.do(ev.Tick)
    assert stop.worker_id == second


def test_a_waiting_job_is_told_why_and_until_when() -> None:
    box = box_of(2)
    worker = run_on(box, "j", "a")
    box.see({"GPU-1": "process 77 uses it"})
    box.submit("k", spec=GPU["b"])
    (wait,) = explain(box.ledger, {"j": 42.0}, 10)
    assert (wait.job_id, wait.needs, wait.starts_in) == ("k", "1 GPU", 42.0)
    assert wait.reason == (
        f"0 of the 2 GPUs that would do are free. Held: GPU 0 by {worker} (job j, about 42 s left). "
        "Not usable: GPU 1: process 77 uses it."
    )
