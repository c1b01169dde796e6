"""`evalpool serve` whose durable writes are steps at which a process may be killed (`kill_points.py`).

Spawned children import this file again, so that it reaches evaluators and workers too.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Iterator
from typing import Any

import kill_points

_control = kill_points.control_of_this_process()
_kind = _control.enter()


def at(step: str) -> None:
    """This process is at `step` now."""
    _control.passage(_kind, step)


# ---------------------------------------------------------------- files: every process


def watch_files() -> None:
    """Files are written beside their place and become durable when they replace what is there."""
    replace = os.replace

    def replace_and_tell(source: Any, target: Any, **options: Any) -> None:
        file = re.sub(r"^\d{4}-\d\d-\d\dT[\d.-]+_", "", os.path.basename(target))
        file = re.sub(r"[0-9a-f]{16,}", "…", file)
        at(f"before {file}")
        replace(source, target, **options)
        at(f"after {file}")

    os.replace = replace_and_tell


# ---------------------------------------------------------------- the job store: the server


def watch_store() -> None:
    """Every transaction that writes, named by what it writes."""
    import sqlalchemy as sa
    from sqlalchemy import event

    here = threading.local()

    @event.listens_for(sa.Engine, "begin")
    def begin(connection: Any) -> None:
        here.written = []

    @event.listens_for(sa.Engine, "before_cursor_execute")
    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if written := _written(context):
            here.written.append(written)

    commit = sa.Connection._commit_impl

    def commit_and_tell(self: sa.Connection) -> None:
        if written := _in_short(here.written):
            at(f"before {written}")
        commit(self)
        if written:
            at(f"after {written}")

    sa.Connection._commit_impl = commit_and_tell


def _written(context: Any) -> str | None:
    """What a statement writes: its table, and of a job the new state or the columns."""
    if context is None or context.compiled is None:
        return None
    if context.isddl:
        return "migrate"
    if not (context.isinsert or context.isupdate or context.isdelete):
        return None
    verb = "insert" if context.isinsert else "update" if context.isupdate else "delete"
    table = context.compiled.statement.table
    if not context.isupdate:
        return f"{verb} {table.name}"
    values = context.compiled_parameters[0]
    if "state" in values:
        return f"update {table.name} to {values['state']}"
    return f"update {table.name} ({', '.join(column.name for column in table.columns if column.name in values)})"


def _in_short(written: list[str]) -> str:
    """Of a transaction; empty where it only read."""
    return "migrate" if "migrate" in written else ", ".join(dict.fromkeys(written))


# ---------------------------------------------------------------- answers and scores: evaluators


def watch_cache() -> None:
    """Each batch of answers that is kept, each claim to requests that a job is about to compute, and their end."""
    from gpu_pool.cache import ResponseCache

    writes = {"store": "answers", "reserve": "claims", "release": "release of claims", "leave": "end of all claims"}
    for name, what in writes.items():
        setattr(ResponseCache, name, _told(getattr(ResponseCache, name), what))


def _told(write: Any, what: str) -> Any:
    @functools.wraps(write)
    def write_and_tell(*arguments: Any) -> Any:
        at(f"before {what}")
        result = write(*arguments)
        at(f"after {what}")
        return result

    return write_and_tell


def watch_bootstrap() -> None:
    """Not a write, but a long computation: a step in its middle."""
    from gpu_pool.evaluator import entry

    prepare = entry._prepare_for_jobs

    def prepare_and_watch(*arguments: Any) -> Any:
        prepared = prepare(*arguments)
        from gpu_pool.evaluator import bootstrap

        resamples = bootstrap.resamples

        def resamples_and_tell(*arguments: Any) -> Iterator[Any]:
            for block in resamples(*arguments):
                yield block
                at("in the bootstrap")

        bootstrap.resamples = resamples_and_tell
        return prepared

    entry._prepare_for_jobs = prepare_and_watch


def wait_impatiently() -> None:
    """Evaluators report silent workers at once, so that one that is stopped is found in seconds."""
    from gpu_pool.evaluator import worker_link

    worker_link.SILENCE_SECONDS = 0.5


# ---------------------------------------------------------------- workers


def shard_workers(ranks: int) -> None:
    """Workers on the CPU as if each had several GPUs."""
    import msgspec

    from gpu_pool import local_processes
    from gpu_pool.messages import WorkerStart

    spawn = local_processes.spawn

    async def spawn_sharded(name: str, target: Any, start: Any, *others: Any) -> Any:
        if isinstance(start, WorkerStart):
            start = msgspec.structs.replace(start, tensor_parallel=ranks)
        return await spawn(name, target, start, *others)

    local_processes.spawn = spawn_sharded


watch_files()
if _kind == "server":
    watch_store()
    shard_workers(int(os.environ[kill_points.RANKS_VARIABLE]))
elif _kind in ("evaluator", "desk"):
    watch_cache()
    watch_bootstrap()
    wait_impatiently()

if __name__ == "__main__":
    from server.__main__ import main

    main()
