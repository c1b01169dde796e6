"""Events in, actions out: no process, loop or clock. Invariants are checked after every step."""

from __future__ import annotations

import msgspec
from scheduler_box import Box, spec

from gpu_pool import events as ev
from gpu_pool.ledger import LOADS_REMEMBERED, MEMORY_SECONDS
from gpu_pool.records import ModelArgs, ModelSpec, WorkerState


def test_a_job_starts_at_once_and_gets_its_worker_when_it_is_loaded() -> None:
    box = Box()
    actions = box.submit("j")
    (start,) = box.of(ev.StartJob, actions)
    (worker,) = box.of(ev.StartWorker, actions)
    assert not box.of(ev.Attach)
    (attach,) = box.of(ev.Attach, box.load(worker.worker_id))
    assert (attach.job_id, attach.evaluator_id, attach.worker_id) == ("j", start.evaluator_id, worker.worker_id)
    (conclude,) = box.of(ev.ConcludeJob, box.end("j"))
    assert conclude.job_id == "j"
    assert box.ledger.workers[worker.worker_id].state is WorkerState.IDLE


def test_the_next_job_on_the_same_content_reuses_the_loaded_replica() -> None:
    box = Box()
    box.submit("j")
    box.load("worker-4")
    box.end("j")
    actions = box.submit("k")
    assert [type(action) for action in actions] == [ev.StartJob, ev.Attach]


def test_other_content_at_the_same_path_is_another_model() -> None:
    box = Box()
    box.submit("j")
    box.load("worker-4")
    box.end("j")
    changed = ModelSpec(kind="hf", args=ModelArgs(pretrained="a"), fingerprint="new content")
    assert box.of(ev.StartWorker, box.submit("k", spec=changed))


def test_jobs_beyond_the_slots_share_a_replica_rather_than_wait() -> None:
    box = Box(slots=1)
    box.submit("j")
    box.load("worker-4")
    (attach,) = box.of(ev.Attach, box.submit("k"))
    assert attach.worker_id == "worker-4"


def test_a_job_that_shares_for_longer_than_loading_takes_moves_to_a_slot_of_its_own() -> None:
    box = Box(slots=2)
    box.submit("j")
    box.now = 4.0
    box.load("worker-4")  # loading takes 4 seconds
    box.submit("k")
    assert len(box.of(ev.StartWorker)) == 1
    box.now += 3.0
    box.do(ev.Tick)
    assert len(box.of(ev.StartWorker)) == 1
    box.now += 2.0
    box.do(ev.Tick)
    assert len(box.of(ev.StartWorker)) == 2
    actions = box.load(box.of(ev.StartWorker)[1].worker_id)
    attach, detach = actions
    assert isinstance(attach, ev.Attach)
    assert isinstance(detach, ev.Detach)
    assert not detach.at_once
    assert len(box.ledger.workers[detach.worker_id].jobs) == 2, "what it was asked is not answered yet"
    assert not box.of(ev.StopWorker, box.submit("l", "b"))
    assert not box.of(ev.Detach, box.do(ev.Tick))
    box.do(ev.WorkerGivenBack, job_id=detach.job_id, worker_id=detach.worker_id)
    assert sorted(len(worker.jobs) for worker in box.ledger.workers.values()) == [1, 1]


def test_of_equally_used_replicas_a_job_takes_the_oldest() -> None:
    box = Box(slots=12, evaluators=4)
    box.submit("j", max_replicas=12)
    workers = list(box.ledger.workers)
    assert workers != sorted(workers), "the order of their ids as texts is another one"
    for worker_id in workers:
        box.load(worker_id)
    box.end("j")
    assert [attach.worker_id for job in "kl" for attach in box.of(ev.Attach, box.submit(job))] == workers[:2]


def test_of_equally_shared_workers_beyond_its_cap_a_job_gives_the_latest_back() -> None:
    box = Box(slots=12, evaluators=2)
    box.submit("j", max_replicas=12)
    workers = list(box.ledger.workers)
    for worker_id in workers:
        box.load(worker_id)
    run = box.ledger.running["j"]
    run.demand = msgspec.structs.replace(run.demand, max_replicas=10)
    box.scheduler._moves.trim(run)
    box.scheduler._moves.trim(run)
    assert [detach.worker_id for detach in box.scheduler._moves.asked()] == [workers[-1], workers[-2]]


def test_a_job_grows_to_its_cap_and_no_further() -> None:
    box = Box(slots=3)
    assert len(box.of(ev.StartWorker, box.submit("j", max_replicas=2))) == 2
    for worker in list(box.ledger.workers):
        box.load(worker)
    assert len(box.ledger.running["j"].workers) == 2


def test_a_job_does_not_grow_while_another_waits_for_a_slot() -> None:
    box = Box(slots=2)
    box.submit("j", "a")
    box.submit("k", "b")
    box.load("worker-4")
    box.load("worker-5")
    box.submit("l", "c")  # waits: both slots are busy
    box.submit("m", "a", max_replicas=2)
    actions = box.end("k")  # evicts b for l
    assert [action.worker_id for action in box.of(ev.StopWorker, actions)] == ["worker-5"]
    box.do(ev.WorkerDied, worker_id="worker-5", cause="")
    actions = box.do(ev.SlotsReturned, worker_id="worker-5")
    assert [action.spec.fingerprint for action in box.of(ev.StartWorker, actions)] == ["c"]


def test_a_waiting_job_evicts_the_longest_idle_replica_of_another_model_only_once() -> None:
    box = Box(slots=2)
    for at, job, model, worker in [(0, "j", "a", "worker-4"), (1, "k", "b", "worker-5")]:
        box.now = at
        box.submit(job, model)
        box.load(worker)
    box.end("j")
    box.now = 2
    box.end("k")
    (stop,) = box.of(ev.StopWorker, box.submit("l", "c"))
    assert stop.worker_id == "worker-4"
    assert not box.of(ev.StopWorker, box.do(ev.Tick))


def test_cancelling_a_waiting_job_settles_it_at_once() -> None:
    box = Box(evaluators=1)
    box.submit("j")
    box.submit("k")
    (settle,) = box.do(ev.CancelRequested, job_id="k")
    assert (settle.job_id, settle.outcome) == ("k", "cancelled")


def test_a_running_job_is_cancelled_when_its_evaluator_is_gone_and_its_worker_let_go() -> None:
    box = Box()
    box.submit("j")
    box.load("worker-4")
    actions = box.do(ev.CancelRequested, job_id="j")
    assert [type(action) for action in actions] == [ev.BeginCancel, ev.KillEvaluator, ev.DropJob]
    evaluator = box.of(ev.KillEvaluator)[0].evaluator_id
    assert not box.of(ev.SettleJob, box.do(ev.WorkerDroppedJob, worker_id="worker-4", job_id="j"))
    actions = box.do(ev.EvaluatorDied, evaluator_id=evaluator, cause="killed")
    assert [type(action) for action in actions] == [ev.SettleJob, ev.StartEvaluator]
    assert box.ledger.workers["worker-4"].state is WorkerState.IDLE


def test_what_an_evaluator_said_before_it_was_killed_gets_it_no_further_job() -> None:
    box = Box(evaluators=1)
    box.submit("j")
    box.load("worker-2")
    box.submit("k")
    (kill,) = box.of(ev.KillEvaluator, box.do(ev.CancelRequested, job_id="j"))
    assert not box.of(ev.StartJob, box.do(ev.EvaluatorIsReady, evaluator_id=kill.evaluator_id))
    (successor,) = box.of(ev.StartEvaluator, box.do(ev.EvaluatorDied, evaluator_id=kill.evaluator_id, cause="killed"))
    (start,) = box.of(ev.StartJob, box.do(ev.EvaluatorIsReady, evaluator_id=successor.evaluator_id))
    assert start.job_id == "k"
    assert not box.of(ev.RequeueJob)


def test_jobs_are_told_of_each_worker_that_they_lose() -> None:
    def losses(actions: list[ev.Action]) -> list[tuple[str, str]]:
        return [(note.job_id, note.cause) for note in box.of(ev.NoteLoss, actions)]

    box = Box(slots=0, gpus=2, evaluators=2)
    box.submit("j", spec=spec("a", "cuda"))
    box.submit("k", spec=spec("a", "cuda"))
    first, second = (start.worker_id for start in box.of(ev.StartWorker))
    assert losses(box.do(ev.WorkerDied, worker_id=second, cause="killed by SIGSEGV")) == [
        ("k", f"{second} ended while it loaded the model: killed by SIGSEGV")
    ]
    box.load(first)
    assert losses(box.do(ev.WorkerDied, worker_id=first, cause="killed by SIGKILL")) == [
        ("j", f"{first} ended: killed by SIGKILL"),
        ("k", f"{first} ended: killed by SIGKILL"),
    ]
    box.do(ev.SlotsReturned, worker_id=second)
    third = box.of(ev.StartWorker)[-1].worker_id
    assert losses(box.see({"GPU-1": "NVML cannot read it."}, lost=frozenset({"GPU-1"}))) == [
        (job_id, f"{third} was on GPU 1, which is lost: NVML cannot read it") for job_id in "jk"
    ]
    assert not losses(box.do(ev.WorkerDied, worker_id=third, cause="killed by SIGKILL"))
    box.do(ev.SlotsReturned, worker_id=first)
    fourth = box.of(ev.StartWorker)[-1].worker_id
    box.load(fourth)
    box.end("j")
    box.end("k")
    assert not losses(box.do(ev.WorkerDied, worker_id=fourth, cause="killed by SIGKILL"))


def test_a_worker_that_fails_to_load_is_lost_to_a_job_that_goes_on() -> None:
    box = Box()
    box.submit("j")
    box.load("worker-4")
    box.submit("k", "b")
    actions = box.do(ev.WorkerLoadFailed, worker_id="worker-5", error="no room", crowded=True)
    assert [note.cause for note in box.of(ev.NoteLoss, actions)] == ["worker-5 did not load the model: no room"]
    box.gone("worker-5")
    actions = box.do(ev.WorkerLoadFailed, worker_id="worker-6", error="no such file")
    assert not box.of(ev.NoteLoss, actions)  # the job's end says why
    assert box.ledger.ending["k"].error == "no such file"


def test_a_worker_is_at_rest_when_it_has_no_job_and_has_let_go_of_the_last() -> None:
    box = Box()
    box.submit("j")
    box.now = 4.0
    assert not box.ledger.at_rest("worker-4", 4.0)
    box.load("worker-4")
    assert not box.ledger.at_rest("worker-4", 4.0)
    box.now = 5.0
    box.do(ev.CancelRequested, job_id="j")
    assert box.ledger.workers["worker-4"].state is WorkerState.IDLE
    assert not box.ledger.at_rest("worker-4", 5.0)
    box.do(ev.WorkerDroppedJob, worker_id="worker-4", job_id="j")
    assert box.ledger.at_rest("worker-4", 5.0)
    assert not box.ledger.at_rest("worker-4", 4.9)
    box.gone("worker-4")
    assert not box.ledger.at_rest("worker-4", 5.0)


def test_a_job_that_is_about_to_have_failed_can_be_cancelled() -> None:
    box = Box()
    box.submit("j", timeout_s=10.0)
    box.load("worker-4")
    box.now = 11.0
    box.do(ev.Tick)
    assert box.ledger.ending["j"].outcome == "failed"
    assert box.do(ev.CancelRequested, job_id="j") == [ev.BeginCancel(job_id="j")]
    assert box.do(ev.CancelRequested, job_id="j") == []
    box.do(ev.WorkerDroppedJob, worker_id="worker-4", job_id="j")
    evaluator = box.of(ev.KillEvaluator)[0].evaluator_id
    (settle,) = box.of(ev.SettleJob, box.do(ev.EvaluatorDied, evaluator_id=evaluator, cause="killed"))
    assert (settle.outcome, settle.error) == ("cancelled", None)


def test_a_worker_that_dies_instead_of_letting_go_ends_the_cancellation_too() -> None:
    box = Box()
    box.submit("j")
    box.load("worker-4")
    box.do(ev.CancelRequested, job_id="j")
    box.do(ev.EvaluatorDied, evaluator_id=box.of(ev.KillEvaluator)[0].evaluator_id, cause="killed")
    assert box.of(ev.SettleJob, box.do(ev.WorkerDied, worker_id="worker-4", cause="killed"))


def test_a_result_that_arrives_after_the_cancellation_is_ignored() -> None:
    box = Box()
    box.submit("j")
    box.load("worker-4")
    box.do(ev.CancelRequested, job_id="j")
    assert box.do(ev.JobEnded, job_id="j") == []


def test_a_job_survives_its_evaluator_until_the_attempts_are_used_up() -> None:
    box = Box(max_attempts=2)
    box.submit("j")
    box.load("worker-4")
    for kind in (ev.RequeueJob, ev.SettleJob):
        evaluator = box.ledger.running["j"].evaluator_id
        actions = box.do(ev.EvaluatorDied, evaluator_id=evaluator, cause="killed by SIGKILL")
        assert box.of(kind, actions)
        for start in box.of(ev.StartEvaluator, actions):
            box.do(ev.EvaluatorIsReady, evaluator_id=start.evaluator_id)
    assert "killed by SIGKILL" in box.of(ev.SettleJob)[0].error


def test_a_job_survives_its_worker_and_gets_another() -> None:
    box = Box()
    box.submit("j")
    box.load("worker-4")
    actions = box.do(ev.WorkerDied, worker_id="worker-4", cause="killed by SIGSEGV")
    assert box.of(ev.Detach, actions)
    assert box.of(ev.ReclaimSlots, actions)
    assert box.of(ev.StartWorker, actions)
    assert "j" in box.ledger.running


def test_a_model_that_cannot_be_loaded_fails_the_job_with_the_reason() -> None:
    box = Box()
    box.submit("j")
    actions = box.do(ev.WorkerLoadFailed, worker_id="worker-4", error="no such tensor")
    assert [type(action) for action in actions] == [ev.KillEvaluator, ev.StopWorker]
    box.do(ev.EvaluatorDied, evaluator_id=actions[0].evaluator_id, cause="killed")
    assert box.of(ev.SettleJob)[0].error == "no such tensor"


def test_a_job_whose_model_lacks_memory_beside_others_goes_where_there_is_room() -> None:
    box = Box(slots=0, gpus=2)
    (start,) = box.of(ev.StartWorker, box.submit("j", spec=spec("a", "cuda")))
    crowded = box.do(ev.WorkerLoadFailed, worker_id=start.worker_id, error="out of memory", crowded=True)
    (again,) = box.of(ev.StartWorker, crowded)
    assert again.slot_ids != start.slot_ids
    crowded = box.do(ev.WorkerLoadFailed, worker_id=again.worker_id, error="out of memory", crowded=True)
    assert "j" in box.ledger.running
    assert not box.of(ev.StartWorker, crowded)
    box.see(dict.fromkeys(start.slot_ids, "process 77 uses it"))
    for worker_id in (start.worker_id, again.worker_id):
        box.do(ev.WorkerDied, worker_id=worker_id, cause="exit code 1")
        actions = box.do(ev.SlotsReturned, worker_id=worker_id)
    (last,) = box.of(ev.StartWorker, actions)
    assert last.slot_ids == again.slot_ids


def test_a_model_that_changed_before_it_was_loaded_is_looked_at_again() -> None:
    box = Box()
    box.submit("j")
    actions = box.do(ev.WorkerLoadFailed, worker_id="worker-4", error="changed", content_changed=True)
    assert box.of(ev.RefreshModel, actions)
    assert "j" not in box.ledger.running


def test_a_job_that_ends_because_its_model_changed_is_looked_at_again() -> None:
    box = Box()
    box.submit("j")
    box.load("worker-4")
    (refresh,) = box.do(ev.JobEnded, job_id="j", content_changed=True)
    assert isinstance(refresh, ev.RefreshModel)


def test_a_job_that_has_a_worker_survives_a_further_one_that_cannot_load() -> None:
    box = Box()
    box.submit("j", max_replicas=2)
    box.load("worker-4")
    box.do(ev.WorkerLoadFailed, worker_id="worker-5", error="out of memory")
    box.do(ev.WorkerDied, worker_id="worker-5", cause="exit code 1")
    box.do(ev.SlotsReturned, worker_id="worker-5")
    assert box.ledger.running["j"].workers == ["worker-4"]
    assert len(box.of(ev.StartWorker)) == 2


def test_gpus_that_strangers_use_are_left_alone() -> None:
    box = Box(slots=0, gpus=2)
    box.see({"GPU-0": "process 77 uses it"})
    (start,) = box.of(ev.StartWorker, box.submit("j", spec=spec("a", "cuda")))
    assert start.slot_ids == ("GPU-1",)


def test_a_gpu_lost_to_a_stranger_at_the_last_moment_is_replaced_by_another() -> None:
    box = Box(slots=0, gpus=2)
    (start,) = box.of(ev.StartWorker, box.submit("j", spec=spec("a", "cuda")))
    actions = box.do(ev.LeaseRefused, worker_id=start.worker_id, reason="process 77 uses it")
    assert box.of(ev.StartWorker, actions)[0].slot_ids == ("GPU-1",)


def test_a_job_whose_gpus_are_gone_keeps_no_other_from_running() -> None:
    box = Box(slots=1, gpus=1, evaluators=1)
    (start,) = box.of(ev.StartWorker, box.submit("at a loss", spec=spec("a", "cuda")))
    box.see({"GPU-0": "NVML does not answer"})
    box.do(ev.LeaseRefused, worker_id=start.worker_id, reason="NVML does not answer")
    assert not box.submit("next") + box.submit("last")
    assert not box.do(ev.Tick)  # it may be over in a moment
    box.now += MEMORY_SECONDS + 1
    (more,) = box.do(ev.Tick)
    (start_job, start_worker) = box.do(ev.EvaluatorIsReady, evaluator_id=more.evaluator_id)
    assert (start_job.job_id, start_worker.slot_ids) == ("next", ("cpu:0",))
    box.load(start_worker.worker_id)
    box.see({})
    box.load(box.of(ev.StartWorker)[-1].worker_id)
    ended = box.end("next")
    assert box.of(ev.KillEvaluator, ended) == [ev.KillEvaluator(evaluator_id=more.evaluator_id)]
    assert list(box.ledger.waiting) == ["last"]  # one job at a time again
    box.do(ev.EvaluatorDied, evaluator_id=more.evaluator_id, cause="")
    assert not box.of(ev.StartJob, box.do(ev.Tick))
    assert box.of(ev.StartJob, box.end("at a loss"))[0].job_id == "last"


def test_a_job_for_one_gpu_waits_for_that_gpu() -> None:
    box = Box(slots=0, gpus=2)
    (start,) = box.of(ev.StartWorker, box.submit("j", spec=spec("a", "cuda"), slot_index="1"))
    assert start.slot_ids == ("GPU-1",)
    box.load(start.worker_id)
    assert not box.of(ev.StartWorker, box.submit("k", spec=spec("b", "cuda"), slot_index="1"))
    assert list(box.ledger.waiting) == ["k"]


def test_a_slot_is_not_leased_again_before_its_memory_is_back() -> None:
    box = Box(slots=1)
    box.submit("j", "a")
    box.load("worker-4")
    box.end("j")
    box.submit("k", "b")
    assert not box.of(ev.StartWorker, box.do(ev.WorkerDied, worker_id="worker-4", cause=""))
    assert box.of(ev.StartWorker, box.do(ev.SlotsReturned, worker_id="worker-4"))


def test_evaluators_are_as_many_as_slots_gpus_and_memory_ask_for_and_few_are_started_in_advance() -> None:
    for gpus, that_fit, most in [(0, None, 3), (2, None, 13), (2, 10, 10), (2, 1, 5)]:
        box = Box(slots=2, gpus=gpus, evaluators=None, evaluators_that_fit=that_fit)
        assert len(box.of(ev.StartEvaluator)) == 2 + gpus + 1
        for number in range(20):
            box.submit(f"job-{number}", model=str(number))
        assert len(box.of(ev.StartEvaluator)) == most


def test_the_next_job_goes_to_the_evaluator_that_has_run_one_last() -> None:
    box = Box(slots=2, evaluators=3)
    box.submit("first")
    box.submit("second")
    used = {job_id: run.evaluator_id for job_id, run in box.ledger.running.items()}
    for start in box.of(ev.StartWorker):
        box.load(start.worker_id)
    for job_id in ("second", "first", "third", "fourth"):
        if job_id in used:
            box.end(job_id)
        else:
            box.submit(job_id)
    chosen = [box.ledger.running[job_id].evaluator_id for job_id in ("third", "fourth")]
    assert chosen == [used["first"], used["second"]]


def test_load_times_are_kept_of_the_models_that_were_loaded_last() -> None:
    box = Box(slots=1, evaluators=1)
    for number in [*range(LOADS_REMEMBERED + 1), 1, "new"]:
        box.submit(f"job on {number}", str(number))
        for stop in box.of(ev.StopWorker)[-1:]:
            box.gone(stop.worker_id)
        box.load(box.of(ev.StartWorker)[-1].worker_id)
        box.end(f"job on {number}")
    kept = list(box.ledger.load_seconds)
    assert len(kept) == LOADS_REMEMBERED
    assert kept[-2:] == [spec("1").replica_key, spec("new").replica_key]
    assert not {spec("0").replica_key, spec("2").replica_key} & {*kept}
