"""Which job gets which workers: decisions over the ledger, made anew after every event. Pure.

`Pass.run` is one pass, in this order:

1. Running jobs that have been without workers for longer than patience lasts get new ones.
2. The heads (`heads`) are served: waiting jobs that others have passed for so long. Slots are held for them as they
   become free (`room`), and nobody else is let onto those: else a stream of jobs on one loaded model could keep a GPU
   for ever. Of a set of slots none stays idle until the last is free: as soon as one is, the jobs on the others pause.
   They give their workers back, and go on where they were when they get new ones. None pauses that is more important
   than the job that waits, or whose model is not there any more; while such a one runs, others may use what is idle.
3. The other running jobs without workers get new ones.
4. Waiting jobs start by rank (`candidates`), as many as there are evaluators; one that does not fit is passed by those
   behind it, and may become a head.
5. Running jobs grow onto what is left (`growth`), and give it back as soon as a job wants it.

A job that would fit without unused or spare replicas has those stopped or given back, and their slots promised to it.
Promises last for one pass; the next pass makes them again, unless it finds something better.
"""

from __future__ import annotations

from gpu_pool import events as ev
from gpu_pool.candidates import Candidates
from gpu_pool.growth import Growth
from gpu_pool.heads import Head, Heads
from gpu_pool.ledger import SOON_READY, Ledger, Running
from gpu_pool.moves import Moves
from gpu_pool.order import NoRoom
from gpu_pool.placement import Plan, Readiness, find_plan, replicas_for
from gpu_pool.records import EvaluatorState, Worker, WorkerState
from gpu_pool.room import Room

PATIENCE_SECONDS = 300.0
"""What the better use of slots may cost in waiting: for so long the first in line is passed by others before jobs pause
for it, so much earlier go jobs whose model is loaded, and for so long what has paused works again before it may pause
once more. One number, as the bound on every wait is made of the three together."""


class Placer:
    """Hands out workers, in one pass after another."""

    def __init__(self, ledger: Ledger, moves: Moves, patience_s: float = PATIENCE_SECONDS) -> None:
        self._ledger = ledger
        self._moves = moves
        self._patience_s = patience_s
        self._room = Room(ledger, moves, patience_s)
        self.heads = Heads(patience_s)
        self.evaluators_left: list[str] = []
        """Evaluators that were ready, and for which the last pass found nothing to do."""

    def place(self) -> None:
        """One pass over all that want workers."""
        self._ledger.slots.promised.clear()
        self._ledger.reserved.clear()
        self.heads.forget_others(self._ledger.waiting)
        self._room.forget_others()
        now = Pass(self._ledger, self._moves, self._room, self.heads, self._patience_s)
        now.run()
        self.evaluators_left = now.evaluators_left


class Pass:
    """One look at all that want workers, and what it has found out so far."""

    def __init__(self, ledger: Ledger, moves: Moves, room: Room, heads: Heads, patience_s: float) -> None:
        """`heads` are those that the last pass left, and get those of this one."""
        self._ledger = ledger
        self._moves = moves
        self._room = room
        self._heads = heads
        self._patience_s = patience_s
        self.evaluators_left = ledger.evaluators_that_are(EvaluatorState.READY)
        """Evaluators that are ready and not spoken for, the one that has run a job last at the end."""
        self._coming = len(ledger.evaluators_that_are(*SOON_READY))
        """Evaluators that will be ready in a moment and are not spoken for."""
        self._full = NoRoom()
        """Waiting jobs for which no slots are free."""
        self._served: set[str] = set()
        """Heads that were served before all others."""

    def run(self) -> None:
        """Who goes before whom."""
        stuck = [run for run in self._ledger.running.values() if not run.workers]
        stuck.sort(key=lambda run: run.rank)
        self._resupply([run for run in stuck if self._is_over(run.interrupted)])
        self._serve_heads()
        self._resupply([run for run in stuck if not self._is_over(run.interrupted)])
        self._start_waiting()
        Growth(self._ledger, self._room).grow()

    # ------------------------------------------------------------------ running jobs without workers

    def _is_over(self, since: float | None) -> bool:
        """Whether patience is over with what began then."""
        return since is not None and self._ledger.now - since >= self._patience_s

    def _resupply(self, runs: list[Running]) -> None:
        """Get running jobs without workers one each, rather one that others share, or what is needed for one.

        For those that have waited for long slots are held that others must first be done with.
        """
        no_room = NoRoom()
        for run in runs:
            demand = run.demand
            replicas = replicas_for(demand, self._ledger, self._ledger.slots.promised)
            choice = replicas[0] if replicas else None
            if choice is None and demand not in no_room:
                choice = find_plan(demand, self._ledger)
            if choice is None:
                no_room.add(demand)
            elif not self._room.take(run, choice):
                assert isinstance(choice, Plan)
                if run.interrupted is not None and self._is_over(run.interrupted):
                    self._clear(choice, demand, run.interrupted, may_pause=True)
                elif choice.readiness is Readiness.BUSY or self._are_wanted(choice.stop):
                    no_room.add(demand)
                else:
                    self._room.make(choice, demand)

    def _clear(self, plan: Plan, demand: ev.Demand, since: float, *, may_pause: bool) -> bool:
        """Make room for a job with which patience is over; whether there will be some in a moment."""
        if plan.readiness is Readiness.BUSY:
            return self._room.hold(plan, demand, since, may_pause=may_pause)
        self._room.make(plan, demand)
        return True

    def _are_wanted(self, worker_ids: tuple[str, ...]) -> bool:
        """Whether jobs on the models of some of these workers wait, which an evaluator will soon be ready for."""
        models = [self._ledger.workers[worker_id].spec.replica_key for worker_id in worker_ids]
        return any(model in self._ledger.waiting.by_model for model in models)

    # ------------------------------------------------------------------ waiting jobs

    def _serve_heads(self) -> None:
        """Those with which patience is over go before all others, if there is an evaluator for them, or soon will be.

        (Evaluators of jobs that have paused are not free: slots held for a job without one could be idle for long.)
        """
        for head in self._heads.due(self._ledger.now):
            if not self.evaluators_left and not self._coming:
                return
            self._served.add(head.demand.job_id)
            self._serve_head(head)

    def _serve_head(self, head: Head) -> None:
        """Start it, or make room for it; for it slots are held, too, that others must first be done with."""
        demand = head.demand
        choice = self._find_first(demand, name_busy=True)
        if choice is None:
            return
        if isinstance(choice, Worker) or choice.readiness is Readiness.NOW:
            if self.evaluators_left:
                self._begin(demand, choice)
            else:
                self._reserve_evaluator(demand)
                if isinstance(choice, Plan):
                    self._room.keep(choice.slots, demand)
        elif self._clear(choice, demand, head.since, may_pause=bool(self.evaluators_left)):
            self._reserve_evaluator(demand)

    def _start_waiting(self) -> None:
        """By rank, until there is no evaluator for anyone else."""
        if not self.evaluators_left:
            return
        candidates = Candidates(
            self._ledger, self._heads, self._ledger.slots.promised, self._served, bonus=self._patience_s
        )
        while self.evaluators_left and (demand := candidates.next()):
            if not self._serve(demand):
                candidates.close()

    def _serve(self, demand: ev.Demand) -> bool:
        """Start a waiting job, or make room for it without anyone's job having to end.

        False: neither can be done, for it or for any job that needs as much.
        """
        choice = self._find_first(demand)
        if choice is None:
            return False
        if isinstance(choice, Worker) or choice.readiness is Readiness.NOW:
            self._begin(demand, choice)
            return True
        if choice.readiness is Readiness.BUSY:
            self._heads.note(demand, self._ledger.now)
            return False
        self._room.make(choice, demand)
        self._reserve_evaluator(demand)
        return True

    def _find_first(self, demand: ev.Demand, *, name_busy: bool = False) -> Worker | Plan | None:
        """A loaded replica, else free slots, else a replica that loads, else slots that become free soonest.

        A loaded replica is shared rather than another one started: a small job is done before a model is loaded. A job
        that outlives the loading time is spread when it grows. Who finds no free slots is noted: nor do those behind it
        that need as much.
        """
        replicas = replicas_for(demand, self._ledger, self._ledger.slots.promised)
        if replicas and (replicas[0].state is not WorkerState.STARTING or demand in self._full):
            return replicas[0]
        plan = find_plan(demand, self._ledger, name_busy=name_busy)
        if plan is not None and plan.readiness is Readiness.NOW:
            return plan
        self._full.add(demand)
        return replicas[0] if replicas else plan

    def _begin(self, demand: ev.Demand, choice: Worker | Plan) -> None:
        """Start a waiting job with the evaluator that ran a job last, and this worker, or one in these free slots."""
        self._room.take(self._moves.start_job(demand, self.evaluators_left.pop()), choice)

    def _reserve_evaluator(self, demand: ev.Demand) -> None:
        """Leave one to a job that will start in a moment: a ready one, but not the one with most at hand, or the next
        one to be ready."""
        if self.evaluators_left:
            self._ledger.reserved[self.evaluators_left.pop(0)] = demand.job_id
        else:
            self._coming -= 1
