"""From the pool's records to response bodies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import msgspec

from gpu_pool.cache_upkeep import CacheUse
from gpu_pool.endpoints import Endpoint
from gpu_pool.history import HistoryEntry
from gpu_pool.messages import TaskEntry
from gpu_pool.model_arguments import known_arguments
from gpu_pool.model_names import MODEL_NAMES
from gpu_pool.models import model_kinds, why_not
from gpu_pool.pool import Pool
from gpu_pool.records import Job, JobState, Merge, ModelSpec, Progress
from gpu_pool.store import MOST_ENDED
from gpu_pool.views import GpuView, QueueView, WaitingView, WorkerView
from server import box_responses, responses

_STATUS = {
    state: responses.JobStatus.RUNNING if state is JobState.CANCELLING else responses.JobStatus(state.value)
    for state in JobState
}
_ended: dict[str, tuple[Job, responses.JobInfo]] = {}
"""Job id -> a job that has ended and how it shows, of those shown lately: they rest, and lists repeat them."""


def status_of(state: JobState) -> responses.JobStatus:
    """The reference's five names: a job that is being cancelled still reads "running"."""
    return _STATUS[state]


def states_of(status: responses.JobStatus) -> tuple[JobState, ...]:
    """The states that show as `status`."""
    return tuple(state for state in JobState if status_of(state) is status)


def submitted(job: Job, position: int | None) -> responses.JobSubmitted:
    """The reference's answer to POST /evaluate; a job that started at once had nobody ahead of it."""
    position = position or 0
    if job.state is JobState.QUEUED:
        message = f"Job queued successfully. Position in queue: {position}"
    elif isinstance(job.work, Merge):
        message = "The same merge is running already"
    else:
        message = "Job was submitted before, with the same idempotency_key"
    return responses.JobSubmitted(
        job_id=job.id, status=status_of(job.state), position_in_queue=position, message=message
    )


def job_info(job: Job, pool: Pool) -> responses.JobInfo:
    """One job as GET /jobs/{id} shows it."""
    if not job.state.is_final:
        position = pool.queue_position(job.id) if job.state is JobState.QUEUED else None
        return _new_job_info(job, position, pool.eta_seconds(job.id), pool.why_waits(job.id))
    known = _ended.get(job.id)
    if known is None or known[0] is not job:
        known = _ended[job.id] = job, _new_job_info(job, None, None)
        if len(_ended) > MOST_ENDED:
            del _ended[next(iter(_ended))]
    return known[1]


def _new_job_info(
    job: Job, position: int | None, eta_seconds: float | None, wait: WaitingView | None = None
) -> responses.JobInfo:
    return responses.JobInfo(
        job_id=job.id,
        status=status_of(job.state),
        created_at=job.created_at,
        started_at=job.started_at,
        completed_at=job.completed_at,
        request=job.request,
        result=_result_files(job),
        error=job.error,
        position_in_queue=position,
        phase=job.progress.phase.value if job.progress and job.state is JobState.RUNNING else None,
        progress=_progress(job.progress, eta_seconds) if job.progress else None,
        metrics=job.metrics,
        attempt=job.attempt,
        model=model_info(job.model) if job.model else None,
        retries=job.retries,
        tags=list(job.work.tags),
        kind="merge" if isinstance(job.work, Merge) else "evaluation",
        merged_path=_merged_path(job),
        waits_for=wait.reason if wait else None,
        expected_start=_expected_start(wait) if wait else None,
    )


def _expected_start(wait: WaitingView) -> datetime | None:
    return None if wait.starts_in is None else datetime.now(UTC) + timedelta(seconds=wait.starts_in)


def _merged_path(job: Job) -> str | None:
    if isinstance(job.work, Merge) and job.state is JobState.COMPLETED:
        return job.work.output_path
    return None


def job_history(job_id: str, entries: Sequence[HistoryEntry]) -> responses.JobHistory:
    """What happened to a job."""
    events = [
        responses.JobEventInfo(
            at=entry.at,
            event=entry.event,  # pyright: ignore[reportArgumentType]  (the store's own few words)
            status=status_of(entry.state),
            attempt=entry.attempt,
            cause=entry.cause,
        )
        for entry in entries
    ]
    return responses.JobHistory(job_id=job_id, events=events)


def job_page(jobs: list[Job], limit: int, pool: Pool) -> responses.JobPage:
    """At most `limit` of `jobs`, which holds one more where there is a next page."""
    shown = jobs[:limit]
    return responses.JobPage(
        jobs=[job_info(job, pool) for job in shown],
        next_cursor=shown[-1].id if len(jobs) > limit else None,
    )


def model_info(spec: ModelSpec) -> responses.ModelInfo:
    """A model by its content."""
    return responses.ModelInfo(
        kind=spec.kind, fingerprint=spec.fingerprint, device=spec.device, args=msgspec.to_builtins(spec.args)
    )


def queue_info(queue: QueueView, waiting: list[WaitingView]) -> responses.QueueInfo:
    """The reference's queue, all running jobs, and why the first ones wait."""
    return responses.QueueInfo(
        queue_size=len(queue.queued),
        running_job=queue.running[0] if queue.running else None,
        queued_jobs=list(queue.queued),
        completed_jobs=queue.completed,
        failed_jobs=queue.failed,
        running_jobs=list(queue.running),
        cancelled_jobs=queue.cancelled,
        waiting=[
            responses.WaitingInfo(
                job_id=wait.job_id,
                needs=wait.needs,
                reason=wait.reason,
                expected_start=_expected_start(wait),
            )
            for wait in waiting
        ],
    )


def health(pool: Pool) -> responses.Health:
    """The same queue length as GET /queue."""
    trouble = pool.trouble
    return responses.Health(
        status="degraded" if trouble else "healthy",
        timestamp=datetime.now(UTC),
        queue_size=pool.queue_size(),
        trouble=trouble,
    )


def task_list(entries: tuple[TaskEntry, ...], details: bool) -> responses.TaskList:
    """Names of tasks, groups and tags; with `details` what each is."""
    infos = [
        responses.TaskInfo(
            name=entry.name,
            kind=entry.kind,
            library=entry.library,
            output_type=entry.output_type,
            modality=entry.modality,
            documents=entry.documents,
            note=entry.note,
        )
        for entry in (entries if details else ())
    ]
    return responses.TaskList(tasks=[entry.name for entry in entries], entries=infos if details else None)


def model_list(listed: Mapping[str, Endpoint], details: bool) -> responses.ModelList:
    """Every kind of model; with `details` what each is here, the names of arguments, and the endpoints."""
    if not details:
        return responses.ModelList(models=model_kinds())
    entries = [
        responses.ModelNameInfo(
            name=name.name,
            runs_on=None if name.runs_on in ("package", "nothing") else name.runs_on,
            pretrained=name.pretrained,
            reason=why_not(name, {endpoint.kind for endpoint in listed.values()}),
            nearest=list(name.nearest),
            note=name.note,
            defaults=dict(name.defaults),
        )
        for name in MODEL_NAMES.values()
    ]
    arguments = [
        responses.ModelArgumentInfo(name=name, meaning=meaning, note=note)
        for name, (meaning, note) in sorted(known_arguments().items())
    ]
    endpoints = [
        responses.EndpointInfo(name=name, kind=endpoint.kind, base_url=endpoint.base_url, model=endpoint.model)
        for name, endpoint in sorted(listed.items())
    ]
    return responses.ModelList(models=model_kinds(), entries=entries, arguments=arguments, endpoints=endpoints)


def gpu_list(gpus: list[GpuView], pool: Pool) -> box_responses.GpuList:
    """Every GPU with its state."""
    return box_responses.GpuList(
        gpus=[gpu_info(view) for view in gpus],
        held=sum(bool(view.worker_ids) for view in gpus),
        max_gpus=pool.settings.max_gpus,
        problem=pool.gpu_problem(),
    )


def gpu_info(view: GpuView) -> box_responses.GpuInfo:
    """One GPU with its state."""
    return box_responses.GpuInfo(
        uuid=view.gpu.uuid,
        index=view.gpu.index,
        name=view.gpu.name,
        total_bytes=view.gpu.total_bytes,
        free_bytes=view.gpu.free_bytes,
        utilization_percent=view.gpu.utilization_percent,
        temperature_celsius=view.gpu.temperature_celsius,
        worker_id=view.worker_id,
        free=view.free,
        reason=view.reason,
        worker_ids=list(view.worker_ids),
        foreign_processes=[box_responses.GpuProcess(pid=pid, used_bytes=size) for pid, size in view.strangers],
        quarantined=view.quarantined,
        lost=view.gpu.lost,
    )


def worker_list(workers: list[WorkerView]) -> box_responses.WorkerList:
    """Every worker process with the model it holds."""
    return box_responses.WorkerList(
        workers=[
            box_responses.WorkerInfo(
                worker_id=view.worker.id,
                state=view.worker.state.value,
                pid=view.pid,
                slots=list(view.worker.slots),
                jobs=sorted(view.worker.jobs),
                description=view.description,
                memory_bytes=view.memory_bytes,
                model=model_info(view.worker.spec),
            )
            for view in workers
        ]
    )


def cache_info(use: CacheUse) -> box_responses.CacheInfo:
    """The response cache, the models with most bytes first."""
    return box_responses.CacheInfo(
        entries=use.entries,
        bytes=use.file_bytes,
        max_bytes=use.max_bytes,
        hits=use.hits,
        models=[
            box_responses.CachedModelInfo(
                fingerprint=model.fingerprint,
                name=model.name,
                entries=model.entries,
                bytes=model.bytes,
                hits=model.hits,
                last_used=model.last_used,
            )
            for model in use.models
        ],
    )


def _result_files(job: Job) -> dict[str, responses.ResultFiles] | None:
    if job.result is None:
        return None
    files = responses.ResultFiles(results=job.result.results_path, samples=list(job.result.samples.values()))
    return {job.result.model_name: files}


def _progress(progress: Progress, eta_seconds: float | None) -> responses.ProgressInfo:
    return responses.ProgressInfo(
        phase=progress.phase.value,
        done=progress.done,
        total=progress.total,
        cached=progress.cached,
        errored=progress.errored,
        tasks={
            name: responses.TaskCount(done=task.done, total=task.total, errored=task.errored)
            for name, task in progress.tasks.items()
        },
        workers=progress.workers,
        routes=[responses.EngineRouteInfo(route=route.route, reason=route.reason) for route in progress.routes],
        eta_seconds=eta_seconds,
    )
