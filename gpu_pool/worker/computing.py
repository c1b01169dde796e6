"""Chunks through the engine: what it answers, and what goes wrong, in the words of the data channel."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn, assert_never

import torch

from gpu_pool.chunk_messages import (
    GenerationChunk,
    GenerationDone,
    LoglikelihoodChunk,
    LoglikelihoodDone,
    MediaLoglikelihoodChunk,
)
from gpu_pool.worker.chunk_queue import Chunk
from gpu_pool.worker.control import end_process
from gpu_pool.worker.engine import multimodal_generation, multimodal_scoring
from gpu_pool.worker.engine.cpu_layers import layers_for
from gpu_pool.worker.engine.generation import generate_chunks
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.loglikelihood import score_chunk
from gpu_pool.worker.engine.media_chunks import MediaChunk

Answer = LoglikelihoodDone | GenerationDone
MAX_ERROR_CHARACTERS = 500


def compute(
    loaded: LoadedModel,
    chunk: Chunk,
    should_stop: Callable[[], bool],
    take_alike: Callable[[], GenerationChunk | None],
    lost: Callable[[str], NoReturn] = lambda _: end_process(1),
) -> Iterator[Answer]:
    """The answers to `chunk` and to those that join it, as they come.

    `take_alike` is asked for further chunks while prompts are continued. `lost(why)` is called when the device will
    answer nothing any more.

    Raises:
        Cancelled: `should_stop` said so.
        ValueError, …: whatever the engine says of a chunk that it cannot compute.
    """
    started = time.perf_counter()
    try:
        with loaded.limits.learning():
            match chunk:
                case LoglikelihoodChunk(chunk_id=chunk_id):
                    answers, plainly = score_chunk(loaded, chunk, should_stop)
                    seconds = time.perf_counter() - started
                    yield LoglikelihoodDone(chunk_id=chunk_id, answers=answers, seconds=seconds, plainly=plainly)
                case GenerationChunk():
                    ended = generate_chunks(loaded, chunk, should_stop, take_alike)
                    for count, (chunk_id, texts, plainly) in enumerate(ended, start=1):
                        seconds = (time.perf_counter() - started) / count
                        yield GenerationDone(chunk_id=chunk_id, texts=texts, seconds=seconds, plainly=plainly)
                case MediaChunk():
                    with layers_for(deterministic=chunk.asked.deterministic):
                        yield _answer_media(loaded, chunk, should_stop, started)
                case _:
                    assert_never(chunk)
    except RuntimeError as error:
        if is_device_lost(error, loaded.device):
            traceback.print_exc()
            lost(in_short(error))
        raise


def _answer_media(loaded: LoadedModel, chunk: MediaChunk, should_stop: Callable[[], bool], started: float) -> Answer:
    if isinstance(chunk.asked, MediaLoglikelihoodChunk):
        answers, errors = multimodal_scoring.score(loaded, chunk, should_stop)
        found = tuple(map(answers.get, range(len(chunk.asked.prompt_of))))
        seconds = time.perf_counter() - started
        return LoglikelihoodDone(chunk_id=chunk.chunk_id, answers=found, seconds=seconds, errors=_shortened(errors))
    texts, errors = multimodal_generation.generate(loaded, chunk, should_stop)
    found = tuple(map(texts.get, range(len(chunk.inputs))))
    seconds = time.perf_counter() - started
    return GenerationDone(chunk_id=chunk.chunk_id, texts=found, seconds=seconds, errors=_shortened(errors))


def _shortened(errors: dict[int, str]) -> dict[int, str]:
    return {place: " ".join(error.split())[:MAX_ERROR_CHARACTERS] for place, error in errors.items()}


def is_device_lost(error: RuntimeError, device: torch.device) -> bool:
    """Whether only a new process helps: the CUDA context does not survive an assertion or illegal access in a kernel.

    Libraries on top of CUDA raise errors of their own for it, so the device itself is asked.
    """
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def in_short(error: Exception) -> str:
    """An exception as one line for the user: its type and the first paragraph of its message."""
    message = " ".join(str(error).strip().split("\n\n")[0].split())
    return f"{type(error).__name__}: {message}"[:MAX_ERROR_CHARACTERS]
