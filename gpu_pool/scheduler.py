"""The scheduler: events in, actions out. It touches no process, socket, clock or file.

Begin with `step`, which is all of it: an event is written down, then one pass decides what follows.

    event ──► step ─┬─ 1. a handler writes down what happened ──────────────┐
                    │                                                       ▼
                    ├─ 2. `placer` decides who gets which worker ◄───── `ledger`: who holds what
                    │        `heads`: who may not be passed for ever        ▲
                    │        `candidates`: which waiting jobs to look at    │
                    │        `growth`: further workers for those that run   │
                    │        `placement`: where a replica could live        │
                    │                 │                                     │
                    │                 └──► `room`, `moves`: written down ───┘
                    ▼                      at once, and asked for to be done
                 actions ◄─────────────────┘

Read in this order: `records` and `transitions` (the nouns), `events` (what is heard and asked for), `ledger` (its
`check` says what always holds), this module (a handler an event; the table is at its end), `placer` (its header has the
five steps of a pass), `room`, `placement` (five degrees of readiness), and where it matters which job goes first,
`heads`, `order` and `candidates`. `explain` tells people why a job waits, from the same ledger.

Some ways through it:

    event                 what this module writes down          what follows in the pass          actions
    JobSubmitted          the job waits                         an evaluator, and a worker or     StartJob, StartWorker
                                                                free slots, are found for it
    WorkerLoaded          the worker serves its jobs            others may share it               Attach
    JobEnded              the job is gone, its workers rest     they go to jobs on their model    ConcludeJob, StartJob,
                                                                or make room for others           Attach or StopWorker
    WorkerDied            its jobs lack it, its slots are held  its jobs get others               ReclaimSlots, Detach,
                          until their memory is back                                              StartWorker
    CancelRequested       the job ends once all have let go     its workers go to others          KillEvaluator, DropJob
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from gpu_pool import events as ev
from gpu_pool.evaluator_count import EvaluatorCount
from gpu_pool.ledger import Ending, Ledger, Running
from gpu_pool.losses import Kills
from gpu_pool.moves import Moves
from gpu_pool.placer import PATIENCE_SECONDS, Placer
from gpu_pool.records import EvaluatorState, WorkerState

MAX_FAILED_STARTS = 5
"""Workers in a row that may end by themselves while they load before their job fails, or more where it may have more
attempts; chance ends some, a bad model ends all."""
MAX_LOSSES = 30
"""Workers that may die under a job by themselves, or not be reached by it, without any progress in between. Its
evaluator needs about log2(requests in a chunk) of them to find one request that kills, and reports by itself what it
cannot go on from. Those that somebody kills are judged by time (see `gpu_pool.losses`)."""


class Scheduler:
    """The pool's decisions. `step` takes one event and returns the actions that follow, in order."""

    def __init__(
        self,
        *,
        evaluators: int | None,
        max_attempts: int,
        evaluators_that_fit: int | None = None,
        max_workers_per_gpu: int = 1,
        max_gpus: int | None = None,
        idle_worker_s: float | None = None,
        patience_s: float = PATIENCE_SECONDS,
    ) -> None:
        """How many jobs may run at once, `EvaluatorCount` makes of `evaluators` and `evaluators_that_fit`.

        A job is started `max_attempts` times unless it says otherwise; a worker is stopped after `idle_worker_s`
        without a job."""
        self.ledger = Ledger(max_workers_per_gpu=max_workers_per_gpu, max_gpus=max_gpus)
        self._moves = Moves(self.ledger)
        self.placer = Placer(self.ledger, self._moves, patience_s)
        self._evaluators = EvaluatorCount(self.ledger, self._moves, evaluators, evaluators_that_fit)
        self._max_attempts = max_attempts
        self._idle_worker_s = idle_worker_s

    # ------------------------------------------------------------------ the face

    def step(self, event: ev.Event) -> list[ev.Action]:
        """Take one event; return what must be done, in order."""
        self.ledger.pass_time(event.now)
        self._handlers[type(event)](self, event)
        self._stop_unreachable()
        if not isinstance(event, ev.JobProgressed):  # the most frequent one leaves nothing to decide
            self._evaluators.keep()
            self.placer.place()
        return self._moves.asked()

    # ------------------------------------------------------------------ jobs

    def _on_submitted(self, event: ev.JobSubmitted) -> None:
        self.ledger.waiting.add(event.demand)

    def _on_progressed(self, event: ev.JobProgressed) -> None:
        if run := self.ledger.running.get(event.job_id):
            run.losses, run.kills, run.done = 0, Kills(), event.done

    def _on_cancel(self, event: ev.CancelRequested) -> None:
        if self.ledger.waiting.pop(event.job_id):
            self._moves.ask(ev.SettleJob(job_id=event.job_id, outcome="cancelled"))
        elif run := self.ledger.running.get(event.job_id):
            self._moves.ask(ev.BeginCancel(job_id=event.job_id))
            self._end(run, "cancelled")
        elif (ending := self.ledger.ending.get(event.job_id)) and ending.outcome == "failed":
            self._moves.ask(ev.BeginCancel(job_id=event.job_id))
            ending.outcome, ending.error = "cancelled", None

    def _on_job_ended(self, event: ev.JobEnded) -> None:
        if run := self.ledger.running.get(event.job_id):
            self.ledger.leave_job(run, EvaluatorState.CLEARING)
            if event.content_changed:
                self._refresh(run)
            else:
                self._moves.ask(ev.ConcludeJob(job_id=event.job_id))
            self.ledger.note_run(run.ran(self.ledger.now))
            self._release_all(run)

    def _refresh(self, run: Running) -> None:
        """Have a job begin with what its model's files hold now: its scores are all of one content."""
        when = f"while it paused for job {run.paused_for}" if run.paused_for else "before or while they were loaded"
        cause = f"the model's files changed {when}"
        self._moves.ask(ev.RefreshModel(job_id=run.demand.job_id, cause=cause, ran_s=run.ran(self.ledger.now)))

    def _release_all(self, run: Running) -> None:
        for worker_id in list(run.workers):
            self.ledger.release(run, worker_id)

    def _end(self, run: Running, outcome: Literal["cancelled", "failed"], error: str | None = None) -> None:
        """End a running job: its evaluator is killed and its workers drop it; settled when all have let go."""
        job_id = run.demand.job_id
        self._moves.abandon(run)
        ending = self.ledger.ending[job_id] = Ending(holders={run.evaluator_id}, outcome=outcome, error=error)
        for worker_id in list(run.workers):
            if self.ledger.workers[worker_id].state is WorkerState.BUSY:
                ending.holders.add(worker_id)
                self._moves.ask(ev.DropJob(worker_id=worker_id, job_id=job_id))
            self.ledger.release(run, worker_id)

    def _let_go(self, process_id: str, job_id: str | None = None) -> None:
        """This process holds nothing of the job (of any job) that is ending."""
        for ended in [job_id] if job_id is not None else list(self.ledger.ending):
            ending = self.ledger.ending.get(ended)
            if ending is None:
                continue
            ending.holders.discard(process_id)
            if not ending.holders:
                del self.ledger.ending[ended]
                self._moves.ask(ev.SettleJob(job_id=ended, outcome=ending.outcome, error=ending.error))

    def _requeue(self, run: Running, cause: str, *, from_outside: bool) -> None:
        """A running job lost its evaluator: it waits again, or has lost too many."""
        del self.ledger.running[run.demand.job_id]
        self._release_all(run)
        now = self.ledger.now
        losses = run.demand.losses.and_another(done=run.done, from_outside=from_outside, now=now)
        demand = msgspec.structs.replace(run.demand, losses=losses, ran_s=run.ran(now))
        if losses.are_too_many(max_attempts=self._max_attempts, max_retries=demand.max_retries, now=now):
            self._moves.ask(ev.SettleJob(job_id=demand.job_id, outcome="failed", error=f"{cause} ({losses.times})"))
        else:
            self.ledger.waiting.add(demand)
            self._moves.ask(ev.RequeueJob(job_id=demand.job_id, cause=cause))

    # ------------------------------------------------------------------ evaluators

    def _on_evaluator_ready(self, event: ev.EvaluatorIsReady) -> None:
        self.ledger.evaluator_is_ready(event.evaluator_id)

    def _on_evaluator_died(self, event: ev.EvaluatorDied) -> None:
        evaluator = self.ledger.forget_evaluator(event.evaluator_id)
        self._let_go(event.evaluator_id)
        if evaluator and evaluator.job_id is not None:
            run, cause = self.ledger.running[evaluator.job_id], f"the evaluator process ended: {event.cause}"
            self._requeue(run, cause, from_outside=event.from_outside)

    # ------------------------------------------------------------------ workers

    def _on_worker_loaded(self, event: ev.WorkerLoaded) -> None:
        worker = self.ledger.workers.get(event.worker_id)
        if worker is None or worker.state is not WorkerState.STARTING:
            return
        self.ledger.note_load(worker.id)
        for job_id in sorted(worker.jobs):
            run = self.ledger.running[job_id]
            run.failed_starts = 0
            self.ledger.works(run)
            self._moves.attach(run, worker.id)
            self._moves.trim(run)

    def _on_load_failed(self, event: ev.WorkerLoadFailed) -> None:
        worker = self.ledger.workers.get(event.worker_id)
        if worker is None:
            return
        for job_id in sorted(worker.jobs):
            run = self.ledger.running[job_id]
            self.ledger.release(run, worker.id)
            if event.crowded:  # it gets another worker where others leave room
                self._moves.note_loss(run, worker.id, f"did not load the model: {event.error}")
            elif run.workers:
                self._moves.note_loss(run, worker.id, f"did not load the model: {event.error}")
                run.may_grow = False
            elif event.content_changed:
                self._moves.abandon(run)
                self._refresh(run)
            elif run.paused_for:
                self._end(run, "failed", f"it had paused for job {run.paused_for}, and then {event.error}")
            else:
                self._end(run, "failed", event.error)
        self._moves.stop(worker.id)

    def _on_worker_died(self, event: ev.WorkerDied) -> None:
        worker = self.ledger.forget_worker(event.worker_id, reclaim=True)
        if worker is None:
            return
        rest_s = 0.0
        self._let_go(worker.id)
        for job_id in sorted(worker.jobs):
            run = self.ledger.running[job_id]
            self.ledger.release(run, worker.id)
            if worker.state is WorkerState.STARTING:
                self._moves.note_loss(run, worker.id, f"ended while it loaded the model: {event.cause}")
            else:
                by_whom = event.from_outside
                self._moves.detach(run, worker.id, at_once=True, cause=event.cause, from_outside=by_whom)
                self._moves.note_loss(run, worker.id, f"ended: {event.cause}")
            if event.from_outside:
                self._count_kill(run, event.cause)
                rest_s = max(rest_s, run.kills.rest_s)
            elif worker.state is WorkerState.STARTING:
                self._count_failed_start(run, event.cause)
            else:
                self._count_loss(run, event.cause)
        self.ledger.let_rest(worker.id, rest_s)
        self._moves.ask(ev.ReclaimSlots(worker_id=worker.id, slot_ids=worker.slots, rest_s=rest_s))

    def _on_unreachable(self, event: ev.WorkerUnreachable) -> None:
        """The worker may be sound, and the job's evaluator or what it sent the cause: other jobs may keep it."""
        worker = self.ledger.workers.get(event.worker_id)
        if worker is None or event.job_id not in worker.jobs:
            return
        run = self.ledger.running[event.job_id]
        self.ledger.unreachable.add(worker.id)
        self.ledger.release(run, worker.id)
        self._moves.note_loss(run, worker.id, f"cannot be reached: {event.cause}")
        self._count_loss(run, f"{worker.id} cannot be reached: {event.cause}")

    def _stop_unreachable(self) -> None:
        for worker_id in sorted(self.ledger.unreachable):
            if not self.ledger.workers[worker_id].jobs:
                self._moves.stop(worker_id)

    def _count_failed_start(self, run: Running, cause: str) -> None:
        run.failed_starts += 1
        if run.failed_starts >= MAX_FAILED_STARTS:
            if run.workers:
                run.may_grow = False
            elif run.failed_starts >= self._most_starts(run.demand):
                error = f"its worker process ended while it loaded the model: {cause} ({run.failed_starts} times)"
                self._end(run, "failed", error)

    def _most_starts(self, demand: ev.Demand) -> int:
        return self._max_attempts if demand.max_retries is None else demand.max_retries + 1

    def _count_loss(self, run: Running, cause: str) -> None:
        run.losses += 1
        if run.losses >= MAX_LOSSES:
            error = f"it lost its workers {run.losses} times without progress in between; the last: {cause}"
            self._end(run, "failed", error)

    def _count_kill(self, run: Running, cause: str) -> None:
        run.kills = run.kills.and_another(self.ledger.now)
        if run.kills.are_too_many(self.ledger.now):
            error = (
                f"its worker processes were killed {run.kills.count} times in {self.ledger.now - run.kills.since:.0f} s"
            )
            self._end(run, "failed", f"{error} without progress in between; the last: {cause}")

    def _on_dropped(self, event: ev.WorkerDroppedJob) -> None:
        self._let_go(event.worker_id, event.job_id)

    def _on_given_back(self, event: ev.WorkerGivenBack) -> None:
        run = self.ledger.running.get(event.job_id)
        if run and event.worker_id in run.returning:
            self.ledger.release(run, event.worker_id)

    def _on_lease_refused(self, event: ev.LeaseRefused) -> None:
        worker = self.ledger.forget_worker(event.worker_id, reclaim=False)
        if worker is None:
            return
        self.ledger.slots.refuse(worker.slots, event.reason)
        for job_id in sorted(worker.jobs):
            self.ledger.release(self.ledger.running[job_id], worker.id)

    # ------------------------------------------------------------------ slots

    def _on_slots_seen(self, event: ev.SlotsSeen) -> None:
        self.ledger.slots.see(event.slots, closed=event.lost | event.contested)
        for worker in list(self.ledger.workers.values()):
            if lost := event.lost.intersection(worker.slots):
                self._moves.kill(worker.id, self.ledger.slots.what_is_lost(min(lost)))
            elif not event.contested.isdisjoint(worker.slots) and not worker.jobs:
                self._moves.stop(worker.id)

    def _on_slots_returned(self, event: ev.SlotsReturned) -> None:
        self.ledger.return_slots(event.worker_id)

    def _on_models_seen(self, event: ev.ModelsSeen) -> None:
        self.ledger.changed = event.changed

    # ------------------------------------------------------------------ time

    def _on_tick(self, event: ev.Tick) -> None:
        for run in list(self.ledger.running.values()):
            limit = run.demand.timeout_s
            if limit is not None and run.ran(self.ledger.now) > limit:
                self._end(run, "failed", f"it ran for longer than its timeout_s of {limit:g} s")
        if self._idle_worker_s is not None:
            for worker in list(self.ledger.workers.values()):
                if worker.state is WorkerState.IDLE and self.ledger.now - worker.idle_since > self._idle_worker_s:
                    self._moves.stop(worker.id)

    _handlers: dict[type[ev.Event], Callable[[Scheduler, Any], None]] = {
        ev.JobSubmitted: _on_submitted,
        ev.JobProgressed: _on_progressed,
        ev.CancelRequested: _on_cancel,
        ev.JobEnded: _on_job_ended,
        ev.EvaluatorIsReady: _on_evaluator_ready,
        ev.EvaluatorDied: _on_evaluator_died,
        ev.WorkerLoaded: _on_worker_loaded,
        ev.WorkerLoadFailed: _on_load_failed,
        ev.WorkerDied: _on_worker_died,
        ev.WorkerUnreachable: _on_unreachable,
        ev.WorkerDroppedJob: _on_dropped,
        ev.WorkerGivenBack: _on_given_back,
        ev.LeaseRefused: _on_lease_refused,
        ev.SlotsSeen: _on_slots_seen,
        ev.SlotsReturned: _on_slots_returned,
        ev.ModelsSeen: _on_models_seen,
        ev.Tick: _on_tick,
    }
