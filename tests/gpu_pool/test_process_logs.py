"""Logs of processes that have ended go, the oldest first; that of one that lives is cut while it writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpu_pool import process_logs
from gpu_pool.process_logs import tidy


def write_logs(folder: Path, *sizes: int) -> None:
    """Logs of worker-1, worker-2 and so on, each younger than the one before, of so many bytes."""
    folder.mkdir()
    for number, size in enumerate(sizes, 1):
        path = folder / f"worker-{number}.log"
        path.write_bytes(bytes(size))
        os.utime(path, (number, number))


def numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("worker-")) for path in folder.iterdir())


def test_the_oldest_logs_of_ended_processes_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_logs, "MOST_BYTES", 100)
    write_logs(tmp_path / "logs", 40, 40, 40, 40)
    tidy(tmp_path / "logs", {"worker-1"})
    assert numbers(tmp_path / "logs") == [1, 3, 4]
    tidy(tmp_path / "logs", ())
    assert numbers(tmp_path / "logs") == [3, 4]
    monkeypatch.setattr(process_logs, "MOST_FILES", 1)
    tidy(tmp_path / "logs", ())
    assert numbers(tmp_path / "logs") == [4]


def test_the_log_of_a_living_process_is_cut_while_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_logs, "LONGEST_BYTES", 100)
    write_logs(tmp_path / "logs", 0)
    log, before = tmp_path / "logs" / "worker-1.log", tmp_path / "logs" / "worker-1.log.1"
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)  # as its process has it
    for letter in (b"a", b"b"):
        os.write(descriptor, letter * 101)
        tidy(tmp_path / "logs", {"worker-1"})
        assert before.read_bytes() == letter * 101
        assert log.read_bytes() == b""
    os.write(descriptor, b"c")
    os.close(descriptor)
    tidy(tmp_path / "logs", {"worker-1"})
    assert (log.read_bytes(), before.read_bytes()) == (b"c", b"b" * 101)


def test_a_folder_that_is_not_there_yet_needs_nothing(tmp_path: Path) -> None:
    tidy(tmp_path / "logs", {"worker-1"})
    assert not (tmp_path / "logs").exists()
