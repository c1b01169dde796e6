# pyright: basic
"""One merge from beginning to end, in the process that does nothing else."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from gpu_pool.child import say
from gpu_pool.merge import METADATA, begin_mark, description_files, is_merged
from gpu_pool.records import Merge, Phase, Progress, TaskProgress
from gpu_pool.whole_file import sync_folder
from gpu_pool.worker.merging.distcp import DistcpTensors
from gpu_pool.worker.merging.publishing import publish
from gpu_pool.worker.merging.rank_files import RankTensors
from gpu_pool.worker.merging.tensors import MergeError, ShardedTensors
from gpu_pool.worker.merging.weights import write_bytes, write_weights

REPORT_SECONDS = 0.25
"""Between two reports of progress: smooth for a person, nothing for the server."""


def merge(work: Merge, staging: Path, report: Callable[[Progress], object]) -> Progress:
    """Merge, written to `staging` first, which is gone on return; returns the progress of what is done.

    Raises:
        MergeError: the shards cannot be merged, or there is no room for it, and why. Nothing of it is left.
        OSError: a file cannot be read or written.
    """
    output = Path(work.output_path)
    shutil.rmtree(staging, ignore_errors=True)  # what an attempt that was killed has left
    if is_merged(work):
        say(f"{output} is the merge of these shards already")
        there = sum(path.stat().st_size for path in output.glob("model*.safetensors"))
        return _progress(there, there)
    mark = begin_mark(work)
    tensors = _open(work)
    total = sum(kind.nbytes for kind in tensors.types.values())
    say(f"merging {len(tensors.types)} tensors, {total} bytes, of {work.shards_path}")
    try:
        staging.mkdir(mode=0o755)
        _check_room(staging, total)
        weights = write_weights(tensors, staging, work.max_shard_bytes, _Counter(total, report).add)
        for file in description_files(work):
            write_bytes(staging / file.name, file.read_bytes())
        sync_folder(staging)
        if begin_mark(work) != mark:
            raise MergeError(f"{work.shards_path} has changed while it was merged; merge it when the save is complete")
        publish(staging, output, weights, mark)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    say(f"merged into {output}")
    return _progress(total, total)


def _open(work: Merge) -> ShardedTensors:
    folder = Path(work.shards_path)
    is_distcp = (folder / METADATA).is_file()
    tensors = DistcpTensors(folder, work.checkpoint_type) if is_distcp else RankTensors(folder)
    if not tensors.types:
        raise MergeError(f"{folder} holds no tensors")
    return tensors


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MergeError(f"no space for it: the merged weights are {needed} bytes, and {folder.parent} has {free} free")


class _Counter:
    """Counts bytes, and reports them now and then."""

    def __init__(self, total: int, report: Callable[[Progress], object]) -> None:
        self._done, self._total, self._report = 0, total, report
        self._reported = time.monotonic()
        report(_progress(0, total))

    def add(self, written: int) -> None:
        self._done += written
        if time.monotonic() - self._reported >= REPORT_SECONDS:
            self._reported = time.monotonic()
            self._report(_progress(self._done, self._total))


def _progress(done: int, total: int) -> Progress:
    return Progress(phase=Phase.MERGING, tasks={"weights": TaskProgress(done=done, total=total)})


def explain(error: Exception) -> str:
    """What went wrong, in one line for the user."""
    if isinstance(error, MergeError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the merged checkpoint'}: {os.strerror(error.errno or 0)}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
