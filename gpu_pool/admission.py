"""What is refused at submission: everything about a request that only this box can judge."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

from gpu_pool.desk import Desk
from gpu_pool.errors import InvalidRequest
from gpu_pool.gen_kwargs import parse_gen_kwargs
from gpu_pool.leases import Leases
from gpu_pool.machine_memory import machine_bytes
from gpu_pool.model_size import ReplicaSize, replica_size
from gpu_pool.models import is_kind, reads_images, resolve_hub_revision, resolve_model
from gpu_pool.records import Evaluation, ModelArgs, Record
from gpu_pool.replica_plan import ReplicaPlan, plan_on_cpu, plan_on_gpus, plan_to_wait
from gpu_pool.settings import PoolSettings


class Placement(Record, frozen=True, kw_only=True):
    """On what a job may run."""

    device: Literal["cpu", "cuda"]
    max_replicas: int
    """Most slots that it may hold at once."""
    slot_index: str | None = None
    slot_id: str | None = None


class Admission:
    """Judges requests. Every refusal is an InvalidRequest that names the field."""

    def __init__(self, settings: PoolSettings, desk: Desk, leases: Leases) -> None:
        self._settings = settings
        self._desk = desk
        self._leases = leases

    async def admit(self, evaluation: Evaluation) -> ModelArgs:
        """Check everything, cheapest first; returns the model's arguments, a hub id resolved to a commit."""
        parse_gen_kwargs(evaluation.gen_kwargs)
        place = self.place(evaluation)
        self.check_output_dir(evaluation.output_dir)
        args = await self.model_args(evaluation)
        self.plan(evaluation, await self.size(evaluation, args, place), place)
        await self._check_tasks(evaluation, args)
        return args

    async def model_args(self, evaluation: Evaluation) -> ModelArgs:
        """What `model` and `model_args` mean; reads files or asks the hub, in a thread."""

        def resolve() -> ModelArgs:
            allow = self._settings.allow_remote_code
            return resolve_hub_revision(resolve_model(evaluation.model, evaluation.model_args, allow_remote_code=allow))

        return await asyncio.to_thread(resolve)

    async def size(self, evaluation: Evaluation, args: ModelArgs, place: Placement) -> ReplicaSize | None:
        """The memory that a replica needs; None where no file tells. Reads headers, in a thread.

        Raises InvalidRequest on the model's field where they cannot be read.
        """
        try:
            return await asyncio.to_thread(replica_size, args, place.device)
        except (OSError, ValueError) as error:
            raise InvalidRequest(_model_field(evaluation), f"its size cannot be told: {error}") from error

    def plan(
        self, evaluation: Evaluation, size: ReplicaSize | None, place: Placement, *, is_admitted: bool = False
    ) -> ReplicaPlan:
        """How many GPUs a replica of that size needs; raises InvalidRequest where it can never fit.

        A job that was admitted earlier waits for what is not there now.
        """
        field = _model_field(evaluation)
        if place.device == "cpu":
            return plan_on_cpu(size, machine_bytes(), field=field)
        if place.slot_index is not None or place.slot_id is not None:
            field = "device"
        gpus = [
            gpu
            for gpu in self._leases.gpus()
            if place.slot_index in (None, gpu.index) and place.slot_id in (None, gpu.uuid)
        ]
        cap, free_fraction = max(1, evaluation.num_gpus), self._settings.gpu_free_fraction
        try:
            return plan_on_gpus(
                size, gpus, cap=cap, max_gpus=self._settings.max_gpus, free_fraction=free_fraction, field=field
            )
        except InvalidRequest:
            if not is_admitted or size is None:
                raise
            return plan_to_wait(size, gpus, cap=cap, free_fraction=free_fraction)

    def place(self, evaluation: Evaluation, *, is_admitted: bool = False) -> Placement:
        """The kind of device, how many replicas, and which GPU; raises InvalidRequest on `device` and `num_gpus`.

        A job that was admitted earlier waits for what is not there now.
        """
        device, index, uuid = self._device(evaluation)
        slots = [slot for slot in self._leases.slots(device) if index in (None, slot.index) and uuid in (None, slot.id)]
        if not slots and not is_admitted:
            raise InvalidRequest("device", self._no_such_device(device, index, uuid))
        if (index or uuid) is not None and evaluation.num_gpus > 1:
            raise InvalidRequest(
                "num_gpus", f"must be 1 with device {evaluation.device!r}, which is one GPU; or use 'cuda'"
            )
        wanted = max(1, evaluation.num_gpus)
        if wanted > len(slots) and not is_admitted:
            noun = "GPUs" if device == "cuda" else "CPU workers"
            raise InvalidRequest("num_gpus", f"must be at most {len(slots)}: this box has {len(slots)} {noun}")
        cap = self._settings.max_gpus
        if device == "cuda" and cap is not None and wanted > cap and not is_admitted:
            raise InvalidRequest("num_gpus", f"must be at most {cap}: no more GPUs are held (setting max_gpus)")
        return Placement(device=device, max_replicas=wanted, slot_index=index, slot_id=uuid)

    def _device(self, evaluation: Evaluation) -> tuple[Literal["cpu", "cuda"], str | None, str | None]:
        """Kind of device, and the one GPU that is asked for: by its position, or by its UUID."""
        match evaluation.device:
            case None:
                use_gpu = self._leases.has_gpus and evaluation.num_gpus > 0 and self._settings.max_gpus != 0
                return ("cuda" if use_gpu else "cpu"), None, None
            case "cpu":
                return "cpu", None, None
            case name:
                if evaluation.num_gpus == 0:
                    raise InvalidRequest("num_gpus", f"must be at least 1 with device {name!r}; 0 means the CPU")
                kind, _, index = name.partition(":")
                return ("cuda", index or None, None) if kind == "cuda" else ("cuda", None, name)

    def _no_such_device(self, device: str, index: str | None, uuid: str | None) -> str:
        slots = self._leases.slots(device)
        if device == "cpu":
            return "this server was started without CPU workers; use 'cuda' or leave it out"
        if not slots:
            why = (self._leases.problem() or "").removeprefix("No GPU can be used: ").rstrip(".")
            return f"this box shows no GPU{why and f': {why}'}; use 'cpu' or leave it out"
        there = [f"cuda:{slot.index}" if uuid is None else f"{slot.id} (cuda:{slot.index})" for slot in slots]
        return f"there is no GPU {uuid or index}; this box has {', '.join(there)}"

    def check_output_dir(self, output_dir: str | None) -> Path | None:
        """The folder, resolved; raises InvalidRequest when it lies outside the allowed roots."""
        if output_dir is None:
            return None
        roots = [root.resolve() for root in (self._settings.data_dir, *self._settings.output_roots)]
        try:
            path = Path(output_dir).expanduser().resolve()
        except (OSError, RuntimeError, ValueError):
            raise InvalidRequest("output_dir", "is not a path that can be resolved") from None
        if not any(path.is_relative_to(root) for root in roots):
            allowed = ", ".join(str(root) for root in roots)
            raise InvalidRequest("output_dir", f"must lie under one of: {allowed} (setting output_roots)")
        if path.exists() and not path.is_dir():
            raise InvalidRequest("output_dir", "is a file; name a folder")
        return path

    async def _check_tasks(self, evaluation: Evaluation, args: ModelArgs) -> None:
        tasks = evaluation.tasks
        images = await asyncio.to_thread(reads_images, args)
        problems = await self._desk.check(tasks, evaluation.num_fewshot, reads_images=images)
        if problems:
            first = problems[0]
            field = f"tasks[{tasks.index(first.task)}]" if first.task in tasks else "tasks"
            reasons = "; ".join(problem.reason for problem in problems)
            raise InvalidRequest(field, reasons, choices=first.suggestions)


def _model_field(evaluation: Evaluation) -> str:
    """The field of a request that names the model's files."""
    return "model_args.pretrained" if is_kind(evaluation.model) else "model"
