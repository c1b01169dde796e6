"""The moves that decisions are made of: workers start, are given back, and end. Pure.

Each is written in the ledger at once, and asked for by actions.
"""

from __future__ import annotations

from gpu_pool import events as ev
from gpu_pool.ledger import Ledger, Running
from gpu_pool.placement import can_spare
from gpu_pool.records import Worker, WorkerState
from gpu_pool.transitions import WorkerEvent, advance_worker


class Moves(Ledger):
    """A ledger that says what must be done for the world to be as it says."""

    def __init__(self, *, max_workers_per_gpu: int = 1, max_gpus: int | None = None) -> None:
        super().__init__(max_workers_per_gpu=max_workers_per_gpu, max_gpus=max_gpus)
        self._counter = 0
        self._actions: list[ev.Action] = []

    def _start_worker(self, demand: ev.Demand, slot_ids: tuple[str, ...]) -> str:
        worker_id = self._new_id("worker")
        memory = demand.memory_bytes if self.max_workers_per_gpu > 1 else 0
        worker = Worker(id=worker_id, spec=demand.spec, slots=slot_ids, memory_bytes=memory, idle_since=self.now)
        self.add_worker(worker)
        self._do(ev.StartWorker(worker_id=worker_id, spec=demand.spec, slot_ids=slot_ids, memory_bytes=memory))
        return worker_id

    def _give_back(self, worker_id: str) -> None:
        """Have all jobs of a worker do without it, if they can."""
        jobs = sorted(self.workers[worker_id].jobs)
        if not all(can_spare(worker_id, job_id, self) for job_id in jobs):
            return  # the plan counted on two workers of a job that can spare one
        self._take_back(worker_id)

    def _take_back(self, worker_id: str) -> None:
        """Have all jobs of a worker do without it, even if it is their last."""
        for job_id in sorted(self.workers[worker_id].jobs):
            run = self.running[job_id]
            if self.workers[worker_id].state is WorkerState.STARTING:
                self.release(run, worker_id)
            elif worker_id not in run.returning:
                run.returning.add(worker_id)
                self._detach(run, worker_id, at_once=False)
        if not self.workers[worker_id].jobs:
            self._stop(worker_id)

    def _trim(self, run: Running) -> None:
        """Give up the most shared of a job's loaded workers while it has more than its cap."""
        while len(run.workers) > run.demand.max_replicas:
            busiest = max(run.workers, key=lambda worker_id: (len(self.workers[worker_id].jobs), worker_id))
            self.release(run, busiest)
            self._detach(run, busiest, at_once=False)

    def _detach(self, run: Running, worker_id: str, *, at_once: bool, cause: str | None = None) -> None:
        job_id, evaluator_id = run.demand.job_id, run.evaluator_id
        self._do(ev.Detach(job_id=job_id, evaluator_id=evaluator_id, worker_id=worker_id, at_once=at_once, cause=cause))

    def _stop(self, worker_id: str) -> None:
        worker = self.workers[worker_id]
        if worker.state is not WorkerState.STOPPING:
            self.update_worker(worker_id, state=advance_worker(worker.state, WorkerEvent.STOP))
            self._do(ev.StopWorker(worker_id=worker_id))

    def _kill(self, worker_id: str) -> None:
        """End a worker whose GPU is lost, at once; its jobs go on elsewhere."""
        worker = self.workers[worker_id]
        for job_id in sorted(worker.jobs):
            run = self.running[job_id]
            self.release(run, worker_id)
            if worker.state is not WorkerState.STARTING:
                self._detach(run, worker_id, at_once=True)
        if worker_id not in self.killed:
            self.killed.add(worker_id)
            if self.workers[worker_id].state is not WorkerState.STOPPING:
                state = advance_worker(self.workers[worker_id].state, WorkerEvent.STOP)
                self.update_worker(worker_id, state=state)
            self._do(ev.KillWorker(worker_id=worker_id))

    def _new_id(self, kind: str) -> str:
        self._counter += 1
        return f"{kind}-{self._counter}"

    def _do(self, action: ev.Action) -> None:
        self._actions.append(action)
