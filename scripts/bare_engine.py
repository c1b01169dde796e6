"""What a job's requests take without a service: `python bare_engine.py REQUEST_FILE RESULT_FILE` (see bench_pool).

A job is prepared as an evaluator does it, with a worker that only writes down what it is asked. Then the engine
computes just that in this process, each kind of request in one chunk.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

os.environ.update(DISABLE_MULTIPROC="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

from gpu_pool import chunk_messages as data
from gpu_pool import messages as msg
from gpu_pool.evaluator.catalogue import TaskLibrary
from gpu_pool.evaluator.harness_lm_eval import memoise_templates
from gpu_pool.evaluator.job import JobRun, Workshop
from gpu_pool.fingerprint import fingerprint_model, memo_path
from gpu_pool.records import Evaluation, ModelArgs, ModelSpec
from gpu_pool.token_sequences import TokenSequences
from gpu_pool.worker.engine.generation import generate
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.loading import load_model
from gpu_pool.worker.engine.loglikelihood import score
from server.settings import load_settings

Json = dict[str, Any]
Chunk = data.LoglikelihoodChunk | data.GenerationChunk


def main(request: Json, folder: Path) -> Json:
    """What `compute` returns for each of request["jobs"], which are fields of POST /evaluate by name.

    The first is computed twice, so that what happens only once does not count.
    """
    args = ModelArgs(pretrained=request["model"], dtype=request["dtype"])
    fingerprint = fingerprint_model(args, memo_path(folder))
    spec = ModelSpec(kind="hf", args=args, fingerprint=fingerprint, device=request["device"])
    roots = load_settings({}, Path(request["config"]), {}).pool.dataset_roots
    memoise_templates()
    workshop = Workshop(TaskLibrary(folder, (), roots, False), folder, allow_code=False)
    asked = {name: requests_of(job, spec, workshop, folder / name) for name, job in request["jobs"].items()}
    loaded = load_model(spec, allow_remote_code=False)
    compute(loaded, next(iter(asked.values())))
    return {name: compute(loaded, chunks) for name, chunks in asked.items()}


def requests_of(job: Json, spec: ModelSpec, workshop: Workshop, folder: Path) -> list[Chunk]:
    """What a job asks its worker: a chunk for all log-likelihoods, one for each kind of generation."""
    folder.mkdir()
    evaluation = Evaluation(model=spec.args.pretrained, use_cache=False, bootstrap_iters=0, **job)
    start = msg.RunJob(
        job_id=folder.name, evaluation=evaluation, model=spec, output_dir=str(folder), log_path=os.devnull
    )
    run = JobRun(start, lambda message: None, workshop)
    chunks: list[Chunk] = []
    address = str(folder / "worker")
    with Listener(address) as listener:
        threading.Thread(target=write_down, args=(listener, chunks), daemon=True).start()
        run.dispatcher.attach("worker", address)
        run.execute()
    return together(chunks)


def write_down(listener: Listener, chunks: list[Chunk]) -> None:
    """A worker that answers at once, and wrongly."""
    connection: Connection[Any, Any] = listener.accept()
    with connection, suppress(EOFError):
        connection.recv_bytes()
        connection.send_bytes(msg.encode(WELCOME))
        while True:
            chunk = data.decode_to_worker_data(connection.recv_bytes())
            chunks.append(chunk)
            connection.send_bytes(msg.encode(dummy_answer(chunk)))


WELCOME = data.Welcome(
    worker_id="worker", max_length=0, prefix_token_id=0, dtype="", attn_implementation="", route="", route_reason=""
)


def dummy_answer(chunk: Chunk) -> msg.Message:
    if isinstance(chunk, data.LoglikelihoodChunk):
        answers = ((-1.0, False),) * len(chunk.sequences)
        return data.LoglikelihoodDone(chunk_id=chunk.chunk_id, answers=answers, seconds=1.0)
    return data.GenerationDone(chunk_id=chunk.chunk_id, texts=("",) * len(chunk.prompts), seconds=1.0)


def together(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The same requests in as few chunks as can be, in the same order."""
    scoring = [chunk for chunk in chunks if isinstance(chunk, data.LoglikelihoodChunk)]
    merged: list[Chunk] = []
    if scoring:
        sequences = TokenSequences.pack(ids for chunk in scoring for ids in chunk.sequences.unpack())
        scored = tuple(count for chunk in scoring for count in chunk.scored)
        merged.append(data.LoglikelihoodChunk(chunk_id=0, sequences=sequences, scored=scored))
    generating = [chunk for chunk in chunks if isinstance(chunk, data.GenerationChunk)]
    kinds: list[data.GenerationOptions] = []
    for chunk in generating:
        if chunk.options not in kinds:
            kinds.append(chunk.options)
    for options in kinds:
        some = [chunk for chunk in generating if chunk.options == options]
        prompts = TokenSequences.pack(ids for chunk in some for ids in chunk.prompts.unpack())
        seeds = tuple(seed for chunk in some for seed in chunk.seeds)
        merged.append(data.GenerationChunk(chunk_id=len(merged), prompts=prompts, options=options, seeds=seeds))
    return merged


def compute(loaded: LoadedModel, chunks: Sequence[Chunk]) -> Json:
    """Requests, their tokens, how many of these are distinct nodes of the token trie, and what the engine needs."""
    sequences = [ids for chunk in chunks for ids in sequences_of(chunk).unpack()]
    started, cpu = time.perf_counter(), time.process_time()
    for chunk in chunks:
        if isinstance(chunk, data.LoglikelihoodChunk):
            score(loaded, chunk, lambda: False)
        else:
            generate(loaded, chunk, lambda: False)
    return {
        "requests": len(sequences),
        "tokens": sum(map(len, sequences)),
        "distinct_tokens": sum(TokenSequences.pack(sorted(sequences)).added),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
    }


def sequences_of(chunk: Chunk) -> TokenSequences:
    return chunk.sequences if isinstance(chunk, data.LoglikelihoodChunk) else chunk.prompts


if __name__ == "__main__":
    request_file, result_file = map(Path, sys.argv[1:])
    answer = main(json.loads(request_file.read_text()), result_file.parent)
    result_file.write_text(json.dumps(answer))
