"""What is asked of a box over time: models and jobs with what they cost, and the JSON lines that they are kept in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec


class TraceModel(
    msgspec.Struct, frozen=True, kw_only=True, tag="model", forbid_unknown_fields=True, omit_defaults=True
):
    """A checkpoint. Loading one costs the same wherever and whenever it is done."""

    name: str
    load_s: float
    """Seconds from starting a worker to its first chunk."""
    gpus: int = 1
    """Those of one replica."""


class TraceJob(msgspec.Struct, frozen=True, kw_only=True, tag="job", forbid_unknown_fields=True, omit_defaults=True):
    """One evaluation: preparation, then chunks in any order and on any replica, then scoring."""

    id: str
    arrival_s: float
    """When it is submitted; the trace begins at 0."""
    model: str
    chunks: int
    chunk_s: float
    """Seconds of one chunk on one replica."""
    prepare_s: float = 0.0
    score_s: float = 0.0
    num_gpus: int = 1
    """Most GPUs that it may hold."""
    priority: int = 0
    gpu: int | None = None
    """Only this GPU, or None for any."""
    cancel_s: float | None = None
    """When its submitter cancels it, if ever and if it has not ended by then."""


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs in the order of their arrival, on models by name."""

    name: str
    models: Mapping[str, TraceModel]
    jobs: tuple[TraceJob, ...]

    def replicas(self, job: TraceJob, gpus: int) -> int:
        """Most replicas that the job may use at once on a box of `gpus`; 0: not even one."""
        return min(job.num_gpus, gpus) // self.models[job.model].gpus

    def work_s(self, job: TraceJob) -> float:
        """GPU seconds of the job's chunks."""
        return job.chunks * job.chunk_s * self.models[job.model].gpus

    def path_s(self, job: TraceJob, gpus: int, load_s: float) -> float:
        """Seconds from its start that the job takes at least, with the box to itself."""
        before = max(load_s, job.prepare_s) if job.chunks else job.prepare_s
        return before + -(-job.chunks // self.replicas(job, gpus)) * job.chunk_s + job.score_s

    def longest_first(self, gpus: int) -> Trace:
        """The same with the length of each job as its priority, which no scheduler can know."""
        lengths = {job.id: round(self.path_s(job, gpus, self.models[job.model].load_s)) for job in self.jobs}
        jobs = tuple(msgspec.structs.replace(job, priority=lengths[job.id]) for job in self.jobs)
        return msgspec.structs.replace(self, name=f"{self.name}, longest first", jobs=jobs)

    def bound_s(self, gpus: int, *, loads: bool = True) -> float:
        """No schedule can have ended all jobs before this time.

        The largest of two kinds of bound (Graham 1969, with release times): of what arrives from some moment on, all
        the work divided by the GPUs; and each job's own critical path. With `loads`, a model's one necessary loading
        counts as work, and as a part of the critical path of the first job that needs it.
        """
        seen: set[str] = set()
        paths: list[float] = []
        work: list[float] = []
        for job in self.jobs:
            model = self.models[job.model]
            load_s = model.load_s if loads and job.model not in seen else 0.0
            seen.add(job.model)
            paths.append(job.arrival_s + self.path_s(job, gpus, load_s))
            work.append(self.work_s(job) + (load_s * model.gpus if job.chunks else 0.0))
        bound, left = max(paths, default=0.0), 0.0
        for job, seconds in zip(reversed(self.jobs), reversed(work), strict=True):
            left += seconds
            bound = max(bound, job.arrival_s + left / gpus)
        return bound

    def check(self, gpus: int) -> None:
        """Raise ValueError, naming the job and the field, when the trace cannot be run on a box of `gpus`."""
        before = 0.0
        for job in self.jobs:
            if job.model not in self.models:
                raise ValueError(f"trace {self.name}, job {job.id}: model {job.model!r} is not one of its models")
            if not before <= job.arrival_s:
                raise ValueError(f"trace {self.name}, job {job.id}: arrival_s is before that of the job before it")
            if job.chunks < 0 or min(job.chunk_s, job.prepare_s, job.score_s) < 0:
                raise ValueError(f"trace {self.name}, job {job.id}: counts and seconds must not be negative")
            if not self.replicas(job, gpus):
                needed = self.models[job.model].gpus
                raise ValueError(
                    f"trace {self.name}, job {job.id}: num_gpus is {job.num_gpus} on a box of {gpus}, "
                    f"but a replica of {job.model} takes {needed}"
                )
            if job.gpu is not None and not (job.num_gpus == 1 and 0 <= job.gpu < gpus):
                raise ValueError(
                    f"trace {self.name}, job {job.id}: gpu is {job.gpu} and num_gpus is {job.num_gpus}, "
                    f"but on a box of {gpus} gpu must be below that, and num_gpus 1 beside it"
                )
            before = job.arrival_s


def make_trace(name: str, models: list[TraceModel], jobs: list[TraceJob]) -> Trace:
    """Jobs sorted by arrival, equal ones as they are given."""
    by_arrival = sorted(jobs, key=lambda job: job.arrival_s)
    return Trace(name=name, models={model.name: model for model in models}, jobs=tuple(by_arrival))


def read_trace(path: Path) -> Trace:
    """What `write_trace` wrote. Raises ValueError with the number of the line that is wrong."""
    decoder = msgspec.json.Decoder(TraceModel | TraceJob)
    models: list[TraceModel] = []
    jobs: list[TraceJob] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            entry = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if isinstance(entry, TraceModel):
            models.append(entry)
        else:
            jobs.append(entry)
    return make_trace(path.stem, models, jobs)


def write_trace(trace: Trace, path: Path) -> None:
    """A line for each model, then one for each job."""
    lines = [msgspec.json.encode(entry) for entry in (*trace.models.values(), *trace.jobs)]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
