"""Who holds what: jobs, evaluators, workers and slots. Pure bookkeeping; decisions are made elsewhere.

Every job is in exactly one of three places: `waiting`, `running` or `ending`. Every worker is live (`workers`) or gone
while its memory is not back yet (`reclaiming`); both hold their slots. `check` states these invariants; the tests call
it after every step.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import msgspec

from gpu_pool.events import Demand
from gpu_pool.losses import Kills
from gpu_pool.needed import Needed
from gpu_pool.order import WaitingJobs, rank
from gpu_pool.records import EvaluatorState, Worker, WorkerState
from gpu_pool.slot_book import SlotBook
from gpu_pool.transitions import WorkerEvent, advance_worker

LOADS_REMEMBERED = 1000
"""Models of which it is known how long they take to load: those that were loaded last."""

SOON_READY = (EvaluatorState.STARTING, EvaluatorState.CLEARING, EvaluatorState.ENDING)
"""Evaluators that will take a job in a moment, or are replaced by one that will."""
MEMORY_SECONDS = 10.0
"""How long the memory of a worker that is gone mostly takes to come back, at most: when it takes longer (NVML does not
answer, somebody keeps it), nobody counts on that slot until it is back."""


class Evaluator(msgspec.Struct, frozen=True):
    """An evaluator process, and the job that it runs."""

    state: EvaluatorState = EvaluatorState.STARTING
    job_id: str | None = None
    """Set while it is RUNNING, and only then."""


class Running(msgspec.Struct, kw_only=True):
    """A job with an evaluator."""

    demand: Demand
    evaluator_id: str
    workers: list[str] = []
    """Workers it holds, loading ones and those it is giving back too."""
    returning: set[str] = set()
    """Of these, the ones that its evaluator was asked to give back."""
    failed_starts: int = 0
    """Workers in a row that died before they were ready."""
    losses: int = 0
    """Workers that died under it by themselves since it last made progress."""
    kills: Kills = Kills()
    """And those that somebody killed."""
    done: int = 0
    """Requests that are done."""
    may_grow: bool = True
    """False once a further replica failed to load: the next one would fail too."""
    seconds: float = 0.0
    """How long it had a worker, in earlier attempts too, until `working_since`."""
    working_since: float | None = None
    """Since when it has had one; None while it has none. After an interruption loading does not count."""
    interrupted: float | None = None
    """When it last lost or gave back its last worker; None when it never did."""
    paused_for: str | None = None
    """The job that it gave its last worker back for, until it works again."""

    @property
    def rank(self) -> float:
        return rank(self.demand.order, self.demand.priority)

    @property
    def last(self) -> str | None:
        """The only worker that it keeps, if it keeps just one: it cannot do without."""
        if len(self.workers) - len(self.returning) != 1:
            return None
        return next(worker_id for worker_id in self.workers if worker_id not in self.returning)

    def ran(self, now: float) -> float:
        """Seconds for which it has had a worker."""
        return self.seconds + (0.0 if self.working_since is None else now - self.working_since)


class Ending(msgspec.Struct, kw_only=True):
    """A job that ends otherwise than by its evaluator's report, as soon as nothing works for it any more."""

    holders: set[str]
    """Processes that still have to let go of it."""
    outcome: Literal["cancelled", "failed"]
    error: str | None = None


class Ledger:
    """The pool's books at time `now` (monotonic seconds)."""

    def __init__(self, *, max_workers_per_gpu: int = 1, max_gpus: int | None = None) -> None:
        self.now = 0.0
        self.max_workers_per_gpu = max_workers_per_gpu
        self.max_gpus = max_gpus
        self.waiting = WaitingJobs()
        self.running: dict[str, Running] = {}
        self.ending: dict[str, Ending] = {}
        self.evaluators: dict[str, Evaluator] = {}
        """Those that live. Last those that have run a job, in the order in which they became ready again: the latest
        has its tasks, tokenizer and requests at hand, which the next job may want."""
        self._without_job: dict[str, Evaluator] = {}
        """Of these, those that run no job, in the same order."""
        self.workers: dict[str, Worker] = {}
        self.reclaiming: dict[str, Worker] = {}
        self.leaving: set[str] = set()
        """Live workers that were asked to end, and those that are gone and their memory is not back yet."""
        self.gone_since: dict[str, float] = {}
        """Of these, when they were known to be gone, or will have rested: since when their memory is awaited."""
        self.killed: set[str] = set()
        """Live workers that are being killed: there is no asking them twice."""
        self.unreachable: set[str] = set()
        """Live workers that a job could not reach: they are given to no job any more, and end with those they have."""
        self.needed = Needed()
        self.slots = SlotBook()
        self.replicas: dict[str, list[str]] = {}
        """Replica key -> live workers that have or load that model."""
        self.reserved: dict[str, str] = {}
        """Ready evaluator -> the job that it is kept for. Each pass of the placer begins anew."""
        self.changed: frozenset[str] = frozenset()
        """Replica keys of models whose files have changed or are gone: what is loaded cannot be loaded again."""
        self.load_seconds: dict[str, float] = {}
        """Replica key -> how long the model last took to load, of the LOADS_REMEMBERED models that were loaded last."""
        self.run_seconds: float | None = None
        """How long a job runs, a running average."""
        self.loading_since: dict[str, float] = {}
        self.shared_since: dict[str, float] = {}
        """Worker -> since when more than one job uses it."""

    # ------------------------------------------------------------------ looking things up

    def holder(self, worker_id: str) -> Worker:
        """A worker, live or reclaimed."""
        return self.workers.get(worker_id) or self.reclaiming[worker_id]

    def at_rest(self, worker_id: str, since: float) -> bool:
        """Whether a live worker has had nothing to do since that time, nor has to let go of anything."""
        worker = self.workers.get(worker_id)
        if worker is None or worker.state is not WorkerState.IDLE or worker.idle_since > since:
            return False
        return not any(worker_id in ending.holders for ending in self.ending.values())

    def evaluators_that_are(self, *states: EvaluatorState) -> list[str]:
        """Evaluators in one of these states, none of them RUNNING, the one that has run a job last at the end."""
        return [name for name, evaluator in self._without_job.items() if evaluator.state in states]

    def sharing_for(self, run: Running) -> float:
        """Seconds for which others have used every worker of the job; 0 when one is its own."""
        return min((self.now - self.shared_since.get(worker_id, self.now) for worker_id in run.workers), default=0.0)

    # ------------------------------------------------------------------ writing things down

    def pass_time(self, now: float) -> None:
        """It is that late now."""
        self.now = now
        late = [worker_id for worker_id, since in self.gone_since.items() if now - since > MEMORY_SECONDS]
        if late:
            slots = frozenset(slot_id for worker_id in late for slot_id in self.reclaiming[worker_id].slots)
            self.slots.expect_no_more(slots)

    def start_job(self, demand: Demand, evaluator_id: str) -> Running:
        """A waiting job runs from now on."""
        self.waiting.pop(demand.job_id)
        self.put_evaluator(evaluator_id, Evaluator(EvaluatorState.RUNNING, demand.job_id))
        run = self.running[demand.job_id] = Running(demand=demand, evaluator_id=evaluator_id, seconds=demand.ran_s)
        return run

    def leave_job(self, run: Running, state: EvaluatorState) -> None:
        """The job is in the hands of its evaluator no more, which clears up or ends."""
        del self.running[run.demand.job_id]
        self.put_evaluator(run.evaluator_id, Evaluator(state))

    def put_evaluator(self, evaluator_id: str, evaluator: Evaluator) -> None:
        """A new evaluator, or what is known of it now."""
        self.evaluators[evaluator_id] = evaluator
        if evaluator.state is EvaluatorState.RUNNING:
            self._without_job.pop(evaluator_id, None)
        else:
            self._without_job[evaluator_id] = evaluator

    def forget_evaluator(self, evaluator_id: str) -> Evaluator | None:
        """Strike out an evaluator that is gone. Returns what was known of it."""
        self._without_job.pop(evaluator_id, None)
        return self.evaluators.pop(evaluator_id, None)

    def evaluator_is_ready(self, evaluator_id: str) -> None:
        """It has nothing to do, unless it is being killed, or is gone."""
        evaluator = self.evaluators.get(evaluator_id)
        if evaluator is None or evaluator.state is EvaluatorState.ENDING:
            return
        if evaluator.state is EvaluatorState.CLEARING:
            self.forget_evaluator(evaluator_id)  # the last one in this order is chosen first
        self.put_evaluator(evaluator_id, Evaluator(EvaluatorState.READY))

    def add_worker(self, worker: Worker) -> None:
        """A worker that starts to load."""
        self.workers[worker.id] = worker
        self.loading_since[worker.id] = self.now
        self.replicas.setdefault(worker.spec.replica_key, []).append(worker.id)
        self.slots.hold(worker.slots, worker.id)

    def note_run(self, seconds: float) -> None:
        """A job has ended, for which workers worked so long."""
        self.run_seconds = seconds if self.run_seconds is None else 0.9 * self.run_seconds + 0.1 * seconds

    def note_load(self, worker_id: str) -> None:
        """A worker has loaded: it serves its jobs, or rests."""
        worker = self.workers[worker_id]
        state = advance_worker(worker.state, WorkerEvent.LOADED)
        if worker.jobs:
            state = advance_worker(state, WorkerEvent.ATTACH)
        self.update_worker(worker_id, state=state, idle_since=self.now)
        replica_key = worker.spec.replica_key
        self.load_seconds.pop(replica_key, None)  # the latest ones are last
        self.load_seconds[replica_key] = self.now - self.loading_since.pop(worker_id)
        if len(self.load_seconds) > LOADS_REMEMBERED:
            del self.load_seconds[next(iter(self.load_seconds))]

    def update_worker(self, worker_id: str, **changes: Any) -> None:
        """Change fields of a worker."""
        worker = self.workers[worker_id] = msgspec.structs.replace(self.workers[worker_id], **changes)
        if worker.state is WorkerState.STOPPING:
            self.leaving.add(worker_id)
        if len(worker.jobs) > 1:
            self.shared_since.setdefault(worker_id, self.now)
        else:
            self.shared_since.pop(worker_id, None)

    def forget_worker(self, worker_id: str, *, reclaim: bool) -> Worker | None:
        """Strike out a worker that is gone; it holds its slots on when they are to be reclaimed.

        Returns what was known of it.
        """
        worker = self.workers.pop(worker_id, None)
        if worker is None:
            return None
        self.loading_since.pop(worker_id, None)
        self.shared_since.pop(worker_id, None)
        self.killed.discard(worker_id)
        self.unreachable.discard(worker_id)
        alike = self.replicas[worker.spec.replica_key]
        alike.remove(worker_id)
        if not alike:
            del self.replicas[worker.spec.replica_key]
        self.reclaiming[worker_id], self.gone_since[worker_id] = worker, self.now
        self.leaving.add(worker_id)
        if not reclaim:
            self.return_slots(worker_id)
        return worker

    def let_rest(self, worker_id: str, rest_s: float) -> None:
        """What a worker held that is gone now is looked at again in so many seconds."""
        self.gone_since[worker_id] = self.now + rest_s

    def return_slots(self, worker_id: str) -> None:
        """What a worker that is gone held is free."""
        if worker := self.reclaiming.pop(worker_id, None):
            del self.gone_since[worker_id]
            self.leaving.discard(worker_id)
            self.slots.let_go(worker.slots, worker_id)

    def attach(self, run: Running, worker_id: str) -> None:
        """The job uses the worker from now on."""
        worker = self.workers[worker_id]
        self.update_worker(worker_id, jobs=worker.jobs | {run.demand.job_id})
        if worker.state is WorkerState.IDLE:
            self.update_worker(worker_id, state=advance_worker(worker.state, WorkerEvent.ATTACH))
        run.workers.append(worker_id)
        self._note_last(run)
        if run.interrupted is None or worker.state is not WorkerState.STARTING:
            self.works(run)

    def works(self, run: Running) -> None:
        """The job's time runs from now on, if it did not before."""
        if run.working_since is None:
            run.working_since = self.now
        run.paused_for = None

    def ask_back(self, run: Running, worker_id: str) -> None:
        """The job is to give the worker back; it holds it until then."""
        run.returning.add(worker_id)
        self._note_last(run)

    def _note_last(self, run: Running) -> None:
        last = run.last
        self.needed.note(run.demand.job_id, None if last is None else self.holder(last))

    def release(self, run: Running, worker_id: str) -> None:
        """The job does not use the worker any more, if the worker is still there."""
        run.workers.remove(worker_id)
        run.returning.discard(worker_id)
        self._note_last(run)
        if not run.workers and run.working_since is not None:
            run.seconds, run.working_since, run.interrupted = run.ran(self.now), None, self.now
        if worker := self.workers.get(worker_id):
            jobs, state = worker.jobs - {run.demand.job_id}, worker.state
            if not jobs and state is WorkerState.BUSY:
                state = advance_worker(state, WorkerEvent.RELEASE)
            self.update_worker(worker_id, jobs=jobs, state=state, idle_since=self.now)

    # ------------------------------------------------------------------ invariants

    def check(self) -> None:
        """Raise AssertionError when an invariant is broken."""
        places = [*self.waiting, *self.running, *self.ending]
        assert len(places) == len(set(places)), "a job is in two places"
        at_work = {name: each.job_id for name, each in self.evaluators.items() if each.job_id is not None}
        runs = {run.evaluator_id: job_id for job_id, run in self.running.items()}
        assert at_work == runs, "a job and its evaluator disagree"
        runs_none = [name for name, each in self.evaluators.items() if each.state is not EvaluatorState.RUNNING]
        assert {*runs_none} == {*self._without_job} == self.evaluators.keys() - at_work, "an evaluator runs, but no job"
        leaving = {name for name, worker in self.workers.items() if worker.state is WorkerState.STOPPING}
        assert leaving | self.reclaiming.keys() == self.leaving, "it is not known who leaves"
        for job_id, run in self.running.items():
            assert len(run.workers) == len(set(run.workers)), "a job holds a worker twice"
            assert run.returning <= set(run.workers), "a job gives back what it does not hold"
            assert run.workers or run.working_since is None, "the clock of a job runs without a worker"
            assert not run.workers or run.working_since is not None or run.interrupted is not None, "its clock stands"
            for worker_id in run.workers:
                assert job_id in self.workers[worker_id].jobs, "a job and its worker disagree"
        assert self.unreachable <= self.workers.keys(), "a worker that is gone is not reached"
        for worker in self.workers.values():
            for job_id in worker.jobs:
                assert worker.id in self.running[job_id].workers, "a worker and its job disagree"
            assert (worker.state is WorkerState.BUSY) <= bool(worker.jobs), "a busy worker has no job"
            assert worker.state not in (WorkerState.IDLE, WorkerState.STOPPING) or not worker.jobs, "jobs at rest"
        self._check_slots()

    def _check_slots(self) -> None:
        needed = [self.workers[run.last] for run in self.running.values() if run.last is not None]
        assert self.needed.workers == Counter(worker.id for worker in needed), "it is not known who is needed"
        assert self.needed.slots == Counter(slot for worker in needed for slot in worker.slots), "nor on which slots"
        assert not self.workers.keys() & self.reclaiming.keys(), "a worker is both live and gone"
        leases = sorted((s, w.id) for w in (*self.workers.values(), *self.reclaiming.values()) for s in w.slots)
        assert leases == sorted((s, w) for s, held in self.slots.holders.items() for w in held), (
            "workers and slots disagree"
        )
        for slot_id, held in self.slots.holders.items():
            if len(held) > 1:
                needs = [self.holder(worker_id).memory_bytes for worker_id in held]
                assert all(needs), "a worker that needs a whole slot shares it"
                assert len(held) <= self.max_workers_per_gpu, "more workers on a slot than are allowed"
                assert sum(needs) <= self.slots[slot_id].memory_bytes, "a slot's memory is promised twice"
        assert self.max_gpus is None or self.slots.gpus_held() <= self.max_gpus, "more GPUs are held than are allowed"
