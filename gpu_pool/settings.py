"""What the operator decides about the pool; the server fills it from flags, environment and file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from gpu_pool.endpoints import Endpoint
from gpu_pool.records import DEFAULT_CACHE_MAX_BYTES, Record

_EVALUATOR_BYTES = 768 * 1024**2
"""What an evaluator usually takes: lm-eval, a tokenizer, the documents of a few tasks."""
_EVALUATORS_SHARE = 0.25
"""Of a machine's memory; the rest is for workers that load, the cache's pages and everyone else."""


def default_cpu_workers() -> int:
    """One CPU worker for every 8 cores, at least one: a worker with few threads serves nobody well."""
    return max(1, (os.cpu_count() or 1) // 8)


def evaluators_that_fit(machine_bytes: int) -> int:
    """How many evaluators the share of a machine's memory that is theirs holds."""
    return int(_EVALUATORS_SHARE * machine_bytes) // _EVALUATOR_BYTES


class PoolSettings(Record, frozen=True, kw_only=True):
    """Every field may be given as EVALPOOL_<FIELD>, in the TOML file and, unless it is a table, as a flag."""

    data_dir: Path = Path("evalpool-data")
    """Folder of jobs, results, response cache and logs; one server at a time uses it."""
    database: str | None = None
    """Where jobs are kept: postgresql://user@host/name or sqlite:///FILE; None: `jobs.sqlite` in the data folder."""
    retention_days: Annotated[float, Meta(gt=0)] | None = None
    """Jobs that ended longer ago are deleted with the files in their folder; None: kept."""
    retention_jobs: Annotated[int, Meta(ge=0)] | None = None
    """So many of the jobs that ended last are kept, older ones are deleted; None: all."""
    include_paths: tuple[Path, ...] = ()
    """Folders of the user's own task YAML."""
    dataset_roots: dict[str, str] = {}
    """Hub data set -> local files, so that unmodified tasks run offline."""
    endpoints: dict[str, Endpoint] = {}
    """OpenAI-compatible endpoints that requests may name, with what belongs to each."""
    cpu_workers: Annotated[int, Meta(ge=0)] = default_cpu_workers()
    """Most workers that compute on the CPU: one for every 8 cores unless given."""
    evaluators: Annotated[int, Meta(ge=0)] = 0
    """Jobs that may run at once (evaluator processes). 0: one more than there may be workers, and 4 more for each GPU
    as far as a quarter of the machine's memory holds them."""
    output_roots: tuple[Path, ...] = ()
    """Folders under which a request's `output_dir` may lie, beside the data folder's own."""
    allow_code_execution: bool = False
    """Run tasks that execute code written by the model."""
    allow_judges: bool = False
    """Run tasks of lmms-eval whose scoring asks a judge over the network, with the keys that the server's environment
    holds for it: every request may spend them. Otherwise no process finds such a key."""
    allow_remote_code: bool = False
    """Run code that comes with a checkpoint (`trust_remote_code`)."""
    max_attempts: Annotated[int, Meta(ge=1)] = 3
    """Times a job is started before processes that end by themselves make it fail, unless it gets further each time.
    Those that somebody kills, for anything but want of memory, are not held against it (see `gpu_pool.losses`)."""
    evaluator_memory_bytes: Annotated[int, Meta(ge=1)] = 4 * 1024**3
    """An evaluator above this is replaced when its job is done."""
    gpu_free_fraction: Annotated[float, Meta(gt=0, le=1)] = 0.9
    """A GPU counts as free when at least this share of its memory is."""
    model_patience_s: Annotated[float, Meta(gt=0)] = 120.0
    """An admitted job whose model's files are missing, unfinished or broken fails when nothing was written to them for
    so long; until then it waits."""
    worker_load_timeout_s: Annotated[float, Meta(gt=0)] = 3600.0
    """A worker that has not loaded its model by then is killed."""
    worker_stall_s: Annotated[float, Meta(gt=0)] = 600.0
    """A worker that owes answers and has begun no batch or step for so long hangs and is killed, with all its ranks."""
    unresponsive_s: Annotated[float, Meta(gt=0)] = 120.0
    """A process that does not answer the server for so long is stopped or hangs, and is killed. To answer takes no more
    than a moment of Python's global lock: what loads or computes for longer in one go is C code."""
    drop_timeout_s: Annotated[float, Meta(gt=0)] = 60.0
    """A worker that has not reached the end of a step by then, while a job waits to be cancelled, is killed."""
    max_workers_per_gpu: Annotated[int, Meta(ge=1)] = 1
    """Workers that may share one GPU, where their models' needs fit its memory together."""
    max_gpus: Annotated[int, Meta(ge=0)] | None = None
    """Most GPUs that workers hold at once; None: all that are free."""
    allow_gpus: tuple[str, ...] = ()
    """GPUs that may be used: positions in PCI order ("0", of a MIG instance "0:1") or UUIDs; none given: all."""
    deny_gpus: tuple[str, ...] = ()
    """GPUs that may not, even if they are allowed."""
    gpu_lock_dir: Path | None = None
    """Folder of the lock files by which the servers on a machine keep off each other's GPUs: the same for all of them.
    None: `evalpool-locks` in /run/lock, or in /tmp where not everybody may write in that."""
    yield_to_foreign: bool = False
    """Whether an idle worker ends at once when a process that is not ours appears on its GPU."""
    gpu_return_timeout_s: Annotated[float, Meta(gt=0)] = 30.0
    """How long the memory of a worker that has ended may take to come back before its GPU is quarantined."""
    idle_worker_s: Annotated[float, Meta(ge=0)] = 3600.0
    """A worker without a job is stopped after this time, and its GPU is free for others; 0: never."""
    patience_s: Annotated[float, Meta(gt=0)] = 300.0
    """How long others pass a job that has to wait for several GPUs at once, before jobs pause for it, and how long
    those work again, once they have loaded, before they may pause once more."""
    cache_max_bytes: Annotated[int, Meta(ge=1024**2)] = DEFAULT_CACHE_MAX_BYTES
    """Size of the response cache's file; what was used least recently goes first."""
