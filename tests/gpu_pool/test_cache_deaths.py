"""Processes that die while they make, fill, upgrade or prune the response cache: at each statement, all of them.

Whatever is left must be whole and go on as if nothing had happened: the next process finds the answers that were
stored, and ends what the dead one had begun.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from killed_cache import ANSWERS, DELETED_MODEL, KEPT_MODEL, keys_of, look, prune, store

from gpu_pool.cache import ResponseCache
from gpu_pool.cache_upkeep import cache_use

ROOT = Path(__file__).parents[2]
Do = Callable[[str, Path, int], dict[str, Any]]


@pytest.fixture(scope="module")
def do() -> Iterator[Do]:
    """Has a process do some work on a file, and die before so many statements; 0: live."""
    command = [sys.executable, ROOT / "tests" / "support" / "killed_cache.py"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(work: str, path: Path, step: int) -> dict[str, Any]:
            print(json.dumps({"work": work, "path": str(path), "step": step}), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()
    assert process.returncode == 0


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """The folder of a cache with the answers of two models."""
    store(tmp_path / "full" / "cache.sqlite")
    return tmp_path / "full"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder of a cache as the first version made it."""
    path = tmp_path / "old" / "cache.sqlite"
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE responses (key BLOB PRIMARY KEY, answer BLOB NOT NULL) WITHOUT ROWID")
        rows = [(key, b"\x92\xcb\xbf\xf0\0\0\0\0\0\0\xc3") for key in keys_of(KEPT_MODEL)]
        connection.executemany("INSERT INTO responses VALUES (?, ?)", rows)
        connection.commit()
    return path.parent


def each_death(do: Do, work: str, before: Path | None, tmp_path: Path) -> Iterator[Path]:
    """A file for each statement of the work before which a process has died, which began with the files `before`."""
    steps = do(work, copied(before, tmp_path / "undisturbed"), 0)["steps"]
    assert steps > 10
    for step in range(1, steps + 1):
        path = copied(before, tmp_path / f"step-{step}")
        assert do(work, path, step)["killed"]
        yield path


def copied(before: Path | None, folder: Path) -> Path:
    if before is not None:
        shutil.copytree(before, folder)
    return folder / "cache.sqlite"


def is_whole(path: Path) -> None:
    """The tables are what they say of each other, and nothing is claimed."""
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        said = connection.execute("SELECT first, last, bytes FROM batches ORDER BY first").fetchall()
        counted = [
            connection.execute(
                "SELECT count(*), sum(length(key) + length(answer)) FROM responses WHERE id BETWEEN ? AND ?", batch[:2]
            ).fetchone()
            for batch in said
        ]
        assert counted == [(last - first + 1, size) for first, last, size in said]
        everything = connection.execute("SELECT count(*) FROM responses").fetchone()[0]
        assert everything == sum(count for count, _ in counted)
        assert connection.execute("SELECT count(*) FROM claims").fetchone() == (0,)


def found(path: Path, keys: list[bytes]) -> int:
    with closing(ResponseCache(path)) as cache:
        return len(cache.lookup(keys))


def test_the_first_ones_to_store(do: Do, tmp_path: Path) -> None:
    """A batch is there or is not; the next process can store it again."""
    for path in each_death(do, "store", None, tmp_path):
        assert found(path, keys_of(KEPT_MODEL)) in (0, ANSWERS)
        store(path)
        is_whole(path)
        assert found(path, [*keys_of(KEPT_MODEL), *keys_of(DELETED_MODEL)]) == 2 * ANSWERS
        assert cache_use(path, 1 << 30).entries == 2 * ANSWERS


def test_the_operator_prunes(do: Do, full: Path, tmp_path: Path) -> None:
    """Nothing is lost that was to stay, and the next pruning ends it."""
    for path in each_death(do, "prune", full, tmp_path):
        assert found(path, keys_of(KEPT_MODEL)) == ANSWERS
        is_whole(path)
        prune(path)
        is_whole(path)
        assert found(path, keys_of(DELETED_MODEL)) == 0
        assert [model.name for model in cache_use(path, 1 << 30).models] == ["kept"]


def test_an_older_file_is_brought_up_to_date(do: Do, old: Path, tmp_path: Path) -> None:
    for path in each_death(do, "look", old, tmp_path):
        look(path)
        is_whole(path)
        assert found(path, keys_of(KEPT_MODEL)) == ANSWERS
