"""A scheduler with slots and evaluators, and a clock that the test moves."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from gpu_pool import events as ev
from gpu_pool.hardware import Slot
from gpu_pool.records import ModelArgs, ModelSpec
from gpu_pool.scheduler import Scheduler


def spec(model: str, device: str = "cpu") -> ModelSpec:
    return ModelSpec(kind="hf", args=ModelArgs(pretrained=model), fingerprint=model, device=device)


class Box:
    """A scheduler with CPU slots and ready evaluators, and a clock that the test moves."""

    def __init__(
        self, slots: int = 2, evaluators: int = 3, gpus: int = 0, max_attempts: int = 3, **options: object
    ) -> None:
        self.scheduler = Scheduler(evaluators=evaluators, max_attempts=max_attempts, **options)
        self.ledger = self.scheduler.ledger
        self.now = 0.0
        self.orders = itertools.count()
        self.log: list[ev.Action] = []
        self.slots = [Slot(id=f"cpu:{n}", device="cpu", index=str(n)) for n in range(slots)]
        self.slots += [Slot(id=f"GPU-{n}", device="cuda", index=str(n), memory_bytes=80) for n in range(gpus)]
        self.see({})
        for action in self.of(ev.StartEvaluator):
            self.do(ev.EvaluatorIsReady, evaluator_id=action.evaluator_id)

    def do(self, event: type[ev.Event], **fields: object) -> list[ev.Action]:
        actions = self.scheduler.step(event(now=self.now, **fields))
        self.ledger.check()
        self.log += actions
        return actions

    def see(self, unusable: dict[str, str], **more: frozenset[str]) -> list[ev.Action]:
        return self.do(ev.SlotsSeen, slots=tuple((slot, unusable.get(slot.id)) for slot in self.slots), **more)

    def submit(self, job_id: str, model: str = "a", **fields: object) -> list[ev.Action]:
        demand = {"job_id": job_id, "spec": spec(model), "max_replicas": 1, "order": float(next(self.orders))} | fields
        return self.do(ev.JobSubmitted, demand=ev.Demand(**demand))

    def gone(self, worker_id: str) -> list[ev.Action]:
        return [
            *self.do(ev.WorkerDied, worker_id=worker_id, cause="x"),
            *self.do(ev.SlotsReturned, worker_id=worker_id),
        ]

    def load(self, worker_id: str) -> list[ev.Action]:
        return self.do(ev.WorkerLoaded, worker_id=worker_id)

    def end(self, job_id: str) -> list[ev.Action]:
        evaluator = self.ledger.running[job_id].evaluator_id
        return [
            *self.do(ev.JobEnded, job_id=job_id),
            *self.do(ev.EvaluatorIsReady, evaluator_id=evaluator),
        ]

    def of(self, kind: type[ev.Action], actions: Iterable[ev.Action] | None = None) -> list[ev.Action]:
        return [action for action in (self.log if actions is None else actions) if isinstance(action, kind)]
