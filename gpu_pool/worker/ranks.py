"""The processes of a model that is sharded over several: how they are started, meet, and end together."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed

from gpu_pool.chunk_messages import FromRank, GenerationChunk, RankReady, decode_from_rank
from gpu_pool.messages import MAX_MESSAGE_BYTES, LoadFailed, WorkerStart
from gpu_pool.supervisor import describe_exit
from gpu_pool.worker.chunk_queue import Chunk
from gpu_pool.worker.computing import Answer, compute
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.media_chunks import MediaChunk
from gpu_pool.worker.entry import rank_main
from gpu_pool.worker.rank_link import lead

COLLECTIVE_SECONDS = 3600.0
"""How long a rank waits for another in a collective of the model: while they load, a slow disk may be the cause, and
the server's own limit comes first; later `rank_link` notices sooner."""

CAUSE_SECONDS = 3.0
"""How long the end of a rank may take to be noticed after a collective has failed for it."""


class OnFailure(Protocol):
    """What is done when ranks cannot go on: the worker says why, and ends."""

    def __call__(self, reason: str, *, out_of_memory: bool = False) -> NoReturn: ...


class Ranks:
    """Ranks 1 and up as the worker, which is rank 0, sees them. They end with it, and it with any of them."""

    def __init__(self, start: WorkerStart, on_failure: OnFailure) -> None:
        """Start them and meet them; only from the main thread, because they die with the thread that started them.

        `on_failure` is called, from any thread, when one could not load its shard or is lost.

        Raises:
            OSError, RuntimeError: they cannot be started or met.
        """
        self._on_failure = on_failure
        Path(_rendezvous(start)).unlink(missing_ok=True)  # a predecessor's would be taken for ours
        self._watching: list[threading.Thread] = []
        self._links = [self._spawn(start, rank) for rank in range(1, start.tensor_parallel)]
        meet_ranks(start, 0)

    def wait_loaded(self) -> int:
        """Wait until each has loaded its shard; returns the memory that they hold together, in bytes."""
        ready = [received.get() for _, received in self._links]
        return sum(message.memory_bytes for message in ready if isinstance(message, RankReady))

    def give_way(self) -> None:
        """Something failed here: let a rank whose end may have been the cause be reported before it."""
        deadline = time.monotonic() + CAUSE_SECONDS
        for thread in self._watching:
            thread.join(max(0.0, deadline - time.monotonic()))

    def compute(
        self,
        loaded: LoadedModel,
        chunk: Chunk,
        should_stop: Callable[[], bool],
        take_alike: Callable[[], GenerationChunk | None],
    ) -> Iterator[Answer]:
        """`computing.compute` by all ranks; only this one asks `should_stop` and `take_alike`."""
        assert not isinstance(chunk, MediaChunk), "models that read images are not sharded"
        run = partial(compute, loaded, chunk, lost=self._on_failure)
        return lead(run, should_stop, take_alike, chunk, self._links, self._on_failure)

    def _spawn(self, start: WorkerStart, rank: int) -> tuple[Connection, queue.SimpleQueue[FromRank]]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=True)
        process = context.Process(target=rank_main, args=(theirs, start, rank, os.getpid()), name=f"rank {rank}")
        process.start()
        theirs.close()  # or its death would never show as the end of the pipe
        received: queue.SimpleQueue[FromRank] = queue.SimpleQueue()
        watch = partial(self._watch, process, ours, received)
        thread = threading.Thread(target=watch, name=f"watch rank {rank}", daemon=True)
        thread.start()
        self._watching.append(thread)
        return ours, received

    def _watch(self, process: Any, connection: Connection, received: queue.SimpleQueue[FromRank]) -> NoReturn:
        try:
            while True:
                message = decode_from_rank(connection.recv_bytes(MAX_MESSAGE_BYTES))
                if isinstance(message, LoadFailed):
                    self._on_failure(message.error, out_of_memory=message.out_of_memory)
                received.put(message)
        except (EOFError, OSError):
            process.join()
        self._on_failure(f"{process.name} ended: {describe_exit(process.exitcode)}")


def meet_ranks(start: WorkerStart, rank: int) -> None:
    """Become rank `rank` of the worker `start`, on CUDA with the device of that index; returns when all are there.

    Raises:
        RuntimeError: they do not come, or their devices cannot be joined.
    """
    cuda = start.spec.device == "cuda"
    os.environ["LOCAL_RANK"] = str(rank)  # where transformers looks for this process's device
    for backend in ("GLOO", "NCCL"):  # all ranks are on this machine: none of its networks is needed
        os.environ.setdefault(f"{backend}_SOCKET_IFNAME", "lo")
    if cuda:
        torch.cuda.set_device(rank)
    store = torch.distributed.FileStore(  # pyright: ignore[reportPrivateImportUsage]
        _rendezvous(start), start.tensor_parallel
    )
    torch.distributed.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=start.tensor_parallel,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        device_id=torch.device("cuda", rank) if cuda else None,
    )


def _rendezvous(start: WorkerStart) -> str:
    """The file through which the ranks of this worker meet, in the private folder of its socket."""
    return f"{start.socket_path}.ranks"
