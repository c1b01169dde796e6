"""Spawn targets for tests: small real processes, most of which misbehave on purpose."""

from __future__ import annotations

import os
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

from gpu_pool.cache import ResponseCache
from gpu_pool.child import enter_child
from gpu_pool.evaluator.loop import EvaluatorLoop
from gpu_pool.messages import (
    Alive,
    DropJob,
    Dropped,
    EvaluatorStart,
    JobProgress,
    Ping,
    TaskDone,
    decode_to_evaluator,
    decode_to_worker,
    encode,
)
from gpu_pool.records import Progress, TaskProgress
from gpu_pool.worker.control import Control
from gpu_pool.worker.merging.entry import obey


def echo(connection: Connection, folder: str, parent_pid: int) -> None:
    """Answer every DropJob; end at Shutdown."""
    enter_child(parent_pid, Path(folder) / "child.log")
    print("started", flush=True)
    os.system("echo from below python")
    while isinstance(message := decode_to_worker(connection.recv_bytes()), DropJob):
        connection.send_bytes(encode(Dropped(job_id=message.job_id)))


def last_words(connection: Connection, folder: str, parent_pid: int) -> None:
    """Say something and die at once."""
    enter_child(parent_pid, Path(folder) / "child.log")
    connection.send_bytes(encode(Dropped(job_id="last words")))
    os.kill(os.getpid(), signal.SIGSEGV)


def deaf(connection: Connection, folder: str, parent_pid: int) -> None:
    """Never read the pipe."""
    enter_child(parent_pid, Path(folder) / "child.log")
    connection.send_bytes(encode(Dropped(job_id="ready")))
    signal.pause()


def half_a_frame(connection: Connection, folder: str, parent_pid: int) -> None:
    """Announce more than is sent, and hang."""
    enter_child(parent_pid, Path(folder) / "child.log")
    os.write(connection.fileno(), struct.pack("!i", 1000) + b"not all of it")
    signal.pause()


def nonsense(connection: Connection, folder: str, parent_pid: int) -> None:
    """Send a frame that is no message."""
    enter_child(parent_pid, Path(folder) / "child.log")
    connection.send_bytes(b"\xc1")
    signal.pause()


def oversize(connection: Connection, folder: str, parent_pid: int) -> None:
    """Announce a frame larger than any message."""
    enter_child(parent_pid, Path(folder) / "child.log")
    os.write(connection.fileno(), struct.pack("!i", 2**31 - 1))
    signal.pause()


def with_grandchild(connection: Connection, folder: str, parent_pid: int) -> None:
    """Fork a grandchild that holds the pipe open, report its pid, and die when told to."""
    enter_child(parent_pid, Path(folder) / "child.log")
    pid = os.fork()
    if pid == 0:
        while True:
            time.sleep(60)  # a grandchild that would live for ever
    connection.send_bytes(encode(Dropped(job_id=str(pid))))
    connection.recv_bytes()
    os._exit(3)


def with_an_escaped_grandchild(connection: Connection, folder: str, parent_pid: int) -> None:
    """Start what holds the pipe open and takes care not to be found; report its pid, and die."""
    enter_child(parent_pid, Path(folder) / "child.log")
    no_limit = ("prlimit", "--rttime=unlimited", "sleep", "1000")
    environment = {"PATH": os.environ["PATH"]}
    escaped = subprocess.Popen(no_limit, pass_fds=[connection.fileno()], start_new_session=True, env=environment)
    while "sleep" not in Path(f"/proc/{escaped.pid}/cmdline").read_text().partition("\0")[0]:
        time.sleep(0.01)
    connection.send_bytes(encode(Dropped(job_id=str(escaped.pid))))
    os._exit(3)


def with_scattered_offspring(connection: Connection, folder: str, parent_pid: int) -> None:
    """Start what would live for ever, in all the ways of getting away; report the pids, and die when told to."""
    enter_child(parent_pid, Path(folder) / "child.log")
    sleep = ("sleep", "1000")
    pids = [
        subprocess.Popen(sleep).pid,
        subprocess.Popen(sleep, process_group=0).pid,
        subprocess.Popen(sleep, process_group=0, env={"PATH": os.environ["PATH"]}).pid,
        subprocess.Popen(sleep, start_new_session=True).pid,
        subprocess.Popen(sleep, start_new_session=True, env={"PATH": os.environ["PATH"]}).pid,
    ]
    orphan = "import subprocess; print(subprocess.Popen(['sleep', '1000'], start_new_session=True, stdout=2).pid)"
    pids.append(int(subprocess.check_output([sys.executable, "-c", orphan])))
    pid = os.fork()
    if pid == 0:
        os.setsid()
        while True:
            time.sleep(60)
    connection.send_bytes(encode(Dropped(job_id=" ".join(map(str, [*pids, pid])))))
    connection.recv_bytes()
    os._exit(3)


def watched(connection: Connection, folder: str, parent_pid: int) -> None:
    """Answer whoever asks whether it lives, and compute all the while."""
    enter_child(parent_pid, Path(folder) / "child.log")
    obey(connection)
    while True:
        sum(range(1000))


def loads_for_ever(connection: Connection, folder: str, parent_pid: int) -> None:
    """A worker whose model takes its time, and which obeys meanwhile."""
    enter_child(parent_pid, Path(folder) / "child.log")
    control = Control(connection)
    control.watch()
    while True:
        sum(range(1000))


def breaks_at_its_first_job(connection: Connection, start: EvaluatorStart, parent_pid: int) -> None:
    """An evaluator that says it is ready, and meets what nobody thought of when it is given a job."""
    enter_child(parent_pid, start.log_path)
    loop = EvaluatorLoop(connection, start)
    loop.watch()

    def open_job(*_: object) -> None:
        raise LookupError("what nobody thought of")

    loop.serve(None, open_job)


def scores_tasks(connection: Connection, folder: str, parent_pid: int) -> None:
    """An evaluator that has scored two tasks of its job, and reports how often it has said since that it lives."""
    enter_child(parent_pid, Path(folder) / "child.log")
    for task, score in (("one", 0.25), ("two", 0.75)):
        connection.send_bytes(encode(TaskDone(job_id="j", task=task, metrics={"acc,none": score})))
    answers = 0
    while isinstance(decode_to_evaluator(connection.recv_bytes()), Ping):
        answers += 1
        connection.send_bytes(encode(Alive()))
        progress = Progress(tasks={"one": TaskProgress(done=answers, total=100)})
        connection.send_bytes(encode(JobProgress(job_id="j", progress=progress)))


def busy(connection: Connection, folder: str, parent_pid: int) -> None:
    """Compute without ever returning to the pipe."""
    enter_child(parent_pid, Path(folder) / "child.log")
    connection.send_bytes(encode(Dropped(job_id="ready")))
    while True:
        sum(range(1000))


def write_to_new_files(paths: Sequence[Path], name: str, start: Barrier) -> None:
    """Write one answer into each file, new as they are, at the same moment as the others at `start`."""
    for path in paths:
        start.wait()
        with closing(ResponseCache(path)) as cache:
            cache.store({name.encode(): name})


def write_answers(path: Path, name: str, count: int) -> None:
    """Write answers of its own and answers that others write too."""
    with closing(ResponseCache(path)) as cache:
        for i in range(count):
            cache.store({f"{name}{i}".encode(): (float(i), True), b"shared%d" % i: (float(i), False)})


def claim_and_die(path: Path, keys: Sequence[bytes]) -> None:
    """Claim these, as an evaluator that is killed in the middle of a chunk."""
    ResponseCache(path).reserve(keys)
    os.kill(os.getpid(), signal.SIGKILL)


def fill_small_disk(path: Path, most_bytes: int) -> None:
    """Write more than files may hold here, and go on asking."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with closing(ResponseCache(path)) as cache:
        for i in range(100):
            cache.store({b"%d" % i: "x" * 10_000})
        assert cache.reserve([b"new"]) == ({}, set())
        cache.lookup([b"0"])  # found or not, it goes on
