"""Reading a job's files a page at a time, whatever their size; blocking, so call it in a thread."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, BinaryIO

from gpu_pool.errors import NoSuchSamples
from gpu_pool.records import Job
from server.schemas import SamplePage

_BLOCK_BYTES = 1 << 20


def sample_page(job: Job, task: str | None, offset: int, limit: int) -> SamplePage:
    """`limit` records of a task from `offset` on; `task` may be left out where there is one. Raises NoSuchSamples."""
    name, path = _samples_file(job, task)
    try:
        with path.open("rb") as file:
            total = _count_lines(file)
            file.seek(0)
            lines = list(itertools.islice(file, offset, offset + limit))
    except FileNotFoundError as error:
        raise NoSuchSamples(f"The samples of {name} are no longer on the server") from error
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return SamplePage(task=name, offset=offset, limit=limit, total=total, samples=records)


def log_tail(path: Path, lines: int) -> str:
    """The last `lines` lines; empty when there is no log yet."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        position, tail = file.seek(0, 2), b""
        while position > 0 and tail.count(b"\n") <= lines:
            start = max(0, position - _BLOCK_BYTES)
            file.seek(start)
            tail, position = file.read(position - start) + tail, start
    return "".join(tail.decode(errors="replace").splitlines(keepends=True)[-lines:])


def _samples_file(job: Job, task: str | None) -> tuple[str, Path]:
    samples = job.samples
    if not samples:
        raise NoSuchSamples(f"Job {job.id} has no samples: no task is done yet, or log_samples was false")
    if task is None and len(samples) == 1:
        return next((name, Path(path)) for name, path in samples.items())
    if task not in samples:
        raise NoSuchSamples(f"Say which `task`: {', '.join(samples)}")
    return task, Path(samples[task])


def _count_lines(file: BinaryIO) -> int:
    """Records in a JSONL file, read block by block; each ends in a newline."""
    return sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK_BYTES), b""))
