"""From a request to what the scheduler is given: a checked, durable job whose model is known by its content."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import msgspec

from gpu_pool import events as ev
from gpu_pool.admission import Admission
from gpu_pool.daemon_thread import in_daemon_thread
from gpu_pool.endpoints import api_fingerprint
from gpu_pool.errors import DatabaseUnavailable, InvalidRequest, KeyReused, ShuttingDown
from gpu_pool.fingerprint import fingerprint_model, is_of_hub, memo_path
from gpu_pool.live_jobs import LiveJobs
from gpu_pool.losses import Losses
from gpu_pool.merge import NotMergeable
from gpu_pool.merges import Merges
from gpu_pool.model_size import ReplicaSize
from gpu_pool.records import ApiModel, Evaluation, Job, JobState, Merge, ModelArgs, ModelSpec
from gpu_pool.runner import Runner
from gpu_pool.settings import PoolSettings
from gpu_pool.settling import NobodyWaits, Settling, local_files
from gpu_pool.store import Store
from gpu_pool.transitions import JobEvent
from gpu_pool.views import WaitingView

_HOW_TO_USE_THE_CPU = "Jobs with device 'cpu' do not wait for it, nor do any with the setting max_gpus = 0."
MODELS_READ_AT_ONCE = 2
"""To know them by their content. Each is read by several threads; more models would only share the disk."""

logger = logging.getLogger(__name__)


class Intake:
    """Takes jobs in: new ones, those of the last run, and those whose model has changed meanwhile."""

    def __init__(
        self,
        settings: PoolSettings,
        store: Store,
        jobs: LiveJobs,
        admission: Admission,
        runner: Runner,
        merges: Merges,
    ) -> None:
        self._memo = memo_path(settings.data_dir)
        self._patience_s = settings.model_patience_s
        self._store = store
        self._jobs = jobs
        self._admission = admission
        self._runner = runner
        self._merges = merges
        self._reading = asyncio.Semaphore(MODELS_READ_AT_ONCE)
        self._awaited: dict[str, str] = {}
        """Job -> the job that merges its checkpoint."""
        self._settling: dict[str, Settling] = {}
        """Job -> the files of its model, while they are looked at."""
        self._unplaced: set[str] = set()
        """Jobs that wait for the driver to say which GPUs there are."""

    async def recover(self) -> None:
        """Unfinished jobs of the last run: those being cancelled are cancelled, the others wait again."""
        alike: dict[bytes, list[Job]] = {}
        for job in await self._store.unfinished():
            self._jobs[job.id] = job
            if job.state is JobState.RUNNING:
                job = await self._jobs.requeue(job, "the server ended")
            if isinstance(job.work, Merge):
                await self._merges.recover(job)
                continue
            if job.state is JobState.CANCELLING:
                await self._jobs.settle(job, JobEvent.RELEASED)
                continue
            named = (job.work.model, job.work.model_args, job.work.merge, _resolved(job))
            model = msgspec.json.encode(named, order="sorted")
            alike.setdefault(model, []).append(job)
        for jobs in alike.values():  # thousands may wait for a few models: each is looked at once
            self._runner.background(self._identify(*jobs))

    async def submit(self, evaluation: Evaluation, request: dict[str, Any]) -> Job:
        """As `Pool.submit`."""
        if earlier := await self._store.by_key(evaluation.idempotency_key):
            return await self._same(earlier, evaluation)
        await self._admission.admit(evaluation)
        job = Job(id=str(uuid.uuid4()), work=evaluation, request=request, created_at=datetime.now(UTC))
        stored = await self._store.add(job, late=self._welcome)
        if stored.id != job.id:  # another request with the key was faster
            return await self._same(stored, evaluation)
        await self._welcome(job)
        return job

    async def _welcome(self, job: Job) -> None:
        """A new job is durable."""
        self._jobs[job.id] = job
        logger.info("job %s is queued: %s on %s", job.id, ", ".join(job.evaluation.tasks), job.evaluation.model)
        self.take_up(job)

    async def _same(self, earlier: Job, evaluation: Evaluation) -> Job:
        if earlier.work != evaluation:
            raise KeyReused(earlier.id)
        return self._jobs.get(earlier.id) or await self._store.get(earlier.id)

    def take_up(self, job: Job, ran_s: float = 0.0) -> None:
        """Find the content of a queued job's model in the background, then let the scheduler have the job, which has
        had a worker for `ran_s` seconds."""
        self._runner.background(self._identify(job, ran_s=ran_s))

    async def _identify(self, *jobs: Job, ran_s: float = 0.0) -> None:
        """Find the content of the model that these jobs name, merged first, and let the scheduler have them."""
        settling = Settling(local_files(jobs[0]), self._patience_s, lambda: any(job.id in self._jobs for job in jobs))
        self._settling.update((job.id, settling) for job in jobs)
        try:
            await self._identify_settled(jobs, settling, ran_s)
        except (ShuttingDown, NobodyWaits, DatabaseUnavailable):
            return  # the server ends, and the next start takes up what there is; or the jobs have ended
        finally:
            for job in jobs:
                self._settling.pop(job.id, None)

    async def _identify_settled(self, jobs: Sequence[Job], settling: Settling, ran_s: float) -> None:
        try:
            api = self._admission.api_model(jobs[0].evaluation)
            merged = None if _resolved(jobs[0]) else await self._merged(jobs)
            if jobs[0].attempt:  # its files were overwritten as it was to use them, and may be once more
                await settling.rest()
            args, digest = await settling.whole(partial(self._model, jobs[0], merged, api))
        except (ShuttingDown, NobodyWaits):
            raise
        except Exception as error:
            for job in jobs:
                await self._refuse(job, error)
            return
        for job in jobs:
            await self._note_model(job, args, digest)
        sizes: dict[str, ReplicaSize | None] = {}
        demand = partial(self._demand, args=args, digest=digest, sizes=sizes, api=api, settling=settling, ran_s=ran_s)
        waiting = [job for job in jobs if self._admission.awaits_driver(job.evaluation)]
        for job in jobs:
            if job not in waiting:
                await demand(job)
        if waiting:
            self._unplaced.update(job.id for job in waiting)
            await self._admission.driver_answers()
            self._unplaced.difference_update(job.id for job in waiting)
        for job in waiting:
            await demand(job)

    async def _model(self, job: Job, merged: str | None, api: ApiModel | None) -> tuple[ModelArgs, str]:
        """What its model is, and its identity."""
        args = _resolved(job) or await self._admission.model_args(job.evaluation, merged)
        return args, api_fingerprint(api) if api else await self._fingerprint(args)

    async def _note_model(self, job: Job, args: ModelArgs, digest: str) -> None:
        """What must be known of it later: that it is another one than before, or which commit of a hub it is."""
        if job.id not in self._jobs:  # it was cancelled meanwhile
            return
        if job.model is None and is_of_hub(digest):
            await self._jobs.note(self._jobs[job.id], model=ModelSpec(kind="hf", args=args, fingerprint=digest))
        elif job.attempt and job.model and job.model.fingerprint != digest:
            await self._jobs.note_other_model(job, digest)

    async def _fingerprint(self, args: ModelArgs) -> str:
        """Minutes for large files on a slow disk: neither threads that others need nor the server's end wait for it."""
        async with self._reading:
            return await in_daemon_thread(partial(fingerprint_model, args, self._memo), "fingerprint")

    async def _merged(self, jobs: Sequence[Job]) -> str | None:
        """Where their model is once it is merged; None where nothing is to be."""
        merge = await self._admission.merge_for(jobs[0].evaluation)
        if merge is None:
            return None
        request = {"checkpoint_path": merge.checkpoint_path, "output_path": merge.output_path}
        request |= {"checkpoint_type": merge.checkpoint_type, "max_shard_bytes": merge.max_shard_bytes}

        def await_job(merge_id: str) -> None:
            self._awaited |= dict.fromkeys((job.id for job in jobs), merge_id)

        try:
            await self._merges.ensure(merge, request, await_job)
        finally:
            for job in jobs:
                self._awaited.pop(job.id, None)
        return merge.output_path

    def waiting(self, job_id: str) -> WaitingView:
        """Why a job waits that the scheduler has not been given yet."""
        if merge_id := self._awaited.get(job_id):
            needs, reason = "its checkpoint, merged", f"Job {merge_id} merges its checkpoint."
        elif job_id in self._unplaced:
            needs, reason = "a GPU", f"{self._admission.no_driver} {_HOW_TO_USE_THE_CPU}"
        else:
            needs, settling = "a look at its model", self._settling.get(job_id)
            reason = settling.reason if settling else None
            reason = reason or "The files of its model are being read, to know the model by its content."
        return WaitingView(job_id=job_id, needs=needs, reason=reason, starts_in=None)

    async def _refuse(self, job: Job, error: Exception) -> None:
        """Whatever is wrong with a job's model, the job must not wait for ever."""
        said = str(error)
        if not isinstance(error, InvalidRequest | NotMergeable | OSError):
            logger.error("job %s: its model cannot be looked at", job.id, exc_info=error)
            said = f"its model cannot be looked at: {error!r}"
        await self._runner.settle_queued(job.id, JobEvent.FAIL, said)

    async def _demand(
        self,
        job: Job,
        args: ModelArgs,
        digest: str,
        sizes: dict[str, ReplicaSize | None],
        api: ApiModel | None,
        settling: Settling,
        ran_s: float,
    ) -> None:
        """Let the scheduler have one of them; `sizes` of the model are kept for the others, by kind of device."""
        is_admitted = job.evaluation.merge is None or job.attempt > 0  # before it was merged nobody knew its size
        try:
            place = self._admission.place(job.evaluation, is_admitted=True)
            if api is not None:
                sizes[place.device] = None
            elif place.device not in sizes:
                look = partial(self._admission.size, job.evaluation, args, place)
                sizes[place.device] = await settling.whole(look)
            plan = self._admission.plan(job.evaluation, sizes[place.device], place, is_admitted=is_admitted)
        except NobodyWaits:
            raise
        except Exception as error:
            await self._refuse(job, error)
            return
        kind = "hf" if api is None else job.evaluation.model
        spec = ModelSpec(kind=kind, args=args, fingerprint=digest, device=place.device, api=api)
        demand = ev.Demand(
            job_id=job.id,
            spec=spec,
            max_replicas=max(1, place.max_replicas // plan.gpus),
            gpus=plan.gpus,
            memory_bytes=plan.memory_bytes,
            order=job.created_at.timestamp(),
            slot_index=place.slot_index,
            losses=Losses(attempts=job.retries),
            slot_id=place.slot_id,
            priority=job.evaluation.priority,
            timeout_s=job.evaluation.timeout_s,
            ran_s=ran_s,
            max_retries=job.evaluation.max_retries,
        )
        logger.info("job %s: %s", job.id, plan.describe())
        self._runner.submit(demand)


def _resolved(job: Job) -> ModelArgs | None:
    """What a job's hub id was resolved to when it was submitted; None where it was not, or is to be once more.

    Of a local model only the name stays, and means what it names now.
    """
    if job.model is None or not is_of_hub(job.model.fingerprint):
        return None
    folders = (job.model.args.peft, job.model.args.tokenizer)
    return job.model.args if all(os.path.exists(folder) for folder in folders if folder) else None
