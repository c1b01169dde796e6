"""Real workers whose model is sharded over two processes, joined by gloo on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chunks import generating, scoring
from worker_process import ENDLESS, SCORE, WorkerProcess, worker_start

from gpu_pool.chunk_messages import ChunkFailed, LoglikelihoodDone
from gpu_pool.messages import Alive, DropJob, Dropped, LoadFailed, Ping, Shutdown, WorkerReady, WorkerStart
from gpu_pool.process_table import is_stopped
from gpu_pool.worker.chunk_queue import Chunk
from gpu_pool.worker.computing import compute
from gpu_pool.worker.engine.loading import load_model

SCORES = scoring(
    [
        (tuple(range(start, start + length)), (start + 2, start + 5, 9)[: 1 + length % 3])
        for start, length in ((5, 3), (40, 30), (5, 3), (5, 12), (90, 21), (91, 40), (200, 1))
    ]
)
PROMPTS = tuple(tuple(range(start, start + length)) for start, length in ((5, 3), (40, 30), (90, 11), (7, 1)))
GREEDY = generating(PROMPTS, 2, max_gen_toks=30)
SAMPLED = generating(PROMPTS, 3, max_gen_toks=30, do_sample=True, kwargs={"temperature": 0.8}, seeds=(1, 2, 3, 4))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, checkpoint: Any) -> Iterator[WorkerProcess]:
    """A Llama over two ranks, for tests that leave it idle."""
    process = WorkerProcess(worker_start(tmp_path_factory.mktemp("worker"), checkpoint("llama"), tensor_parallel=2))
    assert isinstance(process.receive(), WorkerReady)
    yield process
    process.close()


def answered(process: WorkerProcess, chunk: Chunk) -> Any:
    evaluator = process.connect()
    evaluator.send(chunk)
    return evaluator.receive()


def alone(process: WorkerProcess, chunk: Chunk) -> Any:
    """What this process answers by itself."""
    loaded = load_model(process.start.spec, allow_remote_code=False)
    [answer] = compute(loaded, chunk, lambda: False, lambda: None)
    return answer


def test_log_likelihoods_equal_those_of_one_process(sharded):
    theirs, ours = answered(sharded, SCORES).answers, alone(sharded, SCORES).answers
    assert [value for value, _ in theirs] == pytest.approx([value for value, _ in ours], rel=1e-5)
    assert [greedy for _, greedy in theirs] == [greedy for _, greedy in ours]


@pytest.mark.parametrize("chunk", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_texts_equal_those_of_one_process(chunk, sharded):
    assert answered(sharded, chunk).texts == alone(sharded, chunk).texts


def test_a_model_with_windows_and_tied_embeddings(checkpoint, tmp_path, spawn_worker):
    process = spawn_worker(worker_start(tmp_path, checkpoint("gemma2"), tensor_parallel=2))
    ready = process.receive()
    assert "sharded over 2 ranks; tree route" in ready.description
    theirs, ours = answered(process, SCORES).answers, alone(process, SCORES).answers
    assert [value for value, _ in theirs] == pytest.approx([value for value, _ in ours], rel=1e-5)
    assert answered(process, GREEDY).texts == alone(process, GREEDY).texts


def test_a_chunk_that_fails_alike_on_every_rank_leaves_them_alive(sharded):
    evaluator = sharded.connect()
    evaluator.send(scoring([((100_000,), (1,))], 3))
    evaluator.send(SCORE)
    assert evaluator.receive().error.startswith("ValueError")
    assert isinstance(evaluator.receive(), LoglikelihoodDone)


def test_a_dropped_job_frees_all_ranks_in_mid_generation(sharded):
    dropped, other = sharded.connect("a"), sharded.connect("b")
    dropped.send(SCORE)
    dropped.send(ENDLESS)
    assert isinstance(dropped.receive(), LoglikelihoodDone)
    sharded.tell(DropJob(job_id="a"))
    assert sharded.receive() == Dropped(job_id="a")
    assert dropped.is_closed()
    other.send(SCORE)
    assert isinstance(other.receive(), LoglikelihoodDone)


@pytest.mark.parametrize("how", ["told to", "killed"])
def test_ranks_end_with_their_worker_in_the_middle_of_a_chunk(how, checkpoint, tmp_path, spawn_worker):
    process = spawn_worker(worker_start(tmp_path, checkpoint("llama"), tensor_parallel=2))
    assert isinstance(process.receive(), WorkerReady)
    ranks = process.ranks()
    assert [os.getpgid(rank.pid) for rank in ranks] == [process.process.pid]
    evaluator = process.connect()
    evaluator.send(SCORE)
    evaluator.send(ENDLESS)
    assert isinstance(evaluator.receive(), LoglikelihoodDone)
    if how == "killed":
        process.process.kill()
    else:
        process.tell(Shutdown())
    assert all(rank.has_ended() for rank in ranks)
    assert process.exit_code() == (-9 if how == "killed" else 0)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_worker_ends_with_any_of_its_ranks(busy, checkpoint, tmp_path, spawn_worker):
    process = spawn_worker(worker_start(tmp_path, checkpoint("llama"), tensor_parallel=2))
    assert isinstance(process.receive(), WorkerReady)
    evaluator = process.connect()
    evaluator.send(SCORE)
    if busy:
        evaluator.send(ENDLESS)
    assert isinstance(evaluator.receive(), LoglikelihoodDone)
    process.ranks()[0].kill()
    assert process.exit_code() == 1
    assert evaluator.is_closed()
    log = Path(process.start.log_path).read_text()
    assert "rank 1 ended: killed by SIGKILL" in log or (busy and "a rank is gone" in log)


REMOTE_MODULE = """
import os, signal, torch
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        if os.environ["LOCAL_RANK"] == "1":
            {trouble}
"""


def worker_with_trouble(trouble: str, checkpoint: Any, tmp_path: Path) -> WorkerStart:
    """A worker whose other rank runs the code `trouble` while it loads."""
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    (folder / "own.py").write_text(REMOTE_MODULE.format(trouble=trouble))
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    return worker_start(tmp_path, folder, trust_remote_code=True, tensor_parallel=2)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("raise ValueError('no room for it')", "ValueError: no room for it"),
        ("raise torch.OutOfMemoryError('out of memory')", "OutOfMemoryError: out of memory"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1 ended: killed by SIGKILL"),
    ],
    ids=["raises", "has no memory", "killed"],
)
def test_a_rank_that_cannot_load_is_reported(trouble, reason, checkpoint, tmp_path, spawn_worker):
    process = spawn_worker(worker_with_trouble(trouble, checkpoint, tmp_path))
    folder = process.start.spec.args.pretrained
    error = f"{folder} cannot be served: {reason}"
    failed = process.receive()
    assert isinstance(failed, LoadFailed)
    assert (failed.error, failed.out_of_memory) == (error, "out of memory" in reason)
    assert process.exit_code() == 1


def test_a_worker_with_a_rank_that_is_stopped_while_it_loads_does_not_say_that_it_lives(
    checkpoint, tmp_path, spawn_worker
):
    said = tmp_path / "said"
    os.mkfifo(said)
    trouble = f"open({str(said)!r}, 'w').write('now'); os.kill(os.getpid(), signal.SIGSTOP)"
    process = spawn_worker(worker_with_trouble(trouble, checkpoint, tmp_path))
    assert said.read_text() == "now"
    while not is_stopped(process.process.pid):
        pass
    process.tell(Ping())
    process.tell(DropJob(job_id="job"))
    assert process.receive() == Dropped(job_id="job")
    os.killpg(process.process.pid, signal.SIGCONT)
    assert isinstance(process.receive(), WorkerReady)
    process.tell(Ping())
    assert process.receive() == Alive()


@pytest.mark.parametrize(
    ("model_type", "ranks", "reason"),
    [
        ("gpt2", 2, "transformers has no tensor-parallel plan for gpt2 models"),
        ("llama", 3, "its num_attention_heads (4) cannot be divided by 3"),
    ],
)
def test_a_model_that_cannot_be_sharded_is_refused_on_the_cpu(
    model_type, ranks, reason, checkpoint, tmp_path, spawn_worker
):
    process = spawn_worker(worker_start(tmp_path, checkpoint(model_type), tensor_parallel=ranks))
    failed = process.receive()
    assert isinstance(failed, LoadFailed)
    assert failed.error.endswith(f"it cannot be sharded over {ranks} processes: {reason}")
    assert process.exit_code() == 1


def test_weights_overwritten_in_place_do_not_reach_a_sharded_model(checkpoint, tmp_path, spawn_worker):
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    process = spawn_worker(worker_start(tmp_path, folder, tensor_parallel=2))
    assert isinstance(process.receive(), WorkerReady)
    before = answered(process, SCORE)
    (folder / "model.safetensors").write_bytes(b"")
    assert not isinstance(after := answered(process, SCORE), ChunkFailed)
    assert after.answers == before.answers
