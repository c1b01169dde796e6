"""The moves that decisions are made of: processes start, workers are given back and end. Pure.

A move is written in the ledger at once, as if it were done, and asked for by an action, which the shell carries out.
"""

from __future__ import annotations

from gpu_pool import events as ev
from gpu_pool.ledger import Evaluator, Ledger, Running
from gpu_pool.records import EvaluatorState, Worker, WorkerState
from gpu_pool.transitions import WorkerEvent, advance_worker


class Moves:
    """Changes the ledger, and collects what must be done for the world to be as it says."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._counter = 0
        self._actions: list[ev.Action] = []

    def ask(self, action: ev.Action) -> None:
        """This must be done, after what was asked for before."""
        self._actions.append(action)

    def asked(self) -> list[ev.Action]:
        """What was asked for since the last call, in order."""
        actions, self._actions = self._actions, []
        return actions

    def start_evaluator(self) -> None:
        """One more evaluator."""
        evaluator_id = self._new_id("evaluator")
        self._ledger.put_evaluator(evaluator_id, Evaluator())
        self.ask(ev.StartEvaluator(evaluator_id=evaluator_id))

    def end_evaluator(self, evaluator_id: str) -> None:
        """One that runs no job is not needed any more."""
        self._ledger.put_evaluator(evaluator_id, Evaluator(EvaluatorState.ENDING))
        self.ask(ev.KillEvaluator(evaluator_id=evaluator_id))

    def start_job(self, demand: ev.Demand, evaluator_id: str) -> Running:
        """Give a waiting job to a ready evaluator; workers are the caller's to find."""
        self.ask(ev.StartJob(job_id=demand.job_id, evaluator_id=evaluator_id))
        return self._ledger.start_job(demand, evaluator_id)

    def abandon(self, run: Running) -> None:
        """Take a running job out of its place and end its evaluator; its workers are the caller's to release."""
        self.ask(ev.KillEvaluator(evaluator_id=run.evaluator_id))
        self._ledger.leave_job(run, EvaluatorState.ENDING)

    def start_worker(self, demand: ev.Demand, slot_ids: tuple[str, ...]) -> str:
        """A worker for the job's model on these slots; its id."""
        worker_id = self._new_id("worker")
        memory = demand.memory_bytes if self._ledger.max_workers_per_gpu > 1 else 0
        worker = Worker(
            id=worker_id, spec=demand.spec, slots=slot_ids, memory_bytes=memory, idle_since=self._ledger.now
        )
        self._ledger.add_worker(worker)
        self.ask(ev.StartWorker(worker_id=worker_id, spec=demand.spec, slot_ids=slot_ids, memory_bytes=memory))
        return worker_id

    def give_back(self, worker_id: str) -> None:
        """Have all jobs of a worker do without it, if they can."""
        if worker_id in self._ledger.needed.workers:
            return  # the plan counted on two workers of a job that can spare one
        self.take_back(worker_id)

    def take_back(self, worker_id: str) -> None:
        """Have all jobs of a worker do without it, even if it is their last."""
        for job_id in sorted(self._ledger.workers[worker_id].jobs):
            run = self._ledger.running[job_id]
            if self._ledger.workers[worker_id].state is WorkerState.STARTING:
                self._ledger.release(run, worker_id)
            else:
                self._ask_back(run, worker_id)
        if not self._ledger.workers[worker_id].jobs:
            self.stop(worker_id)

    def _ask_back(self, run: Running, worker_id: str) -> None:
        """The job holds a loaded worker until its evaluator says that it is given back; asked for once."""
        if worker_id not in run.returning:
            self._ledger.ask_back(run, worker_id)
            self.detach(run, worker_id, at_once=False)

    def trim(self, run: Running) -> None:
        """Give back the most shared of a job's loaded workers while it has more than its cap; of equals the latest."""
        kept = [worker_id for worker_id in reversed(run.workers) if worker_id not in run.returning]
        while len(kept) > run.demand.max_replicas:
            busiest = max(kept, key=lambda worker_id: len(self._ledger.workers[worker_id].jobs))
            kept.remove(busiest)
            self._ask_back(run, busiest)

    def attach(self, run: Running, worker_id: str) -> None:
        """Have a job use a loaded worker that the ledger says is its own."""
        self.ask(ev.Attach(job_id=run.demand.job_id, evaluator_id=run.evaluator_id, worker_id=worker_id))

    def detach(
        self, run: Running, worker_id: str, *, at_once: bool, cause: str | None = None, from_outside: bool = False
    ) -> None:
        """Have a job use a worker no more: `at_once`, or as soon as that has answered."""
        self.ask(
            ev.Detach(
                job_id=run.demand.job_id,
                evaluator_id=run.evaluator_id,
                worker_id=worker_id,
                at_once=at_once,
                cause=cause,
                from_outside=from_outside,
            )
        )

    def note_loss(self, run: Running, worker_id: str, how: str) -> None:
        """Have it in a job's history that one of its workers is gone."""
        self.ask(ev.NoteLoss(job_id=run.demand.job_id, cause=f"{worker_id} {how}"))

    def stop(self, worker_id: str) -> None:
        """Ask a worker without jobs to end, if it was not asked before."""
        worker = self._ledger.workers[worker_id]
        if worker.state is not WorkerState.STOPPING:
            self._ledger.update_worker(worker_id, state=advance_worker(worker.state, WorkerEvent.STOP))
            self.ask(ev.StopWorker(worker_id=worker_id))

    def kill(self, worker_id: str, why: str) -> None:
        """End a worker whose GPU is lost, at once; its jobs go on elsewhere."""
        worker = self._ledger.workers[worker_id]
        for job_id in sorted(worker.jobs):
            run = self._ledger.running[job_id]
            self._ledger.release(run, worker_id)
            if worker.state is not WorkerState.STARTING:
                self.detach(run, worker_id, at_once=True)
            self.note_loss(run, worker_id, f"was on {why}")
        if worker_id not in self._ledger.killed:
            self._ledger.killed.add(worker_id)
            if self._ledger.workers[worker_id].state is not WorkerState.STOPPING:
                state = advance_worker(self._ledger.workers[worker_id].state, WorkerEvent.STOP)
                self._ledger.update_worker(worker_id, state=state)
            self.ask(ev.KillWorker(worker_id=worker_id))

    def _new_id(self, kind: str) -> str:
        self._counter += 1
        return f"{kind}-{self._counter}"
