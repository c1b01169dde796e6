"""Why jobs wait, and when they may start: pure questions to the ledger, for people.

An estimate takes the waiting jobs in their order and gives each the slots that are free soonest, as running jobs end
after the seconds that they are said to need. It knows nothing of jobs that are still to come.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping

from gpu_pool.events import Demand
from gpu_pool.ledger import Ledger
from gpu_pool.order import Shape, shape_of
from gpu_pool.placement import Readiness, readiness_of, replicas_for
from gpu_pool.records import Slot, WaitingView, WorkerState

_GIB = 1 << 30


def explain(ledger: Ledger, seconds_left: Mapping[str, float], limit: int) -> list[WaitingView]:
    """The running jobs that have lost all their workers, then the first `limit` waiting jobs in their order.

    `seconds_left` says of running jobs how long they still need, where that is known.
    """
    stuck = sorted((run for run in ledger.running.values() if not run.workers), key=lambda run: run.rank)
    forecast = _Forecast(ledger, seconds_left)
    reasons: dict[Shape, str] = {}
    waits: list[WaitingView] = []
    for demand in [*(run.demand for run in stuck), *_first(ledger.waiting.values(), limit)]:
        shape = shape_of(demand)
        if shape not in reasons:
            reasons[shape] = _situation(demand, ledger, seconds_left)
        has_evaluator = demand.job_id in ledger.running
        reason = "It has no workers now. " * has_evaluator + _queue_reason(demand, ledger) + reasons[shape]
        starts_in = forecast.start(demand, has_evaluator)
        waits.append(WaitingView(job_id=demand.job_id, needs=_needs(demand), reason=reason, starts_in=starts_in))
    return waits


def _first(demands: Iterable[Demand], limit: int) -> list[Demand]:
    return [demand for _, demand in zip(range(limit), demands, strict=False)]


def _needs(demand: Demand) -> str:
    if demand.spec.device == "cpu":
        return "a CPU worker"
    count = "1 GPU" if demand.gpus == 1 else f"{demand.gpus} GPUs at once"
    which = demand.slot_id or (f"cuda:{demand.slot_index}" if demand.slot_index is not None else None)
    only = f", and only {which}" if which else ""
    room = f" with {demand.memory_bytes / _GIB:.1f} GiB free" if demand.memory_bytes else ""
    return f"{count}{room}{only}"


def _queue_reason(demand: Demand, ledger: Ledger) -> str:
    """What has nothing to do with slots."""
    if demand.job_id in ledger.running or any(job is None for job in ledger.evaluators.values()):
        return ""
    if all(job in ledger.running for job in ledger.evaluators.values()):
        return f"All {len(ledger.evaluators)} evaluators run jobs. "
    return "An evaluator is starting. "


def _situation(demand: Demand, ledger: Ledger, seconds_left: Mapping[str, float]) -> str:
    """What there is for a demand of this shape, slot by slot."""
    suited = [slot for slot in ledger.slots.values() if demand.accepts(slot)]
    free = [slot for slot in suited if ledger.usable(slot.id) and not ledger.holders.get(slot.id)]
    noun = "CPU worker" if demand.spec.device == "cpu" else "GPU"
    if len(suited) == 1:
        said = [f"The only {noun} that would do is {'free' if free else 'not free'}."]
    else:
        said = [f"{len(free)} of the {len(suited)} {noun}s that would do are free."]
    held = [_holders(slot, ledger, seconds_left) for slot in suited if ledger.holders.get(slot.id)]
    if held:
        said.append(f"Held: {'; '.join(held)}.")
    if refused := {ledger.refused[slot.id] for slot in suited if slot.id in ledger.refused and ledger.usable(slot.id)}:
        said.append(f"Refused beside them: {' '.join(sorted(refused))}")
    unusable = [f"{_name(slot)}: {_why(slot, ledger)}" for slot in suited if not ledger.usable(slot.id)]
    if unusable:
        said.append(f"Not usable: {'; '.join(unusable)}.")
    if ledger.max_gpus is not None and demand.spec.device == "cuda" and ledger.gpus_held() >= ledger.max_gpus:
        most = "1 GPU" if ledger.max_gpus == 1 else f"{ledger.max_gpus} GPUs"
        said.append(f"No more than {most} may be held (setting max_gpus).")
    return " ".join(said)


def _holders(slot: Slot, ledger: Ledger, seconds_left: Mapping[str, float]) -> str:
    return f"{_name(slot)} by " + " and ".join(
        f"{worker_id} ({_doing(worker_id, ledger, seconds_left)})" for worker_id in ledger.holders[slot.id]
    )


def _doing(worker_id: str, ledger: Ledger, seconds_left: Mapping[str, float]) -> str:
    worker = ledger.holder(worker_id)
    if worker_id in ledger.reclaiming:
        return "gone, its memory is not back yet"
    if worker.state is WorkerState.STOPPING:
        return "ending"
    if not worker.jobs:
        return "without a job"
    jobs = [
        f"job {job_id}, about {seconds_left[job_id]:.0f} s left" if job_id in seconds_left else f"job {job_id}"
        for job_id in sorted(worker.jobs)
    ]
    verb = "is given back by " if readiness_of(worker, ledger) is Readiness.LEAVING else ""
    return verb + ", ".join(jobs)


def _why(slot: Slot, ledger: Ledger) -> str:
    reason = ledger.unusable.get(slot.id, "it is not there any more")
    return reason.removeprefix(f"{_name(slot)}: ").rstrip(".")  # a refusal names the GPU itself


def _name(slot: Slot) -> str:
    return f"GPU {slot.index}" if slot.device == "cuda" else slot.id


class _Forecast:
    """Hands out slots and evaluators in time, to one job after another."""

    def __init__(self, ledger: Ledger, seconds_left: Mapping[str, float]) -> None:
        self._ledger = ledger
        self._free_in = {slot_id: self._free(slot_id, seconds_left) for slot_id in ledger.slots}
        running = ledger.running
        self._evaluators = [
            seconds_left.get(job, math.inf) if job and job in running else 0.0 for job in ledger.evaluators.values()
        ]
        heapq.heapify(self._evaluators)

    def _free(self, slot_id: str, seconds_left: Mapping[str, float]) -> float:
        """Seconds until the slot could be free; infinite where that is not known."""
        if not self._ledger.usable(slot_id) or slot_id in self._ledger.unusable:
            return math.inf
        workers = [self._ledger.holder(worker_id) for worker_id in self._ledger.holders.get(slot_id, ())]
        busy = [worker for worker in workers if readiness_of(worker, self._ledger) is Readiness.BUSY]
        return max((seconds_left.get(job, math.inf) for worker in busy for job in worker.jobs), default=0.0)

    def start(self, demand: Demand, has_evaluator: bool) -> float | None:
        """When the job starts, seconds from now, if that can be said; what it takes is taken for those after it."""
        slots = [slot.id for slot in self._ledger.slots.values() if demand.accepts(slot)]
        slots = heapq.nsmallest(demand.gpus, slots, key=self._free_in.__getitem__)
        shared = any(worker.state is not WorkerState.STARTING for worker in replicas_for(demand, self._ledger))
        room = 0.0 if shared else max((self._free_in[slot_id] for slot_id in slots), default=math.inf)
        if len(slots) < demand.gpus and not shared:
            return None
        evaluator = 0.0 if has_evaluator or not self._evaluators else self._evaluators[0]
        start = max(room, evaluator)
        runs = math.inf if self._ledger.run_seconds is None else self._ledger.run_seconds
        loads = self._ledger.load_seconds.get(demand.spec.replica_key, 0.0)
        if not shared:
            self._free_in.update(dict.fromkeys(slots, start + loads + runs))
        if not has_evaluator and self._evaluators:
            heapq.heapreplace(self._evaluators, start + loads + runs)
        return start if math.isfinite(start) else None
