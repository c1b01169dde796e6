"""Which job gets which workers: decisions over the ledger, made anew after every event. Pure.

1. The first waiting job that has to wait for others to end, once it has been first for PATIENCE_SECONDS, is passed no
   more: slots are held for it as they become free, and nobody else is let onto them. So a stream of jobs on one loaded
   model cannot keep it for ever. Of a set of slots none stays idle until the last is free: as soon as one is, the jobs
   on the others pause. They give their workers back, and go on where they were when they get new ones. The least
   important jobs pause, and none that is more important than the one that waits, or whose model is not there any more.
2. Running jobs without workers get new ones, those that have waited for PATIENCE_SECONDS before all others.
3. Waiting jobs start by rank, as many as there are evaluators; one that does not fit is passed by those behind it.
4. Running jobs grow onto what nobody waits for.

A job that would fit without unused or spare replicas has those stopped or given back, and their slots promised to it.
Promises last for one pass; the next pass makes them again, unless it finds something better.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import msgspec

from gpu_pool import events as ev
from gpu_pool.candidates import Candidates
from gpu_pool.ledger import Ledger, Running
from gpu_pool.moves import Moves
from gpu_pool.order import AGEING_SECONDS, NoRoom, rank
from gpu_pool.placement import Plan, Readiness, find_plan, replicas_for
from gpu_pool.records import EvaluatorState, Worker, WorkerState

PATIENCE_SECONDS = 300.0
"""What the better use of slots may cost in waiting: for so long the first in line is passed by others before jobs pause
for it, so much earlier go jobs whose model is loaded, and for so long what has paused works again before it may pause
once more. One number, as the bound on every wait is made of the three together."""
UNKNOWN_LOAD_SECONDS = 10.0
"""Assumed cost of loading a model that has never been loaded here."""
SOON_READY = (EvaluatorState.STARTING, EvaluatorState.CLEARING, EvaluatorState.ENDING)
"""Evaluators that will take a job in a moment, or are replaced by one that will."""


class Head(msgspec.Struct, frozen=True):
    """The first waiting job on a kind of device that has to wait for others to end, and since when it is the first."""

    job_id: str
    since: float


class Placer:
    """Hands out workers, in one pass after another."""

    def __init__(self, ledger: Ledger, moves: Moves, patience_s: float = PATIENCE_SECONDS) -> None:
        self._ledger = ledger
        self._moves = moves
        self._patience_s = patience_s
        self.heads: dict[str, Head] = {}
        """By kind of device: all that one pass leaves to the next."""
        self.evaluators_left: list[str] = []
        """Evaluators that were ready, and for which the last pass found nothing to do."""

    def place(self) -> None:
        """One pass over all that want workers."""
        self._ledger.promised.clear()
        now = Pass(self._ledger, self._moves, self.heads, self._patience_s)
        now.run()
        self.evaluators_left = now.evaluators_left


class Pass:
    """One look at all that want workers, and what it has found out so far."""

    def __init__(self, ledger: Ledger, moves: Moves, heads: dict[str, Head], patience_s: float) -> None:
        """`heads` are those of the last pass, and become those of this one."""
        self._ledger = ledger
        self._moves = moves
        self._heads = heads
        self._patience_s = patience_s
        self.evaluators_left = ledger.evaluators_that_are(EvaluatorState.READY)
        """Evaluators that are ready and not spoken for, the one that has run a job last at the end."""
        self._starved: set[str] = set()
        """Kinds of device on which jobs wait for what others hold: nobody grows there."""
        self._full = NoRoom()
        """Jobs for which no slots are free."""
        self._served: set[str] = set()
        """Waiting jobs that were prepared for before all others."""

    def run(self) -> None:
        """Who goes before whom."""
        ledger = self._ledger
        stuck = sorted((run for run in ledger.running.values() if not run.workers), key=lambda run: run.rank)
        self._resupply([run for run in stuck if self._is_over(run.interrupted)])
        self._serve_heads()
        self._resupply([run for run in stuck if not self._is_over(run.interrupted)])
        if self.evaluators_left:
            candidates = Candidates(ledger, ledger.promised, self._served, bonus=self._patience_s)
            while self.evaluators_left and (demand := candidates.next()):
                if not self._serve(demand):
                    candidates.close()
        if ledger.evaluators_that_are(*SOON_READY):
            self._starved.update(device for device, *_ in ledger.waiting.firsts)
        self._grow()

    # ------------------------------------------------------------------ first workers

    def _find_first(self, demand: ev.Demand, *, name_busy: bool = False) -> Worker | Plan | None:
        """A loaded replica, else free slots, else a replica that loads, else slots that become free soonest.

        A loaded replica is shared rather than another one started: a small job is done before a model is loaded. A job
        that outlives the loading time is spread when it grows. Who finds no free slots is noted: nor do those behind it
        that need as much.
        """
        replicas = replicas_for(demand, self._ledger, self._ledger.promised)
        if replicas and (replicas[0].state is not WorkerState.STARTING or demand in self._full):
            return replicas[0]
        plan = find_plan(demand, self._ledger, self._ledger.promised, name_busy=name_busy)
        if plan is not None and plan.readiness is Readiness.NOW:
            return plan
        self._full.add(demand)
        return replicas[0] if replicas else plan

    def _is_over(self, since: float | None) -> bool:
        """Whether patience is over with what began then."""
        return since is not None and self._ledger.now - since >= self._patience_s

    def _resupply(self, runs: list[Running]) -> None:
        """Get running jobs without workers one each, rather one that others share, or what is needed for one.

        For those that have waited for long slots are held that others must first be done with.
        """
        hopeless = NoRoom()
        for run in runs:
            demand = run.demand
            replicas = replicas_for(demand, self._ledger, self._ledger.promised)
            choice = replicas[0] if replicas else None
            if choice is None and demand not in hopeless:
                choice = find_plan(demand, self._ledger, self._ledger.promised)
            if choice is None:
                hopeless.add(demand)
            elif not self._take(run, choice):
                assert isinstance(choice, Plan)
                self._starved.add(demand.spec.device)
                if run.interrupted is not None and self._is_over(run.interrupted):
                    self._hold(choice, demand, run.interrupted)
                elif choice.readiness is Readiness.BUSY or self._are_wanted(choice.stop):
                    hopeless.add(demand)
                else:
                    self._make_room(choice, demand)

    def _are_wanted(self, worker_ids: tuple[str, ...]) -> bool:
        """Whether jobs on the models of some of these workers wait, which an evaluator will soon be ready for."""
        models = [self._ledger.workers[worker_id].spec.replica_key for worker_id in worker_ids]
        return any(model in self._ledger.waiting.by_model for model in models)

    def _serve_heads(self) -> None:
        """The first in line whose patience is at its end go before all others, if there is an evaluator for them.

        (Evaluators of jobs that have paused are not free: slots held for a job without one could be idle for long.)
        """
        for device, head in list(self._heads.items()):
            demand = self._ledger.waiting.get(head.job_id)
            if demand is None:
                del self._heads[device]
            elif self.evaluators_left and self._is_over(head.since):
                self._served.add(head.job_id)
                self._serve_head(demand, head)

    def _serve_head(self, demand: ev.Demand, head: Head) -> None:
        """Start it, or make room for it; for it slots are held, too, that others must first be done with."""
        choice = self._find_first(demand, name_busy=True)
        if choice is None:
            del self._heads[demand.spec.device]  # there are no such slots: others need not wait for them
        elif not self._begin(demand, choice):
            assert isinstance(choice, Plan)
            self._starved.add(demand.spec.device)
            if choice.readiness is not Readiness.BUSY:
                self._make_room(choice, demand)
                self._reserve_evaluator()
            elif self._hold(choice, demand, head.since):
                self._reserve_evaluator()

    def _serve(self, demand: ev.Demand) -> bool:
        """Start a waiting job, or make room for it without anyone's job having to end.

        False: neither can be done, for it or for any job that needs as much.
        """
        choice = self._find_first(demand)
        if choice is None:
            return False
        if self._begin(demand, choice):
            return True
        assert isinstance(choice, Plan)
        self._starved.add(demand.spec.device)
        if choice.readiness is Readiness.BUSY:
            self._note_head(demand)
            return False
        self._make_room(choice, demand)
        self._reserve_evaluator()
        return True

    def _reserve_evaluator(self) -> None:
        """Leave one to a job that room is being made for: it will start in a moment. Not the one with most at hand."""
        self.evaluators_left.pop(0)

    def _note_head(self, demand: ev.Demand) -> None:
        """This job has to wait for others to end: is it the first in line on its kind of device?"""
        head = self._heads.get(demand.spec.device)
        first = self._ledger.waiting.get(head.job_id) if head else None
        if first is None or rank(demand.order, demand.priority) < rank(first.order, first.priority):
            self._heads[demand.spec.device] = Head(demand.job_id, self._ledger.now)

    def _begin(self, demand: ev.Demand, choice: Worker | Plan) -> bool:
        """Start a waiting job with the evaluator that ran a job last, and this worker; False when its slots are not
        free."""
        if isinstance(choice, Plan) and choice.readiness is not Readiness.NOW:
            return False
        return self._take(self._moves.start_job(demand, self.evaluators_left.pop()), choice)

    # ------------------------------------------------------------------ further workers

    def _grow(self) -> None:
        """One worker at a time to the job that has fewest, until nobody can use what is left."""
        if not self._anything_is_left():
            return
        running = self._ledger.running
        line = [(len(run.workers), run.rank, job_id) for job_id, run in running.items() if self._may_grow(run)]
        heapq.heapify(line)
        hopeless = NoRoom()
        while line:
            count, its_rank, job_id = heapq.heappop(line)
            run = running[job_id]
            choice = self._next_choice(run, count, hopeless)
            if choice is not None:
                if not self._take(run, choice):
                    assert isinstance(choice, Plan)
                    self._make_room(choice, run.demand)
                heapq.heappush(line, (count + 1, its_rank, job_id))

    def _anything_is_left(self) -> bool:
        """Whether any slot could get a worker soon, or any worker a job; mostly not, and there is no more to do."""
        ledger = self._ledger
        unused = any(not worker.jobs for worker in ledger.workers.values())
        return unused or ledger.max_workers_per_gpu > 1 or any(not ledger.holders.get(slot) for slot in ledger.slots)

    def _may_grow(self, run: Running) -> bool:
        return bool(run.workers) and run.may_grow and run.demand.spec.device not in self._starved

    def _next_choice(self, run: Running, count: int, hopeless: NoRoom) -> Worker | Plan | None:
        """A running job's further worker when it has or is promised `count`, or its own one instead of a shared one.

        Below its cap it takes unused replicas, then free slots, then the slot of an unused replica of another model. At
        its cap, when others have used all it has for as long as loading takes, it moves to a replica of its own. Those
        in `hopeless` have found no slots in this pass; this one may join them.
        """
        demand = run.demand
        sharing = all(len(self._ledger.workers[worker_id].jobs) > 1 for worker_id in run.workers)
        if count >= demand.max_replicas and (count > len(run.workers) or not sharing):
            return None
        for worker in replicas_for(demand, self._ledger, self._ledger.promised):
            if not worker.jobs and worker.id not in run.workers:
                return worker
        if demand in hopeless:
            return None
        plan = find_plan(demand, self._ledger, self._ledger.promised, apart=run.workers)
        if plan is None or plan.readiness > Readiness.UNUSED:
            if self._ledger.max_workers_per_gpu == 1:
                hopeless.add(demand)  # else another job may find room beside others, where this one is already
            return None
        if count < demand.max_replicas:
            return plan
        patience = self._ledger.load_seconds.get(demand.spec.replica_key, UNKNOWN_LOAD_SECONDS)
        return plan if plan.readiness is Readiness.NOW and self._ledger.sharing_for(run) > patience else None

    # ------------------------------------------------------------------ carrying it out

    def _take(self, run: Running, choice: Worker | Plan) -> bool:
        """Let the job have this worker, or one in these slots; False when they are not free."""
        if isinstance(choice, Plan):
            if choice.readiness is not Readiness.NOW:
                return False
            self._ledger.attach(run, self._moves.start_worker(run.demand, choice.slots))
            return True
        self._ledger.attach(run, choice.id)
        if choice.state is not WorkerState.STARTING:
            self._moves.attach(run, choice.id)
            self._moves.trim(run)
        return True

    def _make_room(self, plan: Plan, demand: ev.Demand) -> None:
        """Have what is in the way of a plan stopped or given back, and keep its slots from others."""
        self._keep(plan.slots, demand)
        for worker_id in plan.stop:
            self._moves.stop(worker_id)
        for worker_id in plan.give_back:
            self._moves.give_back(worker_id)

    def _keep(self, slot_ids: Iterable[str], demand: ev.Demand) -> None:
        self._ledger.promised.update(dict.fromkeys(slot_ids, demand.job_id))

    def _hold(self, plan: Plan, demand: ev.Demand, since: float) -> bool:
        """Make room for a job that has waited since then, and keep from others what jobs have to leave first: they end,
        or pause when other slots are idle. None pauses while the model of one there could not be loaded again.

        False: the slots would not become free together, and a job there must not pause, or a slot cannot be used at all
        for now; they are left alone.
        """
        busy = [self._ledger.workers[worker_id] for worker_id in plan.busy]
        if wide := next((worker for worker in busy if len(worker.slots) >= len(plan.slots)), None):
            self._keep(wide.slots, demand)  # when its jobs end there is room: nothing is gained by a pause
            return True
        weight = demand.priority + (self._ledger.now - since) / AGEING_SECONDS
        if not all(self._may_pause(self._ledger.running[job_id], weight) for worker in busy for job_id in worker.jobs):
            return False
        if any(slot_id in self._ledger.unusable for slot_id in plan.slots):
            return False
        drained = {slot_id for worker in busy for slot_id in worker.slots}
        some_are_idle = any(self._is_idle(slot_id) for slot_id in plan.slots)
        all_can_load_again = not any(worker.spec.replica_key in self._ledger.changed for worker in busy)
        self._make_room(plan, demand)
        self._keep(drained, demand)
        if some_are_idle and all_can_load_again:
            for worker in busy:
                for job_id in worker.jobs:
                    self._ledger.running[job_id].paused_for = demand.job_id
                self._moves.take_back(worker.id)
        return True

    def _may_pause(self, run: Running, weight: float) -> bool:
        """Not for a job of less weight, its priority and what its waiting adds to that; nor again before it has worked
        for a while, loading not counted."""
        return run.demand.priority <= weight and (run.interrupted is None or self._is_over(run.working_since))

    def _is_idle(self, slot_id: str) -> bool:
        """Whether the slot is free, or its workers have no jobs. (What is on its way out may yet keep its memory.)"""
        holders = [self._ledger.workers.get(worker_id) for worker_id in self._ledger.holders.get(slot_id, ())]
        return all(worker and not worker.jobs and worker.state is not WorkerState.STOPPING for worker in holders)
