from __future__ import annotations

import multiprocessing
import resource
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import fake_children
import msgspec
import pytest

from gpu_pool import cache_file
from gpu_pool.cache import CachedModel, ResponseCache, answer_key
from gpu_pool.cache_upkeep import cache_use, prune

EMPTY_BYTES = 64 * 1024
"""More than the file of an empty cache has."""


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


def test_processes_that_open_a_new_file_at_once_wait_for_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    paths = [tmp_path / f"{i}.sqlite" for i in range(100)]
    names, start = "abcd", context.Barrier(4)
    writers = [context.Process(target=fake_children.write_to_new_files, args=(paths, name, start)) for name in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    for path in paths:
        with closing(ResponseCache(path)) as cache:
            assert cache.lookup([name.encode() for name in names]) == {name.encode(): name for name in names}


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


# ---------------------------------------------------------------- claims


def test_what_one_has_claimed_another_does_not_get(cache: ResponseCache, path: Path) -> None:
    cache.store({b"known": "text"})
    with closing(ResponseCache(path)) as other:
        assert cache.reserve([b"known", b"a", b"b"]) == ({b"known": "text"}, set())
        assert cache.reserve([b"a"]) == ({}, set())  # one's own claim is no obstacle
        assert other.reserve([b"a", b"c"]) == ({}, {b"a"})
        assert other.unclaimed([b"a", b"b", b"c", b"d"]) == {b"c", b"d"}
        cache.store({b"a": "answer"})
        cache.release([b"b", b"c"])  # c is the other one's
        assert other.reserve([b"a", b"b"]) == ({b"a": "answer"}, set())
        assert cache.reserve([b"b", b"c"]) == ({}, {b"b", b"c"})
        other.leave(CachedModel("f", "name"), 0)
        assert cache.reserve([b"b", b"c"]) == ({}, set())


def test_claims_of_a_dead_process_are_void(cache: ResponseCache, path: Path) -> None:
    cache.lookup([])  # open before
    process = multiprocessing.get_context("spawn").Process(
        target=fake_children.claim_and_die, args=(path, [b"a", b"b"])
    )
    process.start()
    process.join()
    assert process.exitcode == -9
    assert claims(path) == 2
    assert cache.unclaimed([b"a"]) == {b"a"}
    assert cache.reserve([b"a"]) == ({}, set())


def test_claims_of_a_dead_process_go_when_the_file_is_opened_next(cache: ResponseCache, path: Path) -> None:
    """Nobody may ever make those requests again."""
    assert cache.reserve([b"mine"]) == ({}, set())
    process = multiprocessing.get_context("spawn").Process(
        target=fake_children.claim_and_die, args=(path, [b"a", b"b"])
    )
    process.start()
    process.join()
    assert claims(path) == 3
    cache_use(path, 1 << 20)
    assert claims(path) == 1
    assert cache.unclaimed([b"a", b"b"]) == {b"a", b"b"}


@pytest.mark.parametrize("leaves", [False, True])
def test_answers_that_could_not_be_written_stay_those_of_their_model(
    cache: ResponseCache, path: Path, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    monkeypatch.setattr(cache_file, "PATIENCE_S", 0.05)
    one, other = CachedModel("1" * 8, "one"), CachedModel("2" * 8, "other")
    cache.store({b"a": "text"}, one)
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        cache.store({b"b": "text", b"c": "text"}, one)
        cache.leave(one, 0)
        holder.execute("ROLLBACK")
    cache.leave(other, 1) if leaves else cache.store({b"d": "text"}, other)
    used = {model.name: (model.entries, model.hits) for model in cache_use(path, 1 << 20).models}
    assert used == {"one": (3, 0), "other": (0, 1) if leaves else (1, 0)}


def claims(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT count(*) FROM claims").fetchone()[0]


# ---------------------------------------------------------------- size


def test_the_file_stays_within_its_bound_and_the_least_recently_used_goes(path: Path) -> None:
    limit = 2 * 1024**2
    with closing(ResponseCache(path, limit)) as cache:
        cache.store({b"kept": "x", b"old": "x"}, CachedModel("old", "old"))
        for i in range(40):
            cache.store({b"%d-%d" % (i, j): "x" * 1000 for j in range(100)}, CachedModel(f"model {i}", ""))
        assert cache.lookup([b"kept"]) == {}
        assert len(cache.lookup([b"39-%d" % j for j in range(100)])) == 100
        use = cache_use(path, limit)
    assert path.stat().st_size <= 1.05 * limit  # and what the last batch needed
    assert 500 <= use.entries < 4000
    assert use.file_bytes >= path.stat().st_size


def test_use_today_protects_what_is_old(path: Path) -> None:
    with closing(ResponseCache(path)) as cache:
        cache.store({b"used": "text"}, CachedModel("a", ""))
        cache.store({b"unused": "text"}, CachedModel("b", ""))
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE batches SET day = day - 10")
        assert cache.lookup([b"used"]) == {b"used": "text"}
        assert prune(path, 10**9, older_than_days=5).entries == 1
        assert cache.lookup([b"used", b"unused"]) == {b"used": "text"}


def test_pruning_gives_space_back(path: Path) -> None:
    with closing(ResponseCache(path)) as cache:
        for model in ("a", "b"):
            answers = {answer_key(model.encode(), b"%d" % i): "x" * 500 for i in range(5000)}
            cache.store(answers, CachedModel(model, f"/models/{model}"))
        cache.leave(CachedModel("b", "/models/b"), 7)
        assert prune(path, 10**9).entries == 0
        before, full = cache_use(path, 10**9).file_bytes, path.stat().st_size
        pruned = prune(path, 10**9, models=["a"])
        assert pruned.entries == 5000
        assert pruned.freed_bytes > 0.4 * before
        assert path.stat().st_size < 0.6 * full
        [model] = cache_use(path, 10**9).models
        assert (model.fingerprint, model.name, model.entries, model.hits) == ("b", "/models/b", 5000, 7)
        assert len(cache.lookup(list(answers))) == 5000
        assert prune(path, 10**9).entries == 0
        assert prune(path, 10**9, older_than_days=0).entries == 5000
        assert path.stat().st_size < EMPTY_BYTES


def test_a_smaller_bound_is_kept_too(path: Path) -> None:
    with closing(ResponseCache(path)) as cache:
        cache.store({b"%d" % i: "x" * 500 for i in range(5000)})
        assert prune(path, 1_000_000).entries > 3000
        assert 500_000 < path.stat().st_size <= 1_000_000
    with closing(ResponseCache(path, max_bytes=400_000)) as cache:  # jobs do it as well, and while they store
        cache.store({b"new": "x"})
        assert cache_use(path, 400_000).entries < 800
        assert prune(path, 400_000).entries == 0
        assert path.stat().st_size <= 400_000


def test_an_older_file_is_taken_over(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE responses (key BLOB PRIMARY KEY, answer BLOB NOT NULL) WITHOUT ROWID")
        rows = [(b"%d" % i, msgspec.msgpack.encode(f"text {i}")) for i in range(3000)]
        connection.executemany("INSERT INTO responses VALUES (?, ?)", rows)
    with closing(ResponseCache(path)) as cache:
        assert len(cache.lookup([key for key, _ in rows])) == 3000
        assert cache.lookup([b"7"]) == {b"7": "text 7"}
        cache.store({b"new": "text"})
        assert cache_use(path, 10**9).entries == 3001
        assert path.stat().st_size > EMPTY_BYTES
        assert prune(path, 10**9, older_than_days=0).entries == 3001
        assert path.stat().st_size < EMPTY_BYTES


def taken_over_without_room(path: Path) -> None:
    """Make an empty file that cannot give deleted pages back, as an older one was when there was no room to copy it."""
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection, connection:
        for table in cache_file._TABLES:
            connection.execute(table)
        connection.execute(f"PRAGMA user_version={cache_file._VERSION}")


def test_an_older_file_that_there_was_no_room_to_copy_shrinks_later(path: Path) -> None:
    taken_over_without_room(path)
    with closing(ResponseCache(path)) as cache:
        cache.store({b"%d" % i: "x" * 500 for i in range(1000)})
        assert prune(path, 10**9, older_than_days=0).entries == 1000
        assert path.stat().st_size < EMPTY_BYTES
        cache.store({b"a": "text"})
        assert cache.lookup([b"a"]) == {b"a": "text"}


def test_pruning_without_room_for_a_copy_deletes_all_the_same(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    taken_over_without_room(path)
    kept = {b"%d" % i: "x" * 500 for i in range(1000)}
    with closing(ResponseCache(path)) as cache:
        cache.store(kept, CachedModel("a", "/models/a"))
        cache.store({b"gone": "x"}, CachedModel("b", "/models/b"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, limits[1]))  # the journal of a copy is larger
    try:
        assert prune(path, 10**9, models=["b"]).entries == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be made smaller" in caplog.text
    with closing(ResponseCache(path)) as cache:
        assert len(cache.lookup([*kept, b"gone"])) == 1000
    assert prune(path, 10**9, older_than_days=0).entries == 1000
    assert path.stat().st_size < EMPTY_BYTES


# ---------------------------------------------------------------- trouble


def test_a_lock_that_is_not_let_go_is_waited_for_once(
    cache: ResponseCache, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_file, "PATIENCE_S", 0.5)
    waits: list[float] = []
    cache.store({b"before": "text"})
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        for i in range(20):
            start = time.monotonic()
            cache.store({b"%d" % i: "text"})
            waits.append(time.monotonic() - start)
        assert cache.lookup([b"before"]) == {b"before": "text"}
        assert cache.reserve([b"x"]) == ({}, set())
        holder.execute("ROLLBACK")
    assert waits[0] >= 0.5
    assert min(waits[1:]) < 0.5
    assert caplog.text.count(f"{path} could not be written while another process has it locked") == 1
    cache.store({b"after": "text"})
    assert len(cache.lookup([b"%d" % i for i in range(20)])) == 20  # what could not be written came with it


def test_at_its_end_a_job_waits_once_more_to_end_its_claims(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others would wait for them as long as the process lives."""
    with closing(ResponseCache(path)) as cache, ExitStack() as stack:
        assert cache.reserve([b"a", b"b"]) == ({}, set())
        holder = stack.enter_context(closing(sqlite3.connect(path, isolation_level=None)))
        monkeypatch.setattr(cache_file, "PATIENCE_S", 0.05)
        holder.execute("BEGIN IMMEDIATE")
        cache.store({b"a": "text"})
        monkeypatch.undo()
        leaving = threading.Thread(target=cache.leave, args=(CachedModel("", ""), 1))
        leaving.start()
        leaving.join(4 * cache_file.IMPATIENCE_S)
        assert leaving.is_alive()
        holder.execute("ROLLBACK")
        leaving.join()
        with closing(ResponseCache(path)) as other:
            assert other.unclaimed([b"a", b"b"]) == {b"a", b"b"}
            assert other.lookup([b"a"]) == {b"a": "text"}, "and to keep what could not be written before"


def test_whose_file_is_deleted_goes_on_in_the_one_that_others_use(path: Path, tmp_path: Path) -> None:
    with (
        closing(ResponseCache(path)) as one,
        closing(ResponseCache(path)) as other,
        closing(ResponseCache(path)) as idle,
    ):
        one.store({b"old": "x"})
        for cache in (one, other, idle):
            assert cache.lookup([b"old"]) == {b"old": "x"}
        assert one.reserve([b"a"]).elsewhere == set()
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
        assert other.reserve([b"a", b"b"]) == ({}, set())  # claims went with the file
        assert one.reserve([b"b"]).elsewhere == {b"b"}
        one.store({b"a": "y"})
        assert idle.lookup([b"old", b"a"]) == {b"a": "y"}  # the last one to let the old file go takes nothing with it
        idle.store({b"c": "z"})
        assert cache_use(path, 1 << 30).entries == 2
        assert other.lookup([b"a", b"c"]) == {b"a": "y", b"c": "z"}

        path.rename(tmp_path / "away")
        assert one.lookup([b"a"]) == {}
        one.store({b"a": "new"})
        assert other.lookup([b"a"]) == {b"a": "new"}


def test_a_full_disk_costs_the_cache_not_the_job(path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=fake_children.fill_small_disk, args=(path, 400_000))
    process.start()
    process.join()
    assert process.exitcode == 0
    with closing(ResponseCache(path)) as cache:  # what was written before is sound
        assert cache.lookup([b"0"]) == {b"0": "x" * 10_000}
