"""Reading a job's files a page at a time, whatever their size; blocking, so call it in a thread."""

from __future__ import annotations

import functools
import json
import os
import re
from array import array
from pathlib import Path

import msgspec

from gpu_pool.errors import NoSuchSamples
from gpu_pool.records import Job
from server.responses import SamplePage

_BLOCK_BYTES = 1 << 20
_INDEXED_FILES = 64  # eight bytes a line each
_NEWLINE = re.compile(rb"\n")
_json = msgspec.json.Decoder(msgspec.Raw)  # checks that it is JSON, and builds nothing


def sample_page(job: Job, task: str | None, offset: int, limit: int) -> SamplePage:
    """`limit` records of a task from `offset` on; `task` may be left out where there is one. Raises NoSuchSamples."""
    name, path = _samples_file(job, task)
    try:
        total, lines = _lines(path, offset, limit)
    except FileNotFoundError as error:
        raise NoSuchSamples(f"The samples of {name} are no longer on the server") from error
    samples = [_sample(line) for line in lines]
    return SamplePage(task=name, offset=offset, limit=limit, total=total, samples=samples)


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
    if task in job.evaluation.tasks and task not in samples:
        task = task.partition(":")[2]  # a library's name before one that only that library has
    if task not in samples:
        raise NoSuchSamples(f"Say which `task`: {', '.join(samples)}")
    return task, Path(samples[task])


def _sample(line: bytes) -> msgspec.Raw:
    """One record, as it lies in the file if that is JSON.

    What lm-eval writes beyond JSON is put right: NaN and infinities become null, half a character becomes "?".
    """
    try:
        line.decode()  # the other check lets through what is no UTF-8
        return _json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = json.dumps(json.loads(line), ensure_ascii=False)
        return msgspec.Raw(msgspec.json.encode(json.loads(text.encode("utf-8", "replace"))))


def _lines(path: Path, offset: int, limit: int) -> tuple[int, list[bytes]]:
    """How many lines the file has, and `limit` of them from `offset` on."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        starts = _line_starts(path, (status.st_ino, status.st_size, status.st_mtime_ns))
        total = len(starts) - 1
        first, end = min(offset, total), min(offset + limit, total)
        file.seek(starts[first])
        page = file.read(starts[end] - starts[first])
    return total, page.split(b"\n")[: end - first]


@functools.lru_cache(maxsize=_INDEXED_FILES)
def _line_starts(path: Path, version: tuple[int, int, int]) -> array[int]:
    """Where each line begins, and the end of the last; `version` tells a new file of the same name from an old one.

    Kept, so that the cost of a page does not depend on the size of its file.
    """
    starts, position = array("Q", [0]), 0
    with path.open("rb") as file:
        for block in iter(lambda: file.read(_BLOCK_BYTES), b""):
            starts.extend(position + newline.end() for newline in _NEWLINE.finditer(block))
            position += len(block)
    return starts
