"""The worker process after its environment is set: load, check, listen, and compute one chunk after another."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from gpu_pool.child import say
from gpu_pool.chunk_messages import ChunkBegun, ChunkFailed, GenerationChunk, Welcome
from gpu_pool.fingerprint import deserves_another_look, is_current, is_of_hub, memo_path
from gpu_pool.messages import Dropped, LoadFailed, WorkerReady, WorkerStart
from gpu_pool.records import ModelSpec
from gpu_pool.worker.chunk_queue import Chunk, ChunkQueue, Client
from gpu_pool.worker.computing import Answer, compute, in_short
from gpu_pool.worker.control import Control
from gpu_pool.worker.data_channel import listen
from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.loading import choose_ranks, load_model
from gpu_pool.worker.engine.preparation import Preparation
from gpu_pool.worker.engine.shortage import is_out_of_memory
from gpu_pool.worker.pulse import Pulse
from gpu_pool.worker.ranks import Ranks


class ContentChanged(Exception):
    """The model's files are no longer those that were asked for."""


@dataclass(frozen=True, kw_only=True)
class Replica:
    """The loaded model, in this process alone or sharded over several."""

    loaded: LoadedModel
    memory_bytes: int
    compute: Callable[[Chunk, Callable[[], bool], Callable[[], GenerationChunk | None]], Iterator[Answer]]


def run_worker(control: Control, start: WorkerStart) -> NoReturn:
    """Serve until the control pipe says otherwise, the model turns out not to be servable, or a rank is lost."""
    queue = ChunkQueue(lambda job_id: control.send(Dropped(job_id=job_id)))
    control.drop = queue.drop
    torch.set_num_threads(start.threads_of_a_rank)
    try:
        replica = _load(start, control)
        _check_content(start.spec, Path(start.data_dir))
        say(f"loaded {start.spec.fingerprint}")
        listen(start.socket_path, queue, _welcome(start.worker_id, replica.loaded), Preparation(replica.loaded.prepare))
    except Exception as error:
        traceback.print_exc()
        control.fail(_load_failed(start, in_short(error), out_of_memory=is_out_of_memory(error)), in_short(error))
    control.send_ready(WorkerReady(memory_bytes=replica.memory_bytes, description=replica.loaded.describe()))
    pulse = Pulse(control.send)
    while True:
        step(replica, queue, pulse)


def _load(start: WorkerStart, control: Control) -> Replica:
    """Load the model, over as many ranks as it can be sharded over."""

    def on_failure(reason: str, *, out_of_memory: bool = False) -> NoReturn:
        print(f"the worker ends: {reason}", file=sys.stderr)
        control.fail(_load_failed(start, reason, out_of_memory=out_of_memory), reason)

    spec, allow_remote_code = start.spec, start.allow_remote_code
    if not is_of_hub(spec.fingerprint) and not Path(spec.args.pretrained).exists():
        raise FileNotFoundError("it is not there any more")  # transformers would take the path for a hub id
    count = choose_ranks(spec, start.tensor_parallel, allow_remote_code=allow_remote_code)
    if count == 1:
        loaded = load_model(spec, allow_remote_code=allow_remote_code, budget=start.memory_bytes)
        computing = partial(compute, loaded, lost=on_failure)
        return Replica(loaded=loaded, memory_bytes=loaded.memory_bytes(), compute=computing)
    ranks = Ranks(start, on_failure)
    try:
        loaded = load_model(spec, allow_remote_code=allow_remote_code, ranks=count, budget=start.memory_bytes)
    except Exception:
        ranks.give_way()
        raise
    memory_bytes = ranks.wait_loaded() + loaded.memory_bytes()
    return Replica(loaded=loaded, memory_bytes=memory_bytes, compute=partial(ranks.compute, loaded))


def _load_failed(start: WorkerStart, reason: str, *, out_of_memory: bool = False) -> LoadFailed:
    """Whatever went wrong, half a file may have been the cause."""
    changed = deserves_another_look(start.spec, memo_path(Path(start.data_dir)))
    error = f"{start.spec.args.pretrained} cannot be served: {reason}"
    return LoadFailed(error=error, content_changed=changed, out_of_memory=out_of_memory)


def _check_content(spec: ModelSpec, data_dir: Path) -> None:
    """After loading: whatever was written before or meanwhile shows in the fingerprint."""
    if not is_current(spec, memo_path(data_dir)):
        raise ContentChanged("its files have changed since it was asked for")


def _welcome(worker_id: str, loaded: LoadedModel) -> Welcome:
    return Welcome(
        worker_id=worker_id,
        max_length=loaded.max_length,
        prefix_token_id=loaded.prefix_token_id,
        dtype=loaded.dtype,
        attn_implementation=loaded.attn_implementation,
        route=loaded.route[0],
        route_reason=loaded.route[1],
        no_media=loaded.no_media,
    )


def step(replica: Replica, queue: ChunkQueue, pulse: Pulse) -> None:
    """Compute one chunk, and those that may join it, and answer them, unless their evaluator has gone."""
    client, chunk = queue.take()
    pulse.beat()
    try:
        _answer(replica, client, chunk, queue, pulse)
    finally:
        queue.finish()


def _answer(replica: Replica, client: Client, first: Chunk, queue: ChunkQueue | None, pulse: Pulse) -> None:
    """Answer `first` and what joins it from the `queue`; what fails together is computed again, each chunk alone."""
    unanswered: dict[int, Chunk] = {}

    def begin(chunk: Chunk) -> None:
        unanswered[chunk.chunk_id] = chunk
        if not client.gone:
            client.send(ChunkBegun(chunk_id=chunk.chunk_id))

    def should_stop() -> bool:
        pulse.beat()
        return client.gone

    def take_alike() -> GenerationChunk | None:
        if queue is None or not isinstance(first, GenerationChunk) or client.gone:
            return None
        if (chunk := queue.take_alike(client, first)) is not None:
            begin(chunk)
        return chunk

    begin(first)
    try:
        for answer in replica.compute(first, should_stop, take_alike):
            del unanswered[answer.chunk_id]
            if not client.gone:
                client.send(answer)
    except Cancelled:
        return
    except Exception as error:
        traceback.print_exc()
        if len(unanswered) == 1:
            [chunk_id] = unanswered
            if not client.gone:
                client.send(ChunkFailed(chunk_id=chunk_id, error=in_short(error)))
            return
    for chunk in unanswered.values():
        _answer(replica, client, chunk, None, pulse)
