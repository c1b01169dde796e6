"""Where a replica could live, and how soon: pure questions to the ledger.

A slot is ready for a job in one of five degrees, by what has to happen first to the workers that hold it. A replica
takes the slots that are ready soonest: all that it needs, or none.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable

import msgspec

from gpu_pool.events import Demand
from gpu_pool.hardware import Slot
from gpu_pool.ledger import Ledger
from gpu_pool.records import Worker, WorkerState


class Readiness(enum.IntEnum):
    """What stands between a job and a slot; of a set of slots the worst."""

    NOW = 0  # nothing: there is room
    LEAVING = 1  # workers that are ending or being given back, or memory that is not back yet
    UNUSED = 2  # workers without a job, which can be stopped
    SPARE = 3  # workers whose jobs have others too, and can give them back
    BUSY = 4  # workers whose jobs have to end first


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Slots for one replica, and what must be done for them."""

    slots: tuple[str, ...]
    readiness: Readiness
    stop: tuple[str, ...] = ()
    """Workers without a job that are in the way."""
    give_back: tuple[str, ...] = ()
    """Workers in the way that their jobs can do without."""
    busy: tuple[str, ...] = ()
    """Workers in the way whose jobs have to end, or to pause, first."""


class _Way(msgspec.Struct, frozen=True, kw_only=True):
    """What has to happen before there is room in one slot."""

    slot_id: str
    readiness: Readiness = Readiness.NOW
    workers: tuple[Worker, ...] = ()
    """Those that have to go, the one that goes last at the end."""
    beside: int = 0
    """Workers that stay."""


def readiness_of(worker: Worker, ledger: Ledger) -> Readiness:
    """How soon a worker could be gone from its slots (never NOW)."""
    if worker.id in ledger.leaving:
        return Readiness.LEAVING
    if not worker.jobs:
        return Readiness.UNUSED
    if worker.id in ledger.needed.workers:
        return Readiness.BUSY
    if all(worker.id in ledger.running[job_id].returning for job_id in worker.jobs):
        return Readiness.LEAVING
    return Readiness.SPARE


def replicas_for(demand: Demand, ledger: Ledger, taken: Collection[str] = ()) -> list[Worker]:
    """Live workers with the job's model that it may use, loaded and least used ones first; none on slots in `taken`."""
    found: list[Worker] = []
    for worker_id in ledger.replicas.get(demand.spec.replica_key, ()):
        worker = ledger.workers[worker_id]
        if worker.state is not WorkerState.STOPPING and worker_id not in ledger.unreachable:
            for slot_id in worker.slots:
                if slot_id in taken or not demand.accepts(ledger.slots[slot_id]):
                    break
            else:
                found.append(worker)
    if len(found) > 1:
        found.sort(key=lambda worker: (worker.state is WorkerState.STARTING, len(worker.jobs)))
    return found


def find_plan(demand: Demand, ledger: Ledger, apart: Iterable[str] = (), *, name_busy: bool = True) -> Plan | None:
    """The slots that are ready soonest for a new replica; None when there are not enough that could ever be.

    Promised slots are left out, and those of the workers `apart`: one job gains nothing from two replicas on one GPU. A
    plan that is BUSY may be without slots unless it is to `name_busy` ones: which jobs had better end first takes a
    while to find out, where many ask and none will wait for it.
    """
    apart_slots = {slot_id for worker_id in apart for slot_id in ledger.workers[worker_id].slots}
    promised, suited = ledger.slots.promised, ledger.slots.suited(demand)
    if promised or apart_slots:
        suited = [slot for slot in suited if slot.id not in promised and slot.id not in apart_slots]
    if len(suited) < demand.gpus:
        return None
    if ledger.max_workers_per_gpu == 1 and ledger.max_gpus is None:
        needed = ledger.needed.slots
        in_reach = [slot for slot in suited if slot.id not in needed]
        if len(in_reach) >= demand.gpus:
            suited = in_reach
        elif not name_busy:
            return Plan(slots=(), readiness=Readiness.BUSY)
    if ledger.max_gpus is None and (plan := _first_free(demand, suited, ledger)):
        return plan
    degrees: dict[str, Readiness] = {}
    ways = [_way(demand, slot, ledger, degrees) for slot in suited]
    more: tuple[Worker, ...] = ()
    if demand.spec.device == "cuda" and ledger.max_gpus is not None:
        chosen, more = _within_cap(ways, demand, ledger)
        if len(chosen) < demand.gpus:
            return None
    else:
        chosen = _soonest(ways, demand.gpus, ledger)
    going = {worker.id: worker for way in chosen for worker in way.workers} | {worker.id: worker for worker in more}
    degrees = {name: readiness_of(worker, ledger) for name, worker in going.items()}
    return Plan(
        slots=tuple(way.slot_id for way in chosen),
        readiness=max(degrees.values(), default=Readiness.NOW),
        stop=tuple(name for name, degree in degrees.items() if degree is Readiness.UNUSED),
        give_back=tuple(name for name, degree in degrees.items() if degree is Readiness.SPARE),
        busy=tuple(name for name, degree in degrees.items() if degree is Readiness.BUSY),
    )


def any_in_reach(device: str, ledger: Ledger) -> bool:
    """Whether a job may get a slot of this kind of device before others end.

    No is certain: whatever a job needs, its plan is BUSY, or there is none.
    """
    if ledger.max_workers_per_gpu > 1 or ledger.max_gpus is not None:
        return True
    slots = ledger.slots
    others = slots.keys() - ledger.needed.slots.keys() - slots.promised.keys()
    return any(slots[slot_id].device == device and slots.usable(slot_id) for slot_id in others)


def _first_free(demand: Demand, suited: list[Slot], ledger: Ledger) -> Plan | None:
    """A plan of slots that are free or about to be: mostly there are such, and the others need no closer look."""
    holders = ledger.slots.holders
    free = [slot.id for slot in suited if not holders.get(slot.id)]
    if len(free) >= demand.gpus:
        return Plan(slots=tuple(free[: demand.gpus]), readiness=Readiness.NOW)
    if ledger.max_workers_per_gpu > 1:  # it may fit beside others
        return None
    leaving = [slot.id for slot in suited if (held := holders.get(slot.id)) and ledger.leaving.issuperset(held)]
    if len(free) + len(leaving) < demand.gpus:
        return None
    leaving.sort(key=lambda slot_id: slot_id in ledger.slots.unusable)
    return Plan(slots=tuple([*free, *leaving][: demand.gpus]), readiness=Readiness.LEAVING)


def _way(demand: Demand, slot: Slot, ledger: Ledger, degrees: dict[str, Readiness]) -> _Way:
    """What has to happen before the slot has room: workers go, the soonest first, until it has.

    `degrees` are those of the workers that were looked at before; they get those of others.
    """
    staying = [ledger.holder(worker_id) for worker_id in ledger.slots.holders.get(slot.id, ())]
    for worker in staying:
        if worker.id not in degrees:
            degrees[worker.id] = readiness_of(worker, ledger)
    if len(staying) > 1:
        staying.sort(key=lambda worker: (degrees[worker.id], _tie(worker, degrees[worker.id], ledger)), reverse=True)
    going: list[Worker] = []
    while not _fits(demand, slot, staying, ledger):
        going.append(staying.pop())
    if not going:
        return _Way(slot_id=slot.id, beside=len(staying))
    return _Way(slot_id=slot.id, readiness=degrees[going[-1].id], workers=tuple(going), beside=len(staying))


def _soonest(ways: list[_Way], count: int, ledger: Ledger) -> list[_Way]:
    """The first `count` by readiness; of equally ready ones by what speaks for them, then in the order of the box."""
    if len(ways) > count:  # what speaks for the others need not be known
        worst = sorted([way.readiness for way in ways])[count - 1]
        ways = [way for way in ways if way.readiness <= worst]

    def place(way: _Way) -> tuple[Readiness, bool, tuple[float, ...]]:
        if way.workers:
            return way.readiness, way.slot_id in ledger.slots.unusable, _tie(way.workers[-1], way.readiness, ledger)
        return way.readiness, way.slot_id in ledger.slots.unusable, (way.beside,)  # rather a slot of its own

    return sorted(ways, key=place)[:count]


def _tie(worker: Worker, degree: Readiness, ledger: Ledger) -> tuple[float, ...]:
    """Of equally soon ones: unused for longest, what the largest job can spare, what matters least to the fewest."""
    match degree:
        case Readiness.SPARE:
            return (float(-max([len(ledger.running[job_id].workers) for job_id in worker.jobs])),)
        case Readiness.BUSY:
            priority = max([ledger.running[job_id].demand.priority for job_id in worker.jobs])
            return priority, worker.spec.replica_key in ledger.changed, len(worker.jobs)
        case _:
            return (worker.idle_since,)


def _fits(demand: Demand, slot: Slot, beside: list[Worker], ledger: Ledger) -> bool:
    if not beside:
        return True
    if not demand.memory_bytes or not all(worker.memory_bytes for worker in beside):
        return False
    if len(beside) >= ledger.max_workers_per_gpu or slot.id in ledger.slots.refused:
        return False
    return sum(worker.memory_bytes for worker in beside) + demand.memory_bytes <= slot.memory_bytes


def _within_cap(ways: list[_Way], demand: Demand, ledger: Ledger) -> tuple[list[_Way], tuple[Worker, ...]]:
    """The slots that are ready soonest, with no more that we do not hold yet than the cap on GPUs allows.

    Where that is not enough (a job for one certain GPU), workers on other GPUs have to go too: returned beside.
    """
    fresh = max(0, (ledger.max_gpus or 0) - ledger.slots.gpus_held())
    ours = [way for way in ways if ledger.slots.holders.get(way.slot_id)]
    others = _soonest([way for way in ways if not ledger.slots.holders.get(way.slot_id)], len(ways), ledger)
    chosen = _soonest([*ours, *others[:fresh]], demand.gpus, ledger)
    short = demand.gpus - len(chosen)
    names = {way.slot_id for way in chosen}
    elsewhere = [worker for worker in _gone_or_live(ledger) if not names & set(worker.slots)]
    elsewhere.sort(key=lambda worker: (readiness_of(worker, ledger), worker.idle_since))
    more: list[Worker] = []
    while short > 0 and elsewhere:
        worker = elsewhere.pop(0)
        more.append(worker)
        freed = others[fresh : fresh + min(short, len(worker.slots))]
        fresh, short = fresh + len(freed), short - len(freed)
        chosen += freed
    return chosen, tuple(more)


def _gone_or_live(ledger: Ledger) -> list[Worker]:
    workers = (*ledger.reclaiming.values(), *ledger.workers.values())
    return [worker for worker in workers if worker.spec.device == "cuda"]
