"""What is refused at submission: everything about a request that only this box can judge."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Set
from functools import partial
from pathlib import Path

from gpu_pool.api_models import is_api, resolve_api, resolve_api_args, why_no_scores
from gpu_pool.desk import Desk, DeskUnavailable
from gpu_pool.endpoints import slot_id, taken_by
from gpu_pool.errors import InvalidRequest
from gpu_pool.gen_kwargs import parse_gen_kwargs
from gpu_pool.hardware import Slot
from gpu_pool.leases import Leases
from gpu_pool.machine_memory import machine_bytes
from gpu_pool.merge import CheckpointNotFound, NotMergeable, plan_merge
from gpu_pool.model_size import ReplicaSize, replica_size
from gpu_pool.models import is_kind, located_at, modalities, resolve_hub_revision, resolve_model
from gpu_pool.records import ApiModel, CheckpointType, Device, Evaluation, Merge, Modality, ModelArgs, Record
from gpu_pool.replica_plan import ReplicaPlan, plan_on_cpu, plan_on_gpus, plan_to_wait
from gpu_pool.settings import PoolSettings


class Placement(Record, frozen=True, kw_only=True):
    """On what a job may run."""

    device: Device
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

    async def admit(self, evaluation: Evaluation) -> None:
        """Check everything, cheapest first; of a checkpoint that is to be merged, all but its size."""
        parse_gen_kwargs(evaluation.gen_kwargs)
        place = self.place(evaluation)
        self.check_output_dir(evaluation.output_dir)
        if api := self.api_model(evaluation):
            if evaluation.merge is not None:
                raise InvalidRequest("merge", "must be left out: a model behind an endpoint has no checkpoint here")
            args = await self.model_args(evaluation)
            no_scores = why_no_scores(args, api, self._settings.endpoints[api.endpoint])
            await self._check_tasks(evaluation, taken_by(api), no_scores=no_scores)
            return
        if merge := await self.merge_for(evaluation):
            args = await self.model_args(evaluation, merge.description_path, is_merged=False)
        else:
            args = await self.model_args(evaluation)
            self.plan(evaluation, await self.size(evaluation, args, place), place)
        await self._check_tasks(evaluation, await asyncio.to_thread(modalities, args))

    def api_model(self, evaluation: Evaluation) -> ApiModel | None:
        """What is asked of an endpoint; None of a model that is computed here. Raises InvalidRequest."""
        if not is_api(evaluation.model):
            return None
        return resolve_api(evaluation.model, evaluation.model_args, self._settings.endpoints)

    async def model_args(self, evaluation: Evaluation, path: str | None = None, *, is_merged: bool = True) -> ModelArgs:
        """What `model` and `model_args` mean, a hub id resolved to a commit; reads files or asks the hub, in a thread.

        `path`: where the model is, unless they say it; not `is_merged`: there are no weights yet.
        """
        model, model_args = evaluation.model, evaluation.model_args
        if api := self.api_model(evaluation):
            return await asyncio.to_thread(resolve_api_args, model_args, api)
        if path is not None:
            model, model_args = located_at(model, model_args, path)

        def resolve() -> ModelArgs:
            allow = self._settings.allow_remote_code
            return resolve_hub_revision(resolve_model(model, model_args, allow_remote_code=allow, is_merged=is_merged))

        return await asyncio.to_thread(resolve)

    async def merge_for(self, evaluation: Evaluation) -> Merge | None:
        """What must be merged before the model can be loaded; raises InvalidRequest on `merge` and the model's field.

        It goes into a folder of the checkpoint's own, beside which others of its weights may be evaluated.
        """
        if evaluation.merge is None:
            return None
        return await asyncio.to_thread(_merge_for, evaluation, evaluation.merge)

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
        if place.device == "api":
            return ReplicaPlan()
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

        A job that was admitted earlier waits for what is not there now, and any for GPUs while nobody knows of them.
        """
        if api := self.api_model(evaluation):
            _check_no_device(evaluation)
            return Placement(device="api", max_replicas=1, slot_id=slot_id(api.endpoint))
        device, index, uuid = self._device(evaluation)
        may_wait = is_admitted or self.awaits_driver(evaluation)
        slots = [slot for slot in self._leases.slots(device) if index in (None, slot.index) and uuid in (None, slot.id)]
        if not slots and not may_wait:
            raise InvalidRequest("device", self._no_such_device(device, index, uuid))
        if (index or uuid) is not None and evaluation.num_gpus > 1:
            raise InvalidRequest(
                "num_gpus", f"must be 1 with device {evaluation.device!r}, which is one GPU; or use 'cuda'"
            )
        wanted = max(1, evaluation.num_gpus)
        if wanted > len(slots) and not may_wait:
            noun = "GPUs" if device == "cuda" else "CPU workers"
            raise InvalidRequest("num_gpus", f"must be at most {len(slots)}: this box has {len(slots)} {noun}")
        cap = self._settings.max_gpus
        if device == "cuda" and cap is not None and wanted > cap and not is_admitted:
            raise InvalidRequest("num_gpus", f"must be at most {cap}: no more GPUs are held (setting max_gpus)")
        return Placement(device=device, max_replicas=wanted, slot_index=index, slot_id=uuid)

    def awaits_driver(self, evaluation: Evaluation) -> bool:
        """Whether the job needs GPUs, or may, of which nobody can say yet which there are."""
        return self._leases.gpus_unknown and not is_api(evaluation.model) and self._device(evaluation)[0] == "cuda"

    @property
    def no_driver(self) -> str:
        """Why that is so, a sentence."""
        return self._leases.problem() or "The driver has not been asked yet."

    async def driver_answers(self) -> None:
        """Return once it is known which GPUs there are."""
        await self._leases.gpus_known()

    def _device(self, evaluation: Evaluation) -> tuple[Device, str | None, str | None]:
        """Kind of device, and the one GPU that is asked for: by its position, or by its UUID."""
        match evaluation.device:
            case None:
                may_have_gpus = self._leases.has_gpus or self._leases.gpus_unknown
                use_gpu = may_have_gpus and evaluation.num_gpus > 0 and self._settings.max_gpus != 0
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
        missing = f"there is no GPU {uuid or index}"
        if any(slot.is_mig and slot.index.partition(":")[0] == index for slot in slots):
            missing = f"GPU {index} is divided into MIG instances, each of which goes by its UUID"
        return f"{missing}; this box has {', '.join(_named(slot, by_uuid=uuid is not None) for slot in slots)}"

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

    async def _check_tasks(self, evaluation: Evaluation, taken: Set[Modality], *, no_scores: str | None = None) -> None:
        tasks = evaluation.tasks
        few = evaluation.num_fewshot
        check = partial(self._desk.check, tasks, few, taken, no_scores=no_scores)
        try:
            problems = await check()
        except DeskUnavailable:  # as a rule it was not these tasks that ended it: the next one is asked, once
            problems = await check()
        if problems:
            first = problems[0]
            field = f"tasks[{tasks.index(first.task)}]" if first.task in tasks else "tasks"
            reasons = "; ".join(problem.reason for problem in problems)
            raise InvalidRequest(field, reasons, choices=first.suggestions)


def _named(slot: Slot, *, by_uuid: bool) -> str:
    """What `device` may say to mean this GPU."""
    if slot.is_mig:
        return f"{slot.id} (of GPU {slot.index.partition(':')[0]})"
    return f"{slot.id} (cuda:{slot.index})" if by_uuid else f"cuda:{slot.index}"


def _check_no_device(evaluation: Evaluation) -> None:
    """A model behind an endpoint needs no device of this box."""
    if evaluation.device not in (None, "cpu"):
        raise InvalidRequest("device", "must be left out: the model is behind an endpoint")
    if evaluation.num_gpus > 1:
        raise InvalidRequest("num_gpus", "must be 0: the model is behind an endpoint")
    if evaluation.deterministic:
        raise InvalidRequest("deterministic", "must be false: the model is behind an endpoint")


def _merge_for(evaluation: Evaluation, kind: CheckpointType) -> Merge:
    field = _model_field(evaluation)
    named = evaluation.model_args.get("pretrained") if is_kind(evaluation.model) else evaluation.model
    if not isinstance(named, str) or not named:
        raise InvalidRequest(field, "the path of the checkpoint that is to be merged is needed")
    path = Path(named)
    try:
        found = plan_merge(path, None, kind, ())
        if Path(found.checkpoint_path) != path.resolve():
            problem = f"{path} is above several checkpoints: name one, such as {found.checkpoint_path}"
            raise InvalidRequest(field, problem)
    except CheckpointNotFound:
        raise InvalidRequest(field, f"{path} is no folder on the server, and only those can be merged") from None
    except NotMergeable as error:
        raise InvalidRequest("merge", f"{error}; leave it out where nothing is to be merged") from None
    output = path / f"merged-{kind}"
    if not os.access(path, os.W_OK):
        problem = f"{path} cannot be written to; merge it into another folder (POST /merge) and evaluate that"
        raise InvalidRequest("merge", problem)
    try:
        return plan_merge(path, output, kind, (), priority=evaluation.priority)
    except InvalidRequest as error:
        raise InvalidRequest("merge", f"{output} {error.problem}") from None


def _model_field(evaluation: Evaluation) -> str:
    """The field of a request that names the model's files."""
    return "model_args.pretrained" if is_kind(evaluation.model) else "model"
