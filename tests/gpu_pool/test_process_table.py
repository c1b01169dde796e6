"""Whose a process is, among real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpu_pool.process_table import ProcessTable, is_stopped

PARENT = """
import subprocess, sys
def child(**options):
    code = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, **options)
    return process, int(process.stdout.readline())
kept = [child(), child(process_group=0), child(start_new_session=True)]
print(*(pid for _, pid in kept), flush=True)
sys.stdin.read()
"""


@contextmanager
def worker() -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A session leader with three children: one in its group, one in another, one in a session of its own.

    All of them live until the pipe from this process ends, with or without their parent.
    """
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        yield process, [int(pid) for pid in process.stdout.readline().split()]


def test_what_a_worker_started_is_its_own_in_whatever_group_or_session() -> None:
    table = ProcessTable()
    with worker() as (process, children):
        leaders = {process.pid}
        assert [table.leader_of(pid, leaders) for pid in (process.pid, *children)] == [process.pid] * 4
        assert table.leader_of(os.getpid(), leaders) is None
        assert table.leader_of(1, leaders) is None
        assert table.leader_of(children[0], set()) is None


def test_an_orphan_is_still_in_its_worker_s_session() -> None:
    table = ProcessTable()
    with worker() as (process, children):
        _, group_leader, _ = children
        process.kill()
        process.wait()
        assert table.leader_of(group_leader, {process.pid}) == process.pid


def test_a_worker_is_stopped_when_any_process_of_its_session_is() -> None:
    with worker() as (process, children):
        assert not is_stopped(process.pid)
        for pid in (process.pid, children[0]):
            os.kill(pid, signal.SIGSTOP)
            wait_for_stop(pid)
            assert is_stopped(process.pid)
            os.kill(pid, signal.SIGCONT)
            while is_stopped(process.pid):
                pass
        os.kill(children[2], signal.SIGSTOP)  # the one in a session of its own
        wait_for_stop(children[2])
        assert not is_stopped(process.pid)
        os.kill(children[2], signal.SIGCONT)


def wait_for_stop(pid: int) -> None:
    while "(stopped)" not in Path(f"/proc/{pid}/status").read_text():
        pass


def test_which_numbers_exist_here() -> None:
    table = ProcessTable()
    assert table.exists(os.getpid())
    assert table.exists(1)
    assert not table.exists(2**22 + 1)
    assert not table.exists(2**40)
    assert table.leader_of(2**22 + 1, {os.getpid()}) is None


def test_a_container_can_be_told_of() -> None:
    assert ProcessTable(in_container=True).in_container
    assert not ProcessTable(in_container=False).in_container
