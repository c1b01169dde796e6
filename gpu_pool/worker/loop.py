"""The worker process after its environment is set: load, check, listen, and compute one chunk after another."""

from __future__ import annotations

import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import assert_never

import torch

from gpu_pool.fingerprint import fingerprint_model
from gpu_pool.messages import (
    ChunkFailed,
    Dropped,
    FromWorkerData,
    GenerationChunk,
    GenerationDone,
    LoadFailed,
    LoglikelihoodChunk,
    LoglikelihoodDone,
    Welcome,
    WorkerReady,
    WorkerStart,
)
from gpu_pool.records import ModelSpec
from gpu_pool.worker.chunk_queue import Chunk, ChunkQueue, Client
from gpu_pool.worker.control import Control, end_process
from gpu_pool.worker.data_channel import listen
from gpu_pool.worker.engine.batching import Cancelled
from gpu_pool.worker.engine.generation import generate
from gpu_pool.worker.engine.loading import LoadedModel, load_model
from gpu_pool.worker.engine.loglikelihood import score

MAX_ERROR_CHARACTERS = 500


class ContentChanged(Exception):
    """The model's files are no longer those that were asked for."""


def run_worker(connection: Connection, start: WorkerStart) -> int:
    """Serve until the control pipe says otherwise; returns an exit status only when the model cannot be served."""
    control = Control(connection)
    queue = ChunkQueue(lambda job_id: control.send(Dropped(job_id=job_id)))
    control.watch(queue)
    torch.set_num_threads(start.threads)
    try:
        loaded = load_model(start.spec, allow_remote_code=start.allow_remote_code)
        _check_content(start.spec, Path(start.data_dir))
        listen(start.socket_path, queue, _welcome(start.worker_id, loaded))
    except Exception as error:
        traceback.print_exc()
        reason = f"{start.spec.args.pretrained} cannot be served: {_in_short(error)}"
        control.send(LoadFailed(error=reason, content_changed=isinstance(error, ContentChanged)))
        return 1
    control.send(WorkerReady(memory_bytes=loaded.memory_bytes(), description=loaded.describe()))
    while True:
        _step(loaded, queue)


def _check_content(spec: ModelSpec, data_dir: Path) -> None:
    """After loading: whatever was written before or meanwhile shows in the fingerprint."""
    if spec.fingerprint.startswith("hub:"):  # a commit of the hub does not change
        return
    if fingerprint_model(spec.args, data_dir / "fingerprints.json") != spec.fingerprint:
        raise ContentChanged("its files have changed since it was asked for")


def _welcome(worker_id: str, loaded: LoadedModel) -> Welcome:
    return Welcome(
        worker_id=worker_id,
        max_length=loaded.max_length,
        prefix_token_id=loaded.prefix_token_id,
        dtype=loaded.dtype,
        attn_implementation=loaded.attn_implementation,
    )


def _step(loaded: LoadedModel, queue: ChunkQueue) -> None:
    """Compute one chunk and answer it, unless its evaluator has gone."""
    client, chunk = queue.take()
    try:
        answer = _answer(loaded, client, chunk)
    finally:
        queue.finish()
    if answer is not None and not client.gone:
        client.send(answer)


def _answer(loaded: LoadedModel, client: Client, chunk: Chunk) -> FromWorkerData | None:
    """The answer to one chunk, a failure included; None when it was dropped."""
    try:
        return _compute(loaded, client, chunk)
    except Cancelled:
        return None
    except torch.AcceleratorError:  # the CUDA context is lost: only a new process helps
        traceback.print_exc()
        end_process(1)
    except Exception as error:
        traceback.print_exc()
        return ChunkFailed(chunk_id=chunk.chunk_id, error=_in_short(error))


def _compute(loaded: LoadedModel, client: Client, chunk: Chunk) -> FromWorkerData:
    started = time.perf_counter()
    match chunk:
        case LoglikelihoodChunk(chunk_id=chunk_id):
            answers = score(loaded, chunk, lambda: client.gone)
            return LoglikelihoodDone(chunk_id=chunk_id, answers=answers, seconds=time.perf_counter() - started)
        case GenerationChunk(chunk_id=chunk_id):
            texts = generate(loaded, chunk, lambda: client.gone)
            return GenerationDone(chunk_id=chunk_id, texts=texts, seconds=time.perf_counter() - started)
        case _:
            assert_never(chunk)


def _in_short(error: Exception) -> str:
    """An exception as one line for the user: its type and the first paragraph of its message."""
    message = " ".join(str(error).strip().split("\n\n")[0].split())
    return f"{type(error).__name__}: {message}"[:MAX_ERROR_CHARACTERS]
