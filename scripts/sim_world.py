"""A box under a virtual clock: it does what a scheduler asks and tells it what happens, as `gpu_pool.runner` does.

Evaluators take a time to start, prepare a job, hand its chunks to the workers that they are told to use, and score.
Workers load, then compute (`sim_computing`). GPUs (`sim_gpus`) come back some time after a worker's end.
"""

from __future__ import annotations

import time
from typing import Any, Protocol, assert_never

import msgspec
from sim_clock import Clock, Decisions, Meter
from sim_computing import Computing, JobRecord, Place, Replica
from sim_gpus import Gpus
from sim_traces import Trace

from gpu_pool import events as ev
from gpu_pool.records import ModelArgs, ModelSpec


class Steps(Protocol):
    """A scheduler, as the box sees it."""

    def step(self, event: ev.Event) -> list[ev.Action]:
        """Take one event; return what must be done, in order."""
        ...


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """What the box itself takes, in seconds."""

    evaluator_start_s: float = 3.0
    kill_s: float = 0.1
    """From killing a process to hearing of its death."""
    stop_s: float = 0.5
    """From asking a worker to end to its death."""
    reclaim_s: float = 1.0
    """From a worker's death to its memory being free."""
    drop_s: float = 0.2
    """From telling a worker to forget a job to its answer."""
    tick_s: float = 1.0
    progress_s: float = 0.5
    """Between two reports of a job's progress, at least."""
    look_s: float = 5.0
    """Between two looks at the hardware."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """At `at_s` the worker on this GPU dies; with `lost_s` the GPU is lost for so long, and the worker hangs."""

    at_s: float
    gpu: int
    lost_s: float = 0.0


class World:
    """One run of a trace. `run` it once; then read `jobs`, `meter` and `decisions`."""

    def __init__(
        self, trace: Trace, gpus: int, scheduler: Steps, costs: Costs | None = None, faults: tuple[Fault, ...] = ()
    ) -> None:
        """Raises ValueError when the trace cannot be run on so many GPUs."""
        trace.check(gpus)
        self.costs = costs or Costs()
        self.jobs = {job.id: JobRecord(trace=job, left=job.chunks) for job in trace.jobs}
        self.meter = Meter(gpus)
        self.decisions = Decisions()
        self._trace = trace
        self._gpu_count = gpus
        self._scheduler = scheduler
        self._specs = {name: _spec(name) for name in trace.models}
        self._gpus = Gpus(self.meter)
        self._evaluators: dict[str, str | None] = {}
        """Evaluator -> its job."""
        self._unfinished = len(self.jobs)
        self._clock = Clock(-self.costs.evaluator_start_s - 1.0)  # evaluators are ready when the trace begins
        self._computing = Computing(self._clock, self.meter, self.jobs, self._progressed, self._given_back)
        self._clock.at(self._clock.now, self._look)
        self._clock.at(self._clock.now, self._tick)
        for job in trace.jobs:
            self._clock.at(job.arrival_s, self._arrive, job.id)
            if job.cancel_s is not None:
                self._clock.at(job.cancel_s, self._cancel, job.id)
        for fault in faults:
            self._clock.at(fault.at_s, self._fail, fault)

    def spec(self, model: str) -> ModelSpec:
        """What the scheduler knows that model by."""
        return self._specs[model]

    # ------------------------------------------------------------------ time passes

    def run(self, until_s: float = float("inf")) -> None:
        """Until every job has ended. Raises RuntimeError when that has not happened by `until_s`."""
        while self._unfinished:
            when, act, arguments = self._clock.next()
            if when > until_s:
                raise RuntimeError(f"{self._unfinished} jobs have not ended by {until_s:g} s")
            if when > 0:
                self.meter.add(when - max(0.0, self._clock.now))
            self._clock.now = when
            act(*arguments)

    def _tell(self, event: type[ev.Event], **fields: Any) -> None:
        """Let the scheduler take an event that happens now, and do what it asks for."""
        happens = event(now=self._clock.now, **fields)
        before = time.thread_time_ns()
        actions = self._scheduler.step(happens)
        spent_ns = time.thread_time_ns() - before
        self.decisions.note(self.meter.queued, spent_ns, decides=event is not ev.JobProgressed)
        for action in actions:
            self._perform(action)

    def _look(self) -> None:
        self._see()
        self._clock.after(self.costs.look_s, self._look)

    def _see(self) -> None:
        self._tell(ev.SlotsSeen, **self._gpus.seen())

    def _tick(self) -> None:
        if self.meter.queued or any(self._evaluators.values()):
            self._tell(ev.Tick)
        self._clock.after(self.costs.tick_s, self._tick)

    # ------------------------------------------------------------------ what comes from outside

    def _arrive(self, job_id: str) -> None:
        record = self.jobs[job_id]
        job = record.trace
        self._move(record, "waiting")
        demand = ev.Demand(
            job_id=job_id,
            spec=self.spec(job.model),
            max_replicas=self._trace.replicas(job, self._gpu_count),
            order=job.arrival_s,
            priority=job.priority,
            gpus=self._trace.models[job.model].gpus,
            slot_id=None if job.gpu is None else self._gpus.slot_id(job.gpu),
        )
        self._tell(ev.JobSubmitted, demand=demand)

    def _cancel(self, job_id: str) -> None:
        if self.jobs[job_id].place != "ended":
            self._tell(ev.CancelRequested, job_id=job_id)

    def _fail(self, fault: Fault) -> None:
        if fault.lost_s and self._gpus.lose(fault.gpu):
            self._clock.after(fault.lost_s, self._find, fault.gpu)
        holder = self._gpus.holder(fault.gpu)
        if holder in self._computing.replicas:
            if fault.lost_s:
                self._computing.hang(holder)
            else:
                self._die(holder, "it was killed")
        if fault.lost_s:
            self._see()

    def _find(self, gpu: int) -> None:
        self._gpus.find(gpu)
        self._see()

    # ------------------------------------------------------------------ actions

    def _perform(self, action: ev.Action) -> None:
        match action:
            case ev.StartEvaluator(evaluator_id=evaluator_id):
                self._evaluators[evaluator_id] = None
                self._clock.after(self.costs.evaluator_start_s, self._evaluator_ready, evaluator_id)
            case ev.KillEvaluator(evaluator_id=evaluator_id):
                self._kill_evaluator(evaluator_id)
            case ev.StartWorker():
                self._start_worker(action)
            case ev.StopWorker(worker_id=worker_id):
                if replica := self._computing.replicas.get(worker_id):
                    replica.stopping = True
                    self._clock.after(self.costs.stop_s, self._die, worker_id, "it was stopped")
            case ev.KillWorker(worker_id=worker_id):
                self._clock.after(self.costs.kill_s, self._die, worker_id, "it was killed")
            case ev.ReclaimSlots(worker_id=worker_id, slot_ids=slot_ids):
                self._clock.after(self.costs.reclaim_s, self._return, worker_id, slot_ids)
            case ev.StartJob(job_id=job_id, evaluator_id=evaluator_id):
                self._start_job(self.jobs[job_id], evaluator_id)
            case ev.Attach(job_id=job_id, worker_id=worker_id):
                self._attach(self.jobs[job_id], worker_id)
            case ev.Detach(job_id=job_id, worker_id=worker_id, at_once=at_once):
                self._computing.detach(self.jobs[job_id], worker_id, at_once=at_once)
            case ev.NoteLoss():
                pass  # for people
            case ev.DropJob(worker_id=worker_id, job_id=job_id):
                self._computing.detach(self.jobs[job_id], worker_id)
                self._clock.after(self.costs.drop_s, self._dropped, worker_id, job_id)
            case ev.ConcludeJob(job_id=job_id):
                assert self.jobs[job_id].done == self.jobs[job_id].trace.chunks, "a job is concluded before its end"
                self._end_job(job_id, "completed")
            case ev.SettleJob(job_id=job_id, outcome=outcome):
                self._end_job(job_id, outcome)
            case ev.BeginCancel(job_id=job_id):
                self._move(self.jobs[job_id], "cancelling")
            case ev.RequeueJob(job_id=job_id) | ev.RefreshModel(job_id=job_id):
                self._move(self.jobs[job_id], "waiting")
            case _:
                assert_never(action)

    def _move(self, record: JobRecord, place: Place) -> None:
        assert record.place != "ended", "a job goes on after its end"
        self.meter.queued += (place == "waiting") - (record.place == "waiting")
        record.place = place

    def _end_job(self, job_id: str, outcome: str) -> None:
        record = self.jobs[job_id]
        self._move(record, "ended")
        record.ended_s, record.outcome = self._clock.now, outcome
        self._unfinished -= 1

    # ------------------------------------------------------------------ evaluators

    def _evaluator_ready(self, evaluator_id: str) -> None:
        if evaluator_id in self._evaluators:
            self._tell(ev.EvaluatorIsReady, evaluator_id=evaluator_id)

    def _kill_evaluator(self, evaluator_id: str) -> None:
        if evaluator_id not in self._evaluators:
            return
        if job_id := self._evaluators.pop(evaluator_id):
            self._let_go(self.jobs[job_id])
        self._clock.after(self.costs.kill_s, self._evaluator_died, evaluator_id)

    def _evaluator_died(self, evaluator_id: str) -> None:
        self._tell(ev.EvaluatorDied, evaluator_id=evaluator_id, cause="it was killed")

    def _let_go(self, record: JobRecord) -> None:
        """No evaluator works for the job any more: what runs of it is lost, what is done is in the cache."""
        for worker_id in list(record.workers):
            self._computing.detach(record, worker_id)
        record.evaluator_id = None
        record.left = record.trace.chunks - record.done
        record.attempt += 1

    def _start_job(self, record: JobRecord, evaluator_id: str) -> None:
        assert record.place == "waiting", "a job is started that does not wait"
        assert self._evaluators[evaluator_id] is None, "an evaluator gets a second job"
        self._move(record, "running")
        self._evaluators[evaluator_id] = record.trace.id
        record.evaluator_id, record.prepared = evaluator_id, False
        self._clock.after(record.trace.prepare_s, self._prepared, record, record.attempt)

    def _attach(self, record: JobRecord, worker_id: str) -> None:
        replica, gpu = self._computing.replicas.get(worker_id), record.trace.gpu
        if replica and record.evaluator_id:
            assert gpu is None or replica.slots == (self._gpus.slot_id(gpu),), "a job is attached to another GPU"
            self._computing.attach(record, worker_id)

    def _prepared(self, record: JobRecord, attempt: int) -> None:
        if record.attempt != attempt:
            return
        record.prepared = True
        if record.done == record.trace.chunks:
            self._score(record)
        else:
            self._computing.wake(record)

    def _progressed(self, record: JobRecord) -> None:
        if record.done == record.trace.chunks:
            self._score(record)
        elif self._clock.now - record.reported_s >= self.costs.progress_s:
            record.reported_s = self._clock.now
            self._clock.after(0.0, self._report, record.trace.id, record.done)

    def _report(self, job_id: str, done: int) -> None:
        self._tell(ev.JobProgressed, job_id=job_id, done=done)

    def _score(self, record: JobRecord) -> None:
        if record.started_s is None:
            record.started_s = self._clock.now
        self._clock.after(record.trace.score_s, self._scored, record, record.attempt)

    def _scored(self, record: JobRecord, attempt: int) -> None:
        evaluator_id = record.evaluator_id
        if record.attempt != attempt or evaluator_id is None:
            return
        self._let_go(record)
        self._evaluators[evaluator_id] = None
        self._tell(ev.JobEnded, job_id=record.trace.id)
        self._tell(ev.EvaluatorIsReady, evaluator_id=evaluator_id)

    # ------------------------------------------------------------------ workers

    def _start_worker(self, action: ev.StartWorker) -> None:
        worker_id, slot_ids = action.worker_id, action.slot_ids
        model = self._trace.models[action.spec.args.pretrained]
        assert len(set(slot_ids)) == model.gpus, f"a replica of {model.name} gets {slot_ids}"
        if not self._gpus.take(worker_id, slot_ids):
            self._clock.after(0.0, self._refuse, worker_id)
            return
        self._computing.start(worker_id, Replica(model=model, slots=slot_ids))
        self._clock.after(model.load_s, self._loaded, worker_id)

    def _refuse(self, worker_id: str) -> None:
        self._tell(ev.LeaseRefused, worker_id=worker_id, reason="the GPU is lost")

    def _loaded(self, worker_id: str) -> None:
        if self._computing.loaded(worker_id):
            self._tell(ev.WorkerLoaded, worker_id=worker_id)

    def _die(self, worker_id: str, cause: str) -> None:
        if self._computing.die(worker_id):
            self._tell(ev.WorkerDied, worker_id=worker_id, cause=cause)

    def _return(self, worker_id: str, slot_ids: tuple[str, ...]) -> None:
        self._gpus.give_back(slot_ids)
        self._tell(ev.SlotsReturned, worker_id=worker_id)

    def _given_back(self, record: JobRecord, worker_id: str) -> None:
        self._clock.after(0.0, self._tell_given_back, record.trace.id, worker_id)

    def _tell_given_back(self, job_id: str, worker_id: str) -> None:
        self._tell(ev.WorkerGivenBack, job_id=job_id, worker_id=worker_id)

    def _dropped(self, worker_id: str, job_id: str) -> None:
        if worker_id in self._computing.replicas:
            self._tell(ev.WorkerDroppedJob, worker_id=worker_id, job_id=job_id)


def _spec(model: str) -> ModelSpec:
    return ModelSpec(kind="hf", args=ModelArgs(pretrained=model), fingerprint=model, device="cuda")
