from __future__ import annotations

import multiprocessing
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import fake_children
import pytest

from gpu_pool.cache import ResponseCache, answer_key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "responses.sqlite"


@pytest.fixture
def cache(path: Path) -> Iterator[ResponseCache]:
    with closing(ResponseCache(path)) as cache:
        yield cache


def test_round_trip(cache: ResponseCache) -> None:
    answers = {b"a": (-1.25, True), b"b": "text", b"c": (float("-inf"), False)}
    cache.store(answers)
    cache.store({b"a": (0.0, False)})  # the first answer stays
    assert cache.lookup([b"a", b"b", b"c", b"d"]) == answers


def test_many_keys(cache: ResponseCache) -> None:
    answers = {answer_key(b"", i.to_bytes(4, "big")): (-float(i), False) for i in range(2500)}
    cache.store(answers)
    assert cache.lookup(list(answers)) == answers


def test_keys_tell_parts_apart() -> None:
    assert answer_key(b"s", b"ab", b"c") != answer_key(b"s", b"a", b"bc")
    assert answer_key(b"s", b"a") != answer_key(b"t", b"a")


def test_two_processes_write_at_once(cache: ResponseCache, path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=fake_children.write_answers, args=(path, name, 200)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(cache.lookup([f"{name}{i}".encode() for name in ("a", "b", "shared") for i in range(200)])) == 600


def test_a_corrupt_file_is_moved_aside(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database, not at all" * 100)
    with closing(ResponseCache(path)) as cache:
        assert cache.lookup([b"a"]) == {}
        cache.store({b"a": "text"})
        assert cache.lookup([b"a"]) == {b"a": "text"}
    assert "moved to" in caplog.text
    assert len(list(path.parent.glob("*.corrupt-*"))) == 1


def test_pages_overwritten_under_an_open_cache(cache: ResponseCache, path: Path) -> None:
    cache.store({b"%d" % i: "x" * 1000 for i in range(100)})
    cache.close()
    damaged = bytearray(path.read_bytes())
    damaged[4096:] = b"\xff" * (len(damaged) - 4096)
    path.write_bytes(damaged)
    assert cache.lookup([b"5"]) == {}
    cache.store({b"5": "new"})
    assert cache.lookup([b"5"]) == {b"5": "new"}


def test_unreadable_entries_are_forgotten(cache: ResponseCache, path: Path) -> None:
    cache.store({b"a": "text"})
    cache.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE responses SET answer = x'c1'")
    assert cache.lookup([b"a"]) == {}
    cache.store({b"a": "again"})
    assert cache.lookup([b"a"]) == {b"a": "again"}


def test_a_folder_that_cannot_be_written_costs_the_cache_not_the_job(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with closing(ResponseCache(tmp_path / "cache" / "responses.sqlite")) as cache:
        cache.store({b"a": "text"})
        assert cache.lookup([b"a"]) == {}
