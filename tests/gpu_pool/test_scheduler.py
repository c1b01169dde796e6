"""Events in, actions out: no process, loop or clock. Invariants are checked after every step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpu_pool import events as ev
from gpu_pool.records import ModelArgs, ModelSpec, Slot, WorkerState
from gpu_pool.scheduler import Scheduler


def spec(model: str, device: str = "cpu") -> ModelSpec:
    return ModelSpec(kind="hf", args=ModelArgs(pretrained=model), fingerprint=model, device=device)


class Box:
    """A scheduler with CPU slots and ready evaluators, and a clock that the test moves."""

    def __init__(self, slots: int = 2, evaluators: int = 3, gpus: int = 0, max_attempts: int = 3) -> None:
        self.scheduler = Scheduler(evaluators=evaluators, max_attempts=max_attempts)
        self.now = 0.0
        self.orders = itertools.count()
        self.log: list[ev.Action] = []
        self.slots = [Slot(id=f"cpu:{n}", device="cpu", index=str(n)) for n in range(slots)]
        self.slots += [Slot(id=f"GPU-{n}", device="cuda", index=str(n)) for n in range(gpus)]
        self.see({})
        for action in self.of(ev.StartEvaluator):
            self.do(ev.EvaluatorIsReady, evaluator_id=action.evaluator_id)

    def do(self, event: type[ev.Event], **fields: object) -> list[ev.Action]:
        actions = self.scheduler.step(event(now=self.now, **fields))
        self.scheduler.check()
        self.log += actions
        return actions

    def see(self, unusable: dict[str, str]) -> list[ev.Action]:
        return self.do(ev.SlotsSeen, slots=tuple((slot, unusable.get(slot.id)) for slot in self.slots))

    def submit(self, job_id: str, model: str = "a", **fields: object) -> list[ev.Action]:
        demand = {"job_id": job_id, "spec": spec(model), "max_replicas": 1, "order": float(next(self.orders))} | fields
        return self.do(ev.JobSubmitted, demand=ev.Demand(**demand))

    def load(self, worker_id: str) -> list[ev.Action]:
        return self.do(ev.WorkerLoaded, worker_id=worker_id)

    def end(self, job_id: str) -> list[ev.Action]:
        evaluator = self.scheduler.running[job_id].evaluator_id
        return [
            *self.do(ev.JobEnded, job_id=job_id),
            *self.do(ev.EvaluatorIsReady, evaluator_id=evaluator),
        ]

    def of(self, kind: type[ev.Action], actions: Iterable[ev.Action] | None = None) -> list[ev.Action]:
        return [action for action in (self.log if actions is None else actions) if isinstance(action, kind)]


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
    assert box.scheduler.workers[worker.worker_id].state is WorkerState.IDLE


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
    assert [type(action) for action in actions] == [ev.Attach, ev.Detach]
    assert sorted(len(worker.jobs) for worker in box.scheduler.workers.values()) == [1, 1]


def test_a_job_grows_to_its_cap_and_no_further() -> None:
    box = Box(slots=3)
    assert len(box.of(ev.StartWorker, box.submit("j", max_replicas=2))) == 2
    for worker in list(box.scheduler.workers):
        box.load(worker)
    assert len(box.scheduler.running["j"].workers) == 2


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
    actions = box.do(ev.SlotsReturned, slot_ids=("cpu:1",))
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
    assert box.scheduler.workers["worker-4"].state is WorkerState.IDLE


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
        evaluator = box.scheduler.running["j"].evaluator_id
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
    assert "j" in box.scheduler.running


def test_a_model_that_cannot_be_loaded_fails_the_job_with_the_reason() -> None:
    box = Box()
    box.submit("j")
    actions = box.do(ev.WorkerLoadFailed, worker_id="worker-4", error="no such tensor")
    assert [type(action) for action in actions] == [ev.KillEvaluator, ev.SettleJob, ev.StopWorker]
    assert box.of(ev.SettleJob)[0].error == "no such tensor"


def test_a_model_that_changed_before_it_was_loaded_is_looked_at_again() -> None:
    box = Box()
    box.submit("j")
    actions = box.do(ev.WorkerLoadFailed, worker_id="worker-4", error="changed", content_changed=True)
    assert box.of(ev.RefreshModel, actions)
    assert "j" not in box.scheduler.running


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
    box.do(ev.SlotsReturned, slot_ids=("cpu:1",))
    assert box.scheduler.running["j"].workers == ["worker-4"]
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


def test_a_job_for_one_gpu_waits_for_that_gpu() -> None:
    box = Box(slots=0, gpus=2)
    (start,) = box.of(ev.StartWorker, box.submit("j", spec=spec("a", "cuda"), slot_index="1"))
    assert start.slot_ids == ("GPU-1",)
    box.load(start.worker_id)
    assert not box.of(ev.StartWorker, box.submit("k", spec=spec("b", "cuda"), slot_index="1"))
    assert list(box.scheduler.waiting) == ["k"]


def test_a_slot_is_not_leased_again_before_its_memory_is_back() -> None:
    box = Box(slots=1)
    box.submit("j", "a")
    box.load("worker-4")
    box.end("j")
    box.submit("k", "b")
    assert not box.of(ev.StartWorker, box.do(ev.WorkerDied, worker_id="worker-4", cause=""))
    assert box.of(ev.StartWorker, box.do(ev.SlotsReturned, slot_ids=("cpu:0",)))


class LongRun(RuleBasedStateMachine):
    """Random event sequences that a world could really produce; the invariants hold after each, and every job ends."""

    def __init__(self) -> None:
        super().__init__()
        self.box = Box(slots=2, evaluators=2, gpus=2)
        self.numbers = itertools.count()

    def apply(self, event: type[ev.Event], **fields: object) -> None:
        self.box.now += 1.0
        self.box.do(event, **fields)

    def pick(self, data: st.DataObject, items: Iterable[str]) -> str:
        return data.draw(st.sampled_from(sorted(items)))

    @rule(model=st.sampled_from("abc"), replicas=st.integers(1, 2), device=st.sampled_from(["cpu", "cuda"]))
    def submit(self, model: str, replicas: int, device: str) -> None:
        self.box.submit(f"job-{next(self.numbers)}", spec=spec(model, device), max_replicas=replicas)

    @precondition(lambda self: self.box.scheduler.running or self.box.scheduler.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        jobs = [*self.box.scheduler.running, *self.box.scheduler.waiting]
        self.apply(ev.CancelRequested, job_id=self.pick(data, jobs))

    @precondition(lambda self: self.served())
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.apply(ev.JobEnded, job_id=self.pick(data, self.served()))

    @precondition(lambda self: self.resting())
    @rule(data=st.data())
    def evaluator_ready(self, data: st.DataObject) -> None:
        self.apply(ev.EvaluatorIsReady, evaluator_id=self.pick(data, self.resting()))

    @precondition(lambda self: self.box.scheduler.evaluators)
    @rule(data=st.data())
    def evaluator_dies(self, data: st.DataObject) -> None:
        self.apply(ev.EvaluatorDied, evaluator_id=self.pick(data, self.box.scheduler.evaluators), cause="killed")

    @precondition(lambda self: self.in_state(WorkerState.STARTING))
    @rule(data=st.data())
    def worker_loads(self, data: st.DataObject) -> None:
        self.apply(ev.WorkerLoaded, worker_id=self.pick(data, self.in_state(WorkerState.STARTING)))

    @precondition(lambda self: self.in_state(WorkerState.STARTING))
    @rule(data=st.data(), changed=st.booleans())
    def worker_fails_to_load(self, data: st.DataObject, changed: bool) -> None:
        worker_id = self.pick(data, self.in_state(WorkerState.STARTING))
        self.apply(ev.WorkerLoadFailed, worker_id=worker_id, error="no", content_changed=changed)

    @precondition(lambda self: self.in_state(WorkerState.STARTING))
    @rule(data=st.data())
    def lease_refused(self, data: st.DataObject) -> None:
        worker_id = self.pick(data, self.in_state(WorkerState.STARTING))
        self.apply(ev.LeaseRefused, worker_id=worker_id, reason="taken")

    @precondition(lambda self: self.box.scheduler.workers)
    @rule(data=st.data())
    def worker_dies(self, data: st.DataObject) -> None:
        self.apply(ev.WorkerDied, worker_id=self.pick(data, self.box.scheduler.workers), cause="killed")

    @precondition(lambda self: self.box.scheduler.cancelling)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        job_id = self.pick(data, self.box.scheduler.cancelling)
        holder = self.pick(data, self.box.scheduler.cancelling[job_id])
        if holder in self.box.scheduler.evaluators:
            self.apply(ev.EvaluatorDied, evaluator_id=holder, cause="killed")
        else:
            self.apply(ev.WorkerDroppedJob, worker_id=holder, job_id=job_id)

    @precondition(lambda self: self.box.scheduler.reclaiming)
    @rule(data=st.data())
    def memory_is_back(self, data: st.DataObject) -> None:
        self.apply(ev.SlotsReturned, slot_ids=(self.pick(data, self.box.scheduler.reclaiming),))

    @rule(taken=st.sets(st.sampled_from(["GPU-0", "GPU-1"])))
    def strangers_come_and_go(self, taken: set[str]) -> None:
        self.box.see(dict.fromkeys(taken, "process 77 uses it"))

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds: float) -> None:
        self.box.now += seconds
        self.box.do(ev.Tick)

    @invariant()
    def consistent(self) -> None:
        self.box.scheduler.check()

    def teardown(self) -> None:
        """A world that behaves from here on brings every job to its end."""
        self.box.see({})
        for _ in range(100 + 20 * next(self.numbers)):
            if not self.settle_something():
                break
        scheduler = self.box.scheduler
        assert not [*scheduler.waiting, *scheduler.running, *scheduler.cancelling]

    def settle_something(self) -> bool:
        scheduler = self.box.scheduler
        for worker in list(scheduler.workers.values()):
            if worker.state is WorkerState.STARTING:
                self.apply(ev.WorkerLoaded, worker_id=worker.id)
            elif worker.state is WorkerState.STOPPING:
                self.apply(ev.WorkerDied, worker_id=worker.id, cause="")
        for slot in list(scheduler.reclaiming):
            self.apply(ev.SlotsReturned, slot_ids=(slot,))
        for evaluator_id in self.killed() & scheduler.evaluators.keys():
            self.apply(ev.EvaluatorDied, evaluator_id=evaluator_id, cause="killed")
        for job_id, holders in list(scheduler.cancelling.items()):
            for holder in list(holders):
                self.apply(ev.WorkerDroppedJob, worker_id=holder, job_id=job_id)
        for job_id in self.served():
            self.apply(ev.JobEnded, job_id=job_id)
        for evaluator_id in self.resting():
            self.apply(ev.EvaluatorIsReady, evaluator_id=evaluator_id)
        return bool(scheduler.waiting or scheduler.running or scheduler.cancelling)

    def served(self) -> list[str]:
        """Running jobs with a loaded worker: they can end."""
        workers = self.box.scheduler.workers
        return [
            job_id
            for job_id, run in self.box.scheduler.running.items()
            if any(workers[worker].state is WorkerState.BUSY for worker in run.workers)
        ]

    def resting(self) -> list[str]:
        """Evaluators that may say that they are ready: started, or done with their job; not killed ones."""
        scheduler = self.box.scheduler
        busy = set(scheduler.running)
        return [k for k, job in scheduler.evaluators.items() if job not in busy | {None} and k not in self.killed()]

    def killed(self) -> set[str]:
        return {action.evaluator_id for action in self.box.of(ev.KillEvaluator)}

    def in_state(self, state: WorkerState) -> list[str]:
        return [worker.id for worker in self.box.scheduler.workers.values() if worker.state is state]


TestLongRun = LongRun.TestCase
TestLongRun.settings = settings(max_examples=200, stateful_step_count=40, deadline=None, derandomize=True)
