"""Long random sequences of events: the ledger's invariants hold after each, and a kind world ends every job."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scheduler_box import Box, spec

from gpu_pool import events as ev
from gpu_pool.ledger import SOON_READY
from gpu_pool.placement import Readiness, find_plan, readiness_of, replicas_for
from gpu_pool.records import EvaluatorState, WorkerState


class LongRun(RuleBasedStateMachine):
    """Random event sequences that a world could really produce; the invariants hold after each, and every job ends."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.box = Box(slots=2, evaluators=3, gpus=3, idle_worker_s=200.0, patience_s=30.0, **self.options)
        self.numbers = itertools.count()

    def apply(self, event: type[ev.Event], **fields: object) -> None:
        self.box.now += 1.0
        self.box.do(event, **fields)

    def pick(self, data: st.DataObject, items: Iterable[str]) -> str:
        return data.draw(st.sampled_from(sorted(items)))

    @rule(model=st.sampled_from("abc"), replicas=st.integers(1, 2), device=st.sampled_from(["cpu", "cuda"]))
    def submit(self, model: str, replicas: int, device: str) -> None:
        self.box.submit(f"job-{next(self.numbers)}", spec=spec(model, device), max_replicas=replicas)

    @rule(
        model=st.sampled_from("def"),
        gpus=st.integers(1, 2),
        memory=st.sampled_from([0, 30, 49, 50, 51]),
        priority=st.sampled_from([-2, -1, 0, 0, 1, 10]),
        replicas=st.integers(1, 3),
        timeout=st.sampled_from([None, 30.0]),
        slot=st.sampled_from([None, None, "GPU-2"]),
    )
    def submit_for_gpus(
        self, model: str, gpus: int, memory: int, priority: int, replicas: int, timeout: float | None, slot: str | None
    ) -> None:
        self.box.submit(
            f"job-{next(self.numbers)}",
            spec=spec(model, "cuda"),
            gpus=1 if slot else gpus,
            max_replicas=1 if slot else replicas,
            memory_bytes=memory,
            priority=priority,
            timeout_s=timeout,
            slot_id=slot,
        )

    @precondition(lambda self: self.returning())
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        job_id, worker_id = data.draw(st.sampled_from(self.returning()))
        self.apply(ev.WorkerGivenBack, job_id=job_id, worker_id=worker_id)

    @rule(lost=st.sets(st.sampled_from(["GPU-0", "GPU-1", "GPU-2"]), max_size=2))
    def gpus_are_lost(self, lost: set[str]) -> None:
        self.box.see(dict.fromkeys(lost, "it is lost"), lost=frozenset(lost))

    @rule(wanted=st.sets(st.sampled_from(["GPU-0", "GPU-1"])))
    def strangers_want_memory(self, wanted: set[str]) -> None:
        self.box.see(dict.fromkeys(wanted, "process 77 uses it"), contested=frozenset(wanted))

    @precondition(lambda self: self.box.ledger.running)
    @rule(data=st.data(), done=st.integers(1, 5))
    def progress(self, data: st.DataObject, done: int) -> None:
        self.apply(ev.JobProgressed, job_id=self.pick(data, self.box.ledger.running), done=done)

    @precondition(lambda self: self.box.ledger.running or self.box.ledger.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        jobs = [*self.box.ledger.running, *self.box.ledger.waiting]
        self.apply(ev.CancelRequested, job_id=self.pick(data, jobs))

    @precondition(lambda self: self.served())
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.apply(ev.JobEnded, job_id=self.pick(data, self.served()))

    @precondition(lambda self: self.resting())
    @rule(data=st.data())
    def evaluator_ready(self, data: st.DataObject) -> None:
        self.apply(ev.EvaluatorIsReady, evaluator_id=self.pick(data, self.resting()))

    @precondition(lambda self: self.box.ledger.evaluators)
    @rule(data=st.data())
    def evaluator_dies(self, data: st.DataObject) -> None:
        self.apply(ev.EvaluatorDied, evaluator_id=self.pick(data, self.box.ledger.evaluators), cause="killed")

    @precondition(lambda self: self.in_state(WorkerState.STARTING))
    @rule(data=st.data())
    def worker_loads(self, data: st.DataObject) -> None:
        self.apply(ev.WorkerLoaded, worker_id=self.pick(data, self.in_state(WorkerState.STARTING)))

    @precondition(lambda self: self.in_state(WorkerState.STARTING))
    @rule(data=st.data(), changed=st.booleans(), crowded=st.booleans())
    def worker_fails_to_load(self, data: st.DataObject, changed: bool, crowded: bool) -> None:
        worker_id = self.pick(data, self.in_state(WorkerState.STARTING))
        self.apply(
            ev.WorkerLoadFailed,
            worker_id=worker_id,
            error="no",
            content_changed=changed,
            crowded=crowded and not changed,
        )

    @precondition(lambda self: self.in_state(WorkerState.STARTING))
    @rule(data=st.data())
    def lease_refused(self, data: st.DataObject) -> None:
        worker_id = self.pick(data, self.in_state(WorkerState.STARTING))
        self.apply(ev.LeaseRefused, worker_id=worker_id, reason="taken")

    @precondition(lambda self: self.box.ledger.workers)
    @rule(data=st.data())
    def worker_dies(self, data: st.DataObject) -> None:
        self.apply(ev.WorkerDied, worker_id=self.pick(data, self.box.ledger.workers), cause="killed")

    @precondition(lambda self: self.in_use())
    @rule(data=st.data())
    def worker_is_not_reached(self, data: st.DataObject) -> None:
        job_id, worker_id = data.draw(st.sampled_from(self.in_use()))
        self.apply(ev.WorkerUnreachable, job_id=job_id, worker_id=worker_id, cause="no such file")

    @precondition(lambda self: self.box.ledger.ending)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        job_id = self.pick(data, self.box.ledger.ending)
        holder = self.pick(data, self.box.ledger.ending[job_id].holders)
        if holder in self.box.ledger.evaluators:
            self.apply(ev.EvaluatorDied, evaluator_id=holder, cause="killed")
        else:
            self.apply(ev.WorkerDroppedJob, worker_id=holder, job_id=job_id)

    @precondition(lambda self: self.box.ledger.reclaiming)
    @rule(data=st.data())
    def memory_is_back(self, data: st.DataObject) -> None:
        self.apply(ev.SlotsReturned, worker_id=self.pick(data, self.box.ledger.reclaiming))

    @rule(taken=st.sets(st.sampled_from(["GPU-0", "GPU-1"])))
    def strangers_come_and_go(self, taken: set[str]) -> None:
        self.box.see(dict.fromkeys(taken, "process 77 uses it"))

    @rule(models=st.sets(st.sampled_from("abcdef")))
    def checkpoints_are_overwritten(self, models: set[str]) -> None:
        keys = {spec(model, device).replica_key for model in models for device in ("cpu", "cuda")}
        self.apply(ev.ModelsSeen, changed=frozenset(keys))

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds: float) -> None:
        self.box.now += seconds
        self.box.do(ev.Tick)

    @invariant()
    def consistent(self) -> None:
        self.box.ledger.check()

    @invariant()
    def nothing_that_fits_waits(self) -> None:
        ledger = self.box.ledger
        for demand in ledger.waiting.values() if self.box.scheduler.placer.evaluators_left else ():
            assert all(
                worker.state is WorkerState.STARTING for worker in replicas_for(demand, ledger, ledger.slots.promised)
            )
            plan = find_plan(demand, ledger)
            assert plan is None or plan.readiness is not Readiness.NOW

    @invariant()
    def no_slot_stays_free_that_a_running_job_could_use(self) -> None:
        ledger = self.box.ledger
        if ledger.waiting and ledger.evaluators_that_are(*SOON_READY):
            return  # a waiting job may start there in a moment
        for run in ledger.running.values():
            if not run.workers or (run.may_grow and len(run.workers) < run.demand.max_replicas):
                plan = find_plan(run.demand, ledger, apart=run.workers)
                assert plan is None or plan.readiness is not Readiness.NOW

    @invariant()
    def a_free_slot_is_promised_only_where_the_others_of_its_set_come_free_by_themselves(self) -> None:
        ledger = self.box.ledger
        for slot_id, job_id in ledger.slots.promised.items():
            kept = [each for each, keeper in ledger.slots.promised.items() if keeper == job_id]
            for worker_id in [] if ledger.slots.holders.get(slot_id) else self.holders(kept):
                if ledger.holder(worker_id).spec.replica_key not in ledger.changed:
                    assert readiness_of(ledger.holder(worker_id), ledger) is not Readiness.BUSY

    def holders(self, slot_ids: Iterable[str]) -> set[str]:
        return {worker_id for slot_id in slot_ids for worker_id in self.box.ledger.slots.holders.get(slot_id, ())}

    def teardown(self) -> None:
        """A world that behaves from here on brings every job to its end."""
        self.box.see({})
        for _ in range(100 + 20 * next(self.numbers)):
            if not self.settle_something():
                break
        ledger = self.box.ledger
        assert not [*ledger.waiting, *ledger.running, *ledger.ending]

    def settle_something(self) -> bool:
        ledger = self.box.ledger
        for worker in list(ledger.workers.values()):
            if worker.state is WorkerState.STARTING:
                self.apply(ev.WorkerLoaded, worker_id=worker.id)
            elif worker.state is WorkerState.STOPPING:
                self.apply(ev.WorkerDied, worker_id=worker.id, cause="")
        for worker_id in list(ledger.reclaiming):
            self.apply(ev.SlotsReturned, worker_id=worker_id)
        for job_id, worker_id in self.returning():
            self.apply(ev.WorkerGivenBack, job_id=job_id, worker_id=worker_id)
        for evaluator_id in self.killed() & ledger.evaluators.keys():
            self.apply(ev.EvaluatorDied, evaluator_id=evaluator_id, cause="killed")
        for job_id, ending in list(ledger.ending.items()):
            for holder in list(ending.holders):
                self.apply(ev.WorkerDroppedJob, worker_id=holder, job_id=job_id)
        for job_id in self.served():
            self.apply(ev.JobEnded, job_id=job_id)
        for evaluator_id in self.resting():
            self.apply(ev.EvaluatorIsReady, evaluator_id=evaluator_id)
        return bool(ledger.waiting or ledger.running or ledger.ending)

    def served(self) -> list[str]:
        """Running jobs with a loaded worker: they can end."""
        workers = self.box.ledger.workers
        return [
            job_id
            for job_id, run in self.box.ledger.running.items()
            if any(workers[worker].state is WorkerState.BUSY for worker in run.workers)
        ]

    def in_use(self) -> list[tuple[str, str]]:
        """Running jobs and their loaded workers."""
        workers = [worker for worker in self.box.ledger.workers.values() if worker.state is WorkerState.BUSY]
        return sorted((job_id, worker.id) for worker in workers for job_id in worker.jobs)

    def returning(self) -> list[tuple[str, str]]:
        running = self.box.ledger.running
        return sorted((job_id, worker_id) for job_id, run in running.items() for worker_id in run.returning)

    def resting(self) -> list[str]:
        """Evaluators that may say that they are ready: started, or done with their job, which may be heard of killed
        ones too."""
        may_say = (EvaluatorState.STARTING, EvaluatorState.CLEARING, EvaluatorState.ENDING)
        return self.box.ledger.evaluators_that_are(*may_say)

    def killed(self) -> set[str]:
        return {action.evaluator_id for action in self.box.of(ev.KillEvaluator)}

    def in_state(self, state: WorkerState) -> list[str]:
        return [worker.id for worker in self.box.ledger.workers.values() if worker.state is state]


class TwoGpusAtMost(LongRun):
    """Small models share GPUs, of which no more than two of three may be held."""

    options: ClassVar[dict[str, Any]] = {"max_workers_per_gpu": 2, "max_gpus": 2}


class WholeGpus(LongRun):
    """Each of three GPUs is one replica's."""


TestTwoGpusAtMost, TestWholeGpus = TwoGpusAtMost.TestCase, WholeGpus.TestCase
TestTwoGpusAtMost.settings = TestWholeGpus.settings = settings(
    max_examples=100, stateful_step_count=40, derandomize=True
)


@pytest.mark.exhaustive
@pytest.mark.parametrize("machine", [TwoGpusAtMost, WholeGpus])
def test_longer_runs_that_are_others_each_time(machine: type[LongRun]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=1000, stateful_step_count=150))
