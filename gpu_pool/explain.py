"""Why jobs wait, and when they may start: pure questions to the ledger, for people.

An estimate takes the waiting jobs in their order, those that slots are kept for first, and gives each the slots that
are free soonest, as running jobs end after the seconds that they are said to need. It knows nothing of jobs that are
still to come, and says nothing where it would only guess.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping

from gpu_pool.events import Demand
from gpu_pool.hardware import Slot
from gpu_pool.ledger import Evaluator, Ledger
from gpu_pool.order import Shape, shape_of
from gpu_pool.placement import Readiness, readiness_of, replicas_for
from gpu_pool.records import EvaluatorState, WorkerState
from gpu_pool.views import WaitingView

_GIB = 1 << 30
_NOUNS = {"api": "endpoint", "cpu": "CPU worker", "cuda": "GPU"}


def explain(ledger: Ledger, seconds_left: Mapping[str, float], limit: int) -> list[WaitingView]:
    """The running jobs that have lost all their workers, then the first `limit` waiting jobs in their order.

    `seconds_left` says of running jobs how long they still need, where that is known.
    """
    stuck = sorted((run for run in ledger.running.values() if not run.workers), key=lambda run: run.rank)
    explained = [*(run.demand for run in stuck), *_first(ledger.waiting.values(), limit)]
    starts = _starts(explained, ledger, seconds_left)
    situations: dict[Shape, str] = {}
    waits: list[WaitingView] = []
    for demand in explained:
        shape = shape_of(demand)
        if shape not in situations:
            situations[shape] = _situation(demand, ledger, seconds_left)
        reason = _evaluator_reason(demand, ledger) + situations[shape] + _kept_reason(demand, ledger)
        waits.append(
            WaitingView(job_id=demand.job_id, needs=_needs(demand), reason=reason, starts_in=starts[demand.job_id])
        )
    return waits


def _starts(demands: Iterable[Demand], ledger: Ledger, seconds_left: Mapping[str, float]) -> dict[str, float | None]:
    """Job -> seconds until it is expected to start."""
    forecast = _Forecast(ledger, seconds_left)
    keepers = dict.fromkeys(ledger.slots.promised.values())
    first = [demand for job_id in keepers if (demand := ledger.waiting.get(job_id))]
    starts: dict[str, float | None] = {}
    for demand in (*first, *demands):
        if demand.job_id not in starts:
            starts[demand.job_id] = forecast.start(demand)
    return starts


def _first(demands: Iterable[Demand], limit: int) -> list[Demand]:
    return [demand for _, demand in zip(range(limit), demands, strict=False)]


def _needs(demand: Demand) -> str:
    if demand.spec.api is not None:
        return f"the endpoint {demand.spec.api.endpoint}"
    if demand.spec.device == "cpu":
        return "a CPU worker"
    count = "1 GPU" if demand.gpus == 1 else f"{demand.gpus} GPUs at once"
    which = demand.slot_id or (f"cuda:{demand.slot_index}" if demand.slot_index is not None else None)
    only = f", and only {which}" if which else ""
    room = f" with {demand.memory_bytes / _GIB:.1f} GiB free" if demand.memory_bytes else ""
    return f"{count}{room}{only}"


def _evaluator_reason(demand: Demand, ledger: Ledger) -> str:
    """What has nothing to do with slots."""
    if run := ledger.running.get(demand.job_id):
        return f"It has paused for job {run.paused_for}. " if run.paused_for else "It has no workers now. "
    ready = ledger.evaluators_that_are(EvaluatorState.READY)
    keepers = [ledger.reserved.get(evaluator_id, demand.job_id) for evaluator_id in ready]
    if demand.job_id in keepers:
        return ""
    if keepers:
        jobs = ", ".join(f"job {job_id}" for job_id in sorted(set(keepers)))
        return f"Evaluators that are ready are kept for others ({jobs}). "
    if len(ledger.running) == len(ledger.evaluators):
        return f"All {len(ledger.evaluators)} evaluators run jobs. "
    return "An evaluator is starting. "


def _situation(demand: Demand, ledger: Ledger, seconds_left: Mapping[str, float]) -> str:
    """What there is for a demand of this shape, slot by slot."""
    suited = [slot for slot in ledger.slots.values() if demand.accepts(slot)]
    free = [slot for slot in suited if ledger.slots.usable(slot.id) and not ledger.slots.holders.get(slot.id)]
    noun = _NOUNS[demand.spec.device]
    if not suited:
        said = [f"No {noun} that would do is there."]
    elif len(suited) == 1:
        said = [f"The only {noun} that would do is {'free' if free else 'not free'}."]
    else:
        said = [f"{len(free)} of the {len(suited)} {noun}s that would do are free."]
    held = [slot for slot in suited if ledger.slots.holders.get(slot.id)]
    if held:
        said.append(f"Held: {'; '.join(_holders(slot, ledger, seconds_left) for slot in held)}.")
    if wrong := _wrong_with(held, ledger):
        said.append(f"Of those held: {wrong}.")
    if refused := {
        ledger.slots.refused[slot.id]
        for slot in suited
        if slot.id in ledger.slots.refused and ledger.slots.usable(slot.id)
    }:
        said.append(f"Refused beside them: {' '.join(sorted(refused))}")
    unusable = [f"{_name(slot)}: {_why(slot, ledger)}" for slot in suited if not ledger.slots.usable(slot.id)]
    if unusable:
        said.append(f"Not usable: {'; '.join(unusable)}.")
    cap = ledger.max_gpus if demand.spec.device == "cuda" else None
    if cap is not None and ledger.slots.gpus_held() + demand.gpus > cap:
        most = "1 GPU" if cap == 1 else f"{cap} GPUs"
        gpus = [slot for slot in ledger.slots.values() if slot.device == "cuda" and slot not in suited]
        others = [_holders(slot, ledger, seconds_left) for slot in gpus if ledger.slots.holders.get(slot.id)]
        said.append(f"No more than {most} may be held (setting max_gpus){': ' if others else ''}{'; '.join(others)}.")
    return " ".join(said)


def _wrong_with(held: Iterable[Slot], ledger: Ledger) -> str:
    """What the last look had against these slots, which counts once nobody holds them: a driver that is gone, say."""
    names: dict[str, list[str]] = {}
    for slot in held:
        if slot.id in ledger.slots.unusable and slot.id not in ledger.slots.refused and ledger.slots.usable(slot.id):
            names.setdefault(_why(slot, ledger), []).append(_name(slot))
    return "; ".join(f"{', '.join(some)}: {why}" for why, some in names.items())


def _kept_reason(demand: Demand, ledger: Ledger) -> str:
    """Which of the slots that would do are promised to others."""
    kept = [
        f"{_name(slot)} (job {job_id})"
        for slot in ledger.slots.values()
        if demand.accepts(slot) and (job_id := ledger.slots.promised.get(slot.id, demand.job_id)) != demand.job_id
    ]
    return f" Kept for others: {', '.join(kept)}." if kept else ""


def _holders(slot: Slot, ledger: Ledger, seconds_left: Mapping[str, float]) -> str:
    return f"{_name(slot)} by " + " and ".join(
        f"{worker_id} ({_doing(worker_id, ledger, seconds_left)})" for worker_id in ledger.slots.holders[slot.id]
    )


def _doing(worker_id: str, ledger: Ledger, seconds_left: Mapping[str, float]) -> str:
    worker = ledger.holder(worker_id)
    if worker_id in ledger.reclaiming:
        rest_s = ledger.gone_since[worker_id] - ledger.now
        if rest_s > 0:
            return f"killed as those before it; what it held rests for {math.ceil(rest_s)} s"
        return "gone, its memory is not back yet"
    if worker.state is WorkerState.STOPPING:
        return "ending"
    loads = worker.state is WorkerState.STARTING
    if not worker.jobs:
        return "loading, without a job" if loads else "without a job"
    jobs = [
        f"job {job_id}, about {seconds_left[job_id]:.0f} s left" if job_id in seconds_left else f"job {job_id}"
        for job_id in sorted(worker.jobs)
    ]
    verb = "is given back by " if readiness_of(worker, ledger) is Readiness.LEAVING else ""
    return ("loading for " if loads else verb) + ", ".join(jobs)


def _why(slot: Slot, ledger: Ledger) -> str:
    gone = "its memory should be back by now" if slot.id in ledger.slots.overdue else "it is not there any more"
    reason = ledger.slots.unusable.get(slot.id, gone)
    return reason.removeprefix(f"{_name(slot)}: ").rstrip(".")  # a refusal names the GPU itself


def _name(slot: Slot) -> str:
    return f"GPU {slot.index}" if slot.device == "cuda" else slot.id


class _Forecast:
    """Hands out slots and evaluators in time, to one job after another."""

    def __init__(self, ledger: Ledger, seconds_left: Mapping[str, float]) -> None:
        self._ledger = ledger
        self._seconds_left = seconds_left
        self._free_in = {slot_id: self._free(slot_id) for slot_id in ledger.slots}
        self._held = {slot_id for slot_id, workers in ledger.slots.holders.items() if workers}
        self._gpus_left = math.inf if ledger.max_gpus is None else ledger.max_gpus - ledger.slots.gpus_held()
        """How many more the cap allows."""
        self._evaluators = [self._ready_in(evaluator) for evaluator in ledger.evaluators.values()]
        heapq.heapify(self._evaluators)
        self._one_is_ready = len(ledger.evaluators_that_are(EvaluatorState.READY)) > len(ledger.reserved)

    def _ready_in(self, evaluator: Evaluator) -> float:
        """Seconds until it could be ready."""
        return 0.0 if evaluator.job_id is None else self._seconds_left.get(evaluator.job_id, math.inf)

    def _free(self, slot_id: str) -> float:
        """Seconds until the slot could be free; infinite where that is not known."""
        if not self._ledger.slots.usable(slot_id) or slot_id in self._ledger.slots.unusable:
            return math.inf
        grower = self._ledger.slots.promised.get(slot_id)
        if grower in self._ledger.running and self._ledger.running[grower].workers:
            return self._seconds_left.get(grower, math.inf)
        workers = [self._ledger.holder(worker_id) for worker_id in self._ledger.slots.holders.get(slot_id, ())]
        busy = [worker for worker in workers if readiness_of(worker, self._ledger) is Readiness.BUSY]
        return max((self._seconds_left.get(job, math.inf) for worker in busy for job in worker.jobs), default=0.0)

    def start(self, demand: Demand) -> float | None:
        """When the job starts, seconds from now, if that can be said; what it takes is taken for those after it."""
        has_evaluator = demand.job_id in self._ledger.running
        slots: list[str] = []
        if not self._is_served(demand):
            slots = self._soonest(demand)
            if len(slots) < demand.gpus:
                return None
        room = max((self._free_in[slot_id] for slot_id in slots), default=0.0)
        evaluator = 0.0 if has_evaluator or not self._evaluators else self._evaluators[0]
        start = max(room, evaluator)
        runs = math.inf if self._ledger.run_seconds is None else self._ledger.run_seconds
        ends = start + self._ledger.load_seconds.get(demand.spec.replica_key, 0.0) + runs
        self._free_in.update(dict.fromkeys(slots, ends))
        fresh = set(slots) - self._held
        self._held |= fresh
        self._gpus_left -= len(fresh) if demand.spec.device == "cuda" else 0
        if not has_evaluator and self._evaluators:
            heapq.heapreplace(self._evaluators, ends)
        if (
            not start
            and (has_evaluator or self._one_is_ready)
            and demand.job_id not in self._ledger.slots.promised.values()
        ):
            return None  # it could have been started: whatever it waits for is not known here
        return start if math.isfinite(start) else None

    def _is_served(self, demand: Demand) -> bool:
        """Whether there is a loaded replica of its model, which is not kept for others."""
        taken = [slot_id for slot_id, job_id in self._ledger.slots.promised.items() if job_id != demand.job_id]
        return any(worker.state is not WorkerState.STARTING for worker in replicas_for(demand, self._ledger, taken))

    def _soonest(self, demand: Demand) -> list[str]:
        """Slots for one replica: those that are kept for it, else those that are free first, within the cap on GPUs."""
        suited = [slot.id for slot in self._ledger.slots.values() if demand.accepts(slot)]
        kept = [slot_id for slot_id in suited if self._ledger.slots.promised.get(slot_id) == demand.job_id]
        soonest = sorted(kept if len(kept) >= demand.gpus else suited, key=self._free_in.__getitem__)
        chosen: list[str] = []
        fresh = 0
        for slot_id in soonest:
            if slot_id not in self._held and demand.spec.device == "cuda":
                if fresh >= self._gpus_left:
                    continue
                fresh += 1
            chosen.append(slot_id)
        return chosen[: demand.gpus]
