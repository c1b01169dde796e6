"""Random traces: how checkpoints are evaluated in practice, in six patterns. Equal seeds give equal traces."""

from __future__ import annotations

import random
from collections.abc import Callable

from msgspec.structs import replace
from sim_traces import Trace, TraceJob, TraceModel, make_trace

CHUNK_SECONDS = 1.0
"""What evaluators aim at."""
SHORTEST_SECONDS, LONGEST_SECONDS, TAIL = 10.0, 3600.0, 1.2
"""GPU seconds of a job: a bounded Pareto distribution with this exponent; half take less than 18 s, one in a hundred
more than 400 s."""
LOAD_SECONDS = {1: (8.0, 30.0), 2: (20.0, 45.0), 4: (30.0, 60.0), 8: (45.0, 90.0)}
"""Least and most seconds of loading by GPUs of a replica."""
PREPARE_SECONDS = (0.5, 3.0)
SCORE_SECONDS = (0.1, 2.0)
GPUS_OF_A_JOB = (1, 1, 1, 1, 2, 4, 8)
"""Replicas that jobs ask for, each as often as it is here."""
PRIORITIES = (0, 0, 0, 0, 0, 0, 1, 3)
"""Of the jobs of `mixed`, each as often as it is here."""
PINNED_SHARE = 0.1
"""Of those of its jobs that need one GPU, the ones that ask for a certain one."""
JOBS_OF_A_CHECKPOINT = (4, 12)
"""Least and most jobs that a training loop submits for each checkpoint."""


class Maker:
    """Draws models and jobs for a box of so many GPUs."""

    def __init__(self, gpus: int, seed: int) -> None:
        self.gpus = gpus
        self.random = random.Random(seed)
        self.models: list[TraceModel] = []
        self.jobs: list[TraceJob] = []

    def model(self, gpus: int = 1) -> TraceModel:
        """A new one."""
        load_s = round(self.random.uniform(*LOAD_SECONDS[gpus]), 1)
        model = TraceModel(name=f"model-{len(self.models)}", load_s=load_s, gpus=gpus)
        self.models.append(model)
        return model

    def job(self, model: TraceModel, arrival_s: float) -> TraceJob:
        """A new one on `model`."""
        chunks = max(1, round(self.size_s() / (CHUNK_SECONDS * model.gpus)))
        replicas = self.random.choice(GPUS_OF_A_JOB)
        job = TraceJob(
            id=f"job-{len(self.jobs)}",
            arrival_s=round(arrival_s, 3),
            model=model.name,
            chunks=chunks,
            chunk_s=CHUNK_SECONDS,
            prepare_s=round(self.random.uniform(*PREPARE_SECONDS), 2),
            score_s=round(self.random.uniform(*SCORE_SECONDS), 2),
            num_gpus=min(self.gpus, replicas * model.gpus) // model.gpus * model.gpus,
        )
        self.jobs.append(job)
        return job

    def size_s(self) -> float:
        """GPU seconds of a job, by the inverse of the bounded Pareto distribution function."""
        shrunk = 1 - self.random.random() * (1 - (SHORTEST_SECONDS / LONGEST_SECONDS) ** TAIL)
        return SHORTEST_SECONDS * shrunk ** (-1 / TAIL)

    def trace(self, name: str) -> Trace:
        """All that was drawn."""
        return make_trace(name, self.models, self.jobs)

    def arrivals(self, work_s: list[float], load: float) -> list[float]:
        """Moments of a Poisson process in which so much work keeps the box busy for `load` of the time."""
        between_s = sum(work_s) / len(work_s) / (load * self.gpus)
        moments = [0.0]
        for _ in work_s[1:]:
            moments.append(moments[-1] + self.random.expovariate(1 / between_s))
        return moments


def all_at_once(maker: Maker, jobs: int, load: float) -> Trace:
    """A sweep over many models, twenty jobs on each, all submitted at the start in any order."""
    models = [maker.model() for _ in range(max(1, jobs // 20))]
    for _ in range(jobs):
        maker.job(maker.random.choice(models), 0.0)
    return maker.trace("all at once")


def poisson(maker: Maker, jobs: int, load: float) -> Trace:
    """Independent submissions: a Poisson process, each on one of a few dozen models, some asked for much more often.

    `load` is that of the computing and of loading each model once, as below.
    """
    models = [maker.model() for _ in range(max(1, min(jobs // 4, 4 * maker.gpus)))]
    popular = [1 / rank for rank in range(1, len(models) + 1)]  # Zipf
    drawn = [maker.job(maker.random.choices(models, popular)[0], 0.0) for _ in range(jobs)]
    return _spread(maker, drawn, list(range(jobs)), load, f"Poisson, load {load:g}")


def checkpoints(maker: Maker, jobs: int, load: float) -> Trace:
    """Training loops: each checkpoint is a new model, with a handful of jobs that come together.

    `load` is that of the computing and of loading each model once.
    """
    drawn: list[TraceJob] = []
    bursts: list[int] = []
    while len(drawn) < jobs:
        model = maker.model()
        for _ in range(min(maker.random.randint(*JOBS_OF_A_CHECKPOINT), jobs - len(drawn))):
            drawn.append(maker.job(model, 0.0))
            bursts.append(len(maker.models) - 1)
    return _spread(maker, drawn, bursts, load, f"checkpoints, load {load:g}")


def few_models(maker: Maker, jobs: int, load: float) -> Trace:
    """Many jobs on four models, all submitted at the start in any order."""
    models = [maker.model() for _ in range(4)]
    for _ in range(jobs):
        maker.job(maker.random.choice(models), 0.0)
    return maker.trace("few models")


def large_models(maker: Maker, jobs: int, load: float) -> Trace:
    """Models of one, two, four and eight GPUs, as far as they fit, all submitted at the start in any order."""
    sizes = [gpus for gpus in LOAD_SECONDS if gpus <= maker.gpus]
    models = [maker.model(maker.random.choice(sizes)) for _ in range(max(1, jobs // 20))]
    for _ in range(jobs):
        maker.job(maker.random.choice(models), 0.0)
    return maker.trace("large models")


def mixed(maker: Maker, jobs: int, load: float) -> Trace:
    """Large models, where some jobs are more important than others, and some ask for one certain GPU."""
    sizes = large_models(maker, jobs, load).models
    for number, job in enumerate(maker.jobs):
        job = replace(job, priority=maker.random.choice(PRIORITIES))
        if sizes[job.model].gpus == 1 and maker.random.random() < PINNED_SHARE:
            job = replace(job, gpu=maker.random.randrange(maker.gpus), num_gpus=1)
        maker.jobs[number] = job
    return maker.trace("mixed")


PATTERNS: dict[str, Callable[[Maker, int, float], Trace]] = {
    "all-at-once": all_at_once,
    "poisson": poisson,
    "checkpoints": checkpoints,
    "few-models": few_models,
    "large-models": large_models,
    "mixed": mixed,
}


def random_trace(pattern: str, jobs: int, gpus: int, load: float = 0.9, seed: int = 0) -> Trace:
    """A trace of so many jobs in one of PATTERNS, for a box of `gpus`; `load` matters where arrivals are spread."""
    return PATTERNS[pattern](Maker(gpus, seed), jobs, load)


def after_history(trace: Trace, jobs: int, gpus: int) -> Trace:
    """The trace after so many short jobs, each on a model of its own, for which the box is large enough."""
    models = [TraceModel(name=f"old-{number}", load_s=0.2) for number in range(jobs)]
    between_s = 3.0 / gpus  # loading, a chunk, and the change to the next model
    old = [
        TraceJob(id=f"old-{number}", arrival_s=number * between_s, model=model.name, chunks=1, chunk_s=0.2)
        for number, model in enumerate(models)
    ]
    begin_s = jobs * between_s + 60.0
    new = [replace(job, arrival_s=job.arrival_s + begin_s) for job in trace.jobs]
    return make_trace(trace.name, [*models, *trace.models.values()], [*old, *new])


def _spread(maker: Maker, drawn: list[TraceJob], bursts: list[int], load: float, name: str) -> Trace:
    """Give each burst of jobs its moment; `bursts` says to which one a job belongs, from 0 in ascending order."""
    models = {model.name: model for model in maker.models}
    loads_s = {model.name: model.load_s * model.gpus for model in maker.models}
    work_s = [0.0] * (bursts[-1] + 1)
    for burst, job in zip(bursts, drawn, strict=True):
        work_s[burst] += job.chunks * job.chunk_s * models[job.model].gpus + loads_s.pop(job.model, 0.0)
    moments = maker.arrivals(work_s, load)
    jobs = [replace(job, arrival_s=round(moments[burst], 3)) for burst, job in zip(bursts, drawn, strict=True)]
    return make_trace(name, maker.models, jobs)
