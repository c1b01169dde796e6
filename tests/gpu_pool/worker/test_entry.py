"""Real worker processes: spawned as the server does it, driven over their control pipe and data socket."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import pytest
from chunks import generating, scoring
from worker_process import ENDLESS, SCORE, Process, WorkerProcess, received, worker_start

from gpu_pool.chunk_messages import ChunkFailed, GenerationDone, LoglikelihoodDone, Welcome, decode_from_worker_data
from gpu_pool.fingerprint import fingerprint_model, memo_path
from gpu_pool.messages import DropJob, Dropped, LoadFailed, Shutdown, WorkerReady, encode
from gpu_pool.records import ModelArgs, ModelSpec

MANY = 1000


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, checkpoint: Any) -> Iterator[WorkerProcess]:
    """A worker that most tests share: each must leave it idle, as jobs do."""
    process = WorkerProcess(worker_start(tmp_path_factory.mktemp("worker"), checkpoint("llama")))
    assert isinstance(process.receive(), WorkerReady)
    yield process
    process.close()


def test_welcome_says_what_evaluators_need(worker):
    welcome = worker.connect().welcome
    assert welcome == Welcome(
        worker_id="w1",
        max_length=256,
        prefix_token_id=1,
        dtype="float32",
        attn_implementation="sdpa",
        route="tree",
        route_reason=welcome.route_reason,
    )
    assert welcome.route_reason.startswith("self-check: logits differ by")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mpt", "MptForCausalLM does not call transformers' attention interface"),
        ("llama4_text", "it has layers of other kinds: chunked_attention"),
        ("t5", "T5ForConditionalGeneration does not call transformers' attention interface"),
    ],
)
def test_welcome_says_why_a_model_is_computed_plainly(name, reason, checkpoint, tmp_path, spawn_worker):
    process = spawn_worker(worker_start(tmp_path, checkpoint(name)))
    ready = process.receive()
    welcome = process.connect().welcome
    assert (welcome.route, welcome.route_reason) == ("plain", reason)
    assert ready.description.endswith(f"float32, {welcome.attn_implementation} attention; plain route: {reason}")
    assert f"engine: plain route: {reason}\n" in Path(process.start.log_path).read_text()


def test_answers_both_kinds_of_chunk(worker):
    evaluator = worker.connect()
    evaluator.send(SCORE)
    evaluator.send(generating([(5, 6)], 7, max_gen_toks=4))
    scored, generated = evaluator.receive(), evaluator.receive()
    assert isinstance(scored, LoglikelihoodDone)
    assert len(scored.answers) == 2
    assert scored.seconds > 0
    assert isinstance(generated, GenerationDone)
    assert len(generated.texts) == 1


def test_the_bits_of_deterministic_answers_do_not_depend_on_a_workers_threads(tiny_model, tmp_path, spawn_worker):
    """Of matrix products with few rows, which threads deal out among themselves."""
    requests = [([3 + length] * length, [5 + choice]) for length in range(4, 13) for choice in range(20)]
    found = []
    for threads in (1, 2):
        folder = tmp_path / str(threads)
        folder.mkdir()
        process = spawn_worker(worker_start(folder, tiny_model, threads=threads))
        assert isinstance(process.receive(), WorkerReady)
        evaluator = process.connect()
        evaluator.send(scoring(requests, deterministic=True))
        found.append(evaluator.receive().answers)
    assert found[0] == found[1]


def test_evaluators_take_turns(worker):
    first, second = worker.connect("a"), worker.connect("b")
    for chunk_id in range(MANY):  # minutes of work
        first.send(generating([(5, 6)] * 10, chunk_id, max_gen_toks=30, batch_size=1))
    second.send(SCORE)
    assert isinstance(second.receive(), LoglikelihoodDone)
    answered = 0
    while first.connection.poll():
        answered += isinstance(decode_from_worker_data(first.connection.recv_bytes()), GenerationDone)
    assert answered < MANY
    first.connection.close()


def test_failing_chunk_leaves_the_worker_alive(worker):
    evaluator = worker.connect()
    evaluator.send(scoring([((100_000,), (1,))], 3))
    evaluator.send(SCORE)
    failed = evaluator.receive()
    assert isinstance(failed, ChunkFailed)
    assert (failed.chunk_id, failed.error.split(":")[0]) == (3, "ValueError")
    assert isinstance(evaluator.receive(), LoglikelihoodDone)


@pytest.mark.parametrize(
    "nonsense",
    [
        struct.pack("!i", 2**30),  # more than any message
        struct.pack("!i", -1),
        struct.pack("!i", 4) + b"\xff\xff\xff\xff",  # not msgpack
        struct.pack("!i", 1) + b"\x01",  # msgpack, but no message
    ],
)
def test_nonsense_closes_only_its_connection(nonsense, worker):
    evaluator, other = worker.connect(), worker.connect()
    os.write(evaluator.connection.fileno(), nonsense)
    assert evaluator.is_closed()
    other.send(SCORE)
    assert isinstance(other.receive(), LoglikelihoodDone)


def test_chunk_before_hello_closes_the_connection(worker):
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(worker.start.socket_path)
    with Connection(connected.detach()) as connection:
        connection.send_bytes(encode(SCORE))
        with pytest.raises((EOFError, ConnectionResetError)):
            received(connection, decode_from_worker_data)


def test_closed_connection_frees_the_worker_in_mid_generation(worker):
    leaving, other = worker.connect("a"), worker.connect("b")
    leaving.send(SCORE)
    leaving.send(ENDLESS)
    assert isinstance(leaving.receive(), LoglikelihoodDone)
    leaving.connection.close()
    other.send(SCORE)
    assert isinstance(other.receive(), LoglikelihoodDone)


def test_dropped_job_frees_the_worker_in_mid_generation(worker):
    dropped, other = worker.connect("a"), worker.connect("b")
    dropped.send(SCORE)
    dropped.send(ENDLESS)
    assert isinstance(dropped.receive(), LoglikelihoodDone)
    worker.tell(DropJob(job_id="a"))
    assert worker.receive() == Dropped(job_id="a")
    assert dropped.is_closed()
    other.send(SCORE)
    assert isinstance(other.receive(), LoglikelihoodDone)


def test_dropping_an_unknown_job_is_answered(worker):
    worker.tell(DropJob(job_id="nobody"))
    assert worker.receive() == Dropped(job_id="nobody")


def test_shutdown_ends_it_in_the_middle_of_a_step(checkpoint, tmp_path, spawn_worker):
    process = spawn_worker(worker_start(tmp_path, checkpoint("llama")))
    ready = process.receive()
    assert ready.memory_bytes > 0
    assert ready.description.startswith("LlamaForCausalLM")
    evaluator = process.connect()
    evaluator.send(SCORE)
    evaluator.send(ENDLESS)
    evaluator.receive()
    process.tell(Shutdown())
    assert process.exit_code() == 0


def test_missing_model_is_reported(checkpoint, tmp_path, spawn_worker):
    process = spawn_worker(worker_start(tmp_path, tmp_path / "nothing", fingerprint="0" * 64))
    failed = process.receive()
    assert isinstance(failed, LoadFailed)
    assert failed.content_changed
    assert failed.error == f"{tmp_path / 'nothing'} cannot be served: FileNotFoundError: it is not there any more"
    assert process.exit_code() == 1


def test_a_worker_that_does_not_find_its_gpu_says_so(checkpoint, tmp_path, spawn_worker):
    start = worker_start(tmp_path, checkpoint("llama"))
    process = spawn_worker(msgspec.structs.replace(start, spec=msgspec.structs.replace(start.spec, device="cuda")))
    assert "is to run on a GPU, but CUDA shows none" in process.receive().error
    assert process.exit_code() == 1


def test_weights_overwritten_before_loading_are_noticed(checkpoint, tmp_path, spawn_worker):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    start = worker_start(tmp_path, folder)
    shutil.copy(checkpoint("llama", seed=1) / "model.safetensors", folder)
    process = spawn_worker(start)
    failed = process.receive()
    assert isinstance(failed, LoadFailed)
    assert failed.content_changed
    assert process.exit_code() == 1


def test_weights_that_are_half_written_when_they_are_loaded_deserve_another_look(checkpoint, tmp_path, spawn_worker):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    start = worker_start(tmp_path, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    process = spawn_worker(start)
    failed = process.receive()
    assert isinstance(failed, LoadFailed)
    assert "SafetensorError" in failed.error
    assert failed.content_changed
    assert process.exit_code() == 1


def test_a_local_tokenizer_of_a_hub_model_that_is_overwritten_is_noticed(
    checkpoint, tmp_path, spawn_worker, monkeypatch
):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    commit = "a" * 40
    shutil.copytree(checkpoint("llama"), tmp_path / "models--org--name" / "snapshots" / commit)
    tokenizer = shutil.copytree(checkpoint("llama"), tmp_path / "tokenizer")
    args = ModelArgs(pretrained="org/name", revision=commit, tokenizer=str(tokenizer))
    spec = ModelSpec(kind="hf", args=args, fingerprint=fingerprint_model(args, memo_path(tmp_path)))
    start = msgspec.structs.replace(worker_start(tmp_path, tokenizer), spec=spec)
    config = tokenizer / "tokenizer_config.json"
    config.write_text(config.read_text() + " ")
    failed = spawn_worker(start).receive()
    assert isinstance(failed, LoadFailed)
    assert failed.content_changed


PARENT = """
import multiprocessing, os, sys, msgspec
from gpu_pool.messages import WorkerStart
from gpu_pool.worker.entry import worker_main

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=True)
    start = msgspec.json.decode(sys.argv[1], type=WorkerStart)
    process = context.Process(target=worker_main, args=(theirs, start, os.getpid()))
    process.start()
    ours.recv_bytes()
    print(process.pid, flush=True)
    process.join()
"""


def test_dies_with_its_parent(checkpoint, tmp_path):
    import msgspec

    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    start = msgspec.json.encode(worker_start(tmp_path, checkpoint("llama"))).decode()
    root = Path(__file__).parents[3]
    parent = subprocess.Popen(
        [sys.executable, script, start], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)}
    )
    with parent:
        assert parent.stdout is not None
        worker = Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
    assert worker.has_ended()


def test_spawn_target_imports_nothing_heavy():
    program = "import sys, gpu_pool.worker.entry; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
