"""From the pool's records to response bodies."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from gpu_pool.messages import TaskEntry
from gpu_pool.pool import Pool
from gpu_pool.records import GpuView, Job, JobState, ModelSpec, Progress, QueueView, WorkerView
from server import schemas


def status_of(state: JobState) -> schemas.JobStatus:
    """The reference's five names: a job that is being cancelled still reads "running"."""
    return schemas.JobStatus.RUNNING if state is JobState.CANCELLING else schemas.JobStatus(state.value)


def states_of(status: schemas.JobStatus) -> tuple[JobState, ...]:
    """The states that show as `status`."""
    return tuple(state for state in JobState if status_of(state) is status)


def submitted(job: Job, position: int | None) -> schemas.JobSubmitted:
    """The reference's answer to POST /evaluate; a job that started at once had nobody ahead of it."""
    position = position or 0
    return schemas.JobSubmitted(
        job_id=job.id,
        status=schemas.JobStatus.QUEUED,
        position_in_queue=position,
        message=f"Job queued successfully. Position in queue: {position}",
    )


def job_info(job: Job, pool: Pool) -> schemas.JobInfo:
    """One job as GET /jobs/{id} shows it."""
    return schemas.JobInfo(
        job_id=job.id,
        status=status_of(job.state),
        created_at=job.created_at,
        started_at=job.started_at,
        completed_at=job.completed_at,
        request=job.request,
        result=_result_files(job),
        error=job.error,
        position_in_queue=pool.queue_position(job.id),
        phase=job.progress.phase.value if job.progress and job.state is JobState.RUNNING else None,
        progress=_progress(job.progress, pool.eta_seconds(job.id)) if job.progress else None,
        metrics=job.metrics,
        attempt=job.attempt,
        model=model_info(job.model) if job.model else None,
    )


def job_page(jobs: list[Job], limit: int, pool: Pool) -> schemas.JobPage:
    """At most `limit` of `jobs`, which holds one more where there is a next page."""
    shown = jobs[:limit]
    return schemas.JobPage(
        jobs=[job_info(job, pool) for job in shown], next_cursor=shown[-1].id if len(jobs) > limit else None
    )


def model_info(spec: ModelSpec) -> schemas.ModelInfo:
    """A model by its content."""
    return schemas.ModelInfo(
        kind=spec.kind, fingerprint=spec.fingerprint, device=spec.device, args=msgspec.to_builtins(spec.args)
    )


def queue_info(queue: QueueView) -> schemas.QueueInfo:
    """The reference's queue, and all running jobs."""
    return schemas.QueueInfo(
        queue_size=len(queue.queued),
        running_job=queue.running[0] if queue.running else None,
        queued_jobs=list(queue.queued),
        completed_jobs=queue.completed,
        failed_jobs=queue.failed,
        running_jobs=list(queue.running),
        cancelled_jobs=queue.cancelled,
    )


def health(queue: QueueView) -> schemas.Health:
    """The same queue length as GET /queue."""
    return schemas.Health(status="healthy", timestamp=datetime.now(UTC), queue_size=len(queue.queued))


def task_list(entries: tuple[TaskEntry, ...], details: bool) -> schemas.TaskList:
    """Names of tasks, groups and tags; with `details` what each is."""
    infos = [
        schemas.TaskInfo(name=entry.name, kind=entry.kind, output_type=entry.output_type)
        for entry in (entries if details else ())
    ]
    return schemas.TaskList(tasks=[entry.name for entry in entries], entries=infos if details else None)


def gpu_list(gpus: list[GpuView]) -> schemas.GpuList:
    """Every GPU with its state."""
    return schemas.GpuList(
        gpus=[
            schemas.GpuInfo(
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
            )
            for view in gpus
        ]
    )


def worker_list(workers: list[WorkerView]) -> schemas.WorkerList:
    """Every worker process with the model it holds."""
    return schemas.WorkerList(
        workers=[
            schemas.WorkerInfo(
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


def _result_files(job: Job) -> dict[str, schemas.ResultFiles] | None:
    if job.result is None:
        return None
    files = schemas.ResultFiles(results=job.result.results_path, samples=list(job.result.samples.values()))
    return {job.result.model_name: files}


def _progress(progress: Progress, eta_seconds: float | None) -> schemas.ProgressInfo:
    return schemas.ProgressInfo(
        phase=progress.phase.value,
        done=progress.done,
        total=progress.total,
        cached=progress.cached,
        tasks={name: schemas.TaskCount(done=task.done, total=task.total) for name, task in progress.tasks.items()},
        workers=progress.workers,
        eta_seconds=eta_seconds,
    )
