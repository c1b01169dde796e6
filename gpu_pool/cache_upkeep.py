"""The operator's view of the response cache: what is in it, and what goes when there is too much of it.

What was used least recently goes first, by the day, a few answers at a time so that nobody who writes waits long.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, date, datetime
from pathlib import Path

from gpu_pool.cache_file import PATIENCE_S, SECONDS_A_DAY, prepare, today
from gpu_pool.errors import PoolError
from gpu_pool.file_lock import alone
from gpu_pool.records import Record

SHORTEST_PREFIX = 8
"""Characters of a fingerprint that name a model."""
PIECE = 1000
"""Answers that are deleted at a time, and pages that are given back: some 10 ms of the lock."""
PIECES_A_STORE = 8
"""Most pieces that go when answers come to a cache that is full: no batch of a job pays for all that is too much."""
PAUSE_S = 0.005
"""Between two pieces of a long pruning, so that writers get their turn."""
COMPACT_SHARE = 0.25
"""From this share of deleted answers on, the index is written anew: its pages are full of holes."""

_log = logging.getLogger(__name__)


class CacheUnusable(PoolError):
    """The response cache cannot be used now."""


class ModelUse(Record, frozen=True, kw_only=True):
    """The answers of one model."""

    fingerprint: str
    """Empty: of answers from before models were noted."""
    name: str
    """The path or hub id under which it was evaluated last."""
    entries: int
    bytes: int
    """Of keys and answers; indexes and room to grow come on top."""
    hits: int
    """Requests that jobs have been spared, jobs that ended by themselves counted."""
    last_used: date | None

    def is_called(self, text: str) -> bool:
        """Whether `text` means this model: its name, or its fingerprint, of which the beginning is enough."""
        return text == self.name or (len(text) >= SHORTEST_PREFIX and self.fingerprint.startswith(text))


class CacheUse(Record, frozen=True, kw_only=True):
    """What the cache holds."""

    entries: int
    file_bytes: int
    """The file and its journal."""
    max_bytes: int
    hits: int
    models: tuple[ModelUse, ...]
    """Most bytes first."""


class Pruned(Record, frozen=True, kw_only=True):
    """What a pruning did."""

    entries: int
    """Deleted answers."""
    freed_bytes: int
    """By which the file is smaller."""


def cache_use(path: Path, max_bytes: int) -> CacheUse:
    """Statistics of the cache file at `path`. Raises CacheUnusable."""
    with _opened(path) as connection:
        models = [_model_use(*row) for row in connection.execute(_BY_MODEL)]
    return CacheUse(
        entries=sum(model.entries for model in models),
        file_bytes=_file_bytes(path),
        max_bytes=max_bytes,
        hits=sum(model.hits for model in models),
        models=tuple(models),
    )


_BY_MODEL = """
SELECT fingerprint, name, coalesce(sum(last - first + 1), 0), coalesce(sum(bytes), 0), hits, max(day)
FROM models LEFT JOIN batches ON batches.model = models.id GROUP BY models.id ORDER BY 4 DESC, fingerprint
"""


def _model_use(fingerprint: str, name: str, entries: int, size: int, hits: int, day: int | None) -> ModelUse:
    last_used = None if day is None else datetime.fromtimestamp(day * SECONDS_A_DAY, UTC).date()
    return ModelUse(fingerprint=fingerprint, name=name, entries=entries, bytes=size, hits=hits, last_used=last_used)


def prune(
    path: Path, max_bytes: int, older_than_days: int | None = None, models: Sequence[str] | None = None
) -> Pruned:
    """Delete what was not used for `older_than_days` days and is of `models` (fingerprints; None: of any).

    With neither, only what is more than `max_bytes`. Raises CacheUnusable.
    """
    with _opened(path) as connection:
        before = _file_bytes(path)
        entries = _count(connection)
        if older_than_days is None and models is None:
            deleted = _shrink(connection, max_bytes)
        else:
            deleted = _delete_matching(connection, older_than_days or 0, models)
        if deleted and deleted >= COMPACT_SHARE * entries:
            _rewrite(connection, "REINDEX responses")
        if not _pragma(connection, "auto_vacuum"):  # an older file, and no room for a copy when it was taken over
            _rewrite(connection, "VACUUM")
        while _give_back(connection, PIECE):
            time.sleep(PAUSE_S)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return Pruned(entries=deleted, freed_bytes=max(0, before - _file_bytes(path)))


def make_room(connection: sqlite3.Connection, max_bytes: int, pieces: int = PIECES_A_STORE) -> int:
    """Bring the file nearer to at most `max_bytes`; how many answers that cost."""
    deleted = 0
    surplus = _pragma(connection, "page_count") - max_bytes // _pragma(connection, "page_size")
    if surplus <= 0:
        return 0
    for _ in range(pieces):
        if _pragma(connection, "freelist_count") >= surplus or not (gone := _delete_oldest(connection)):
            break
        deleted += gone
    _give_back(connection, min(surplus, pieces * PIECE))
    return deleted


def _give_back(connection: sqlite3.Connection, pages: int) -> bool:
    """Make the file smaller by so many deleted pages; whether it could, and there are more. Outside any transaction."""
    before = _pragma(connection, "freelist_count")
    connection.executescript(f"PRAGMA incremental_vacuum({pages})")  # `execute` does one step of it: a single page
    return 0 < _pragma(connection, "freelist_count") < before


def _rewrite(connection: sqlite3.Connection, statement: str) -> None:
    try:
        connection.execute(statement)
    except sqlite3.Error as error:  # no room for a copy: deleted pages are used again but not given back
        _log.warning("The file of the response cache could not be made smaller: %s", error)


def _shrink(connection: sqlite3.Connection, max_bytes: int) -> int:
    deleted = 0
    while gone := make_room(connection, max_bytes, pieces=1):
        deleted += gone
        time.sleep(PAUSE_S)
    return deleted


def _delete_matching(connection: sqlite3.Connection, older_than_days: int, models: Sequence[str] | None) -> int:
    query, values = "SELECT first FROM batches WHERE day <= ?", [today() - older_than_days]
    if models is not None:
        marks = ",".join("?" * len(models))
        query += f" AND model IN (SELECT id FROM models WHERE fingerprint IN ({marks}))"
    deleted = 0
    while gone := _delete_piece(connection, f"{query} ORDER BY first LIMIT 1", (*values, *(models or ()))):
        deleted += gone
        time.sleep(PAUSE_S)
    connection.execute("DELETE FROM models WHERE hits = 0 AND id NOT IN (SELECT model FROM batches)")
    return deleted


def _delete_oldest(connection: sqlite3.Connection) -> int:
    return _delete_piece(connection, "SELECT first FROM batches ORDER BY day, first LIMIT 1", ())


def _delete_piece(connection: sqlite3.Connection, query: str, values: Sequence[object]) -> int:
    """Delete up to PIECE answers of the batch that `query` finds; how many: none when it finds none."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        found = connection.execute(f"SELECT first, last FROM batches WHERE first = ({query})", values).fetchone()
        deleted = 0 if found is None else _delete_front(connection, *found)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return deleted


def _delete_front(connection: sqlite3.Connection, first: int, last: int) -> int:
    end = min(first + PIECE - 1, last)
    query = "SELECT coalesce(sum(length(key) + length(answer)), 0) FROM responses WHERE id BETWEEN ? AND ?"
    [size] = connection.execute(query, (first, end)).fetchone()
    connection.execute("DELETE FROM responses WHERE id BETWEEN ? AND ?", (first, end))
    if end == last:
        connection.execute("DELETE FROM batches WHERE first = ?", (first,))
    else:
        connection.execute("UPDATE batches SET first = ?, bytes = bytes - ? WHERE first = ?", (end + 1, size, first))
    return end - first + 1


def _count(connection: sqlite3.Connection) -> int:
    return connection.execute("SELECT coalesce(sum(last - first + 1), 0) FROM batches").fetchone()[0]


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def _file_bytes(path: Path) -> int:
    files = (Path(f"{path}{suffix}") for suffix in ("", "-wal"))
    return sum(file.stat().st_size for file in files if file.exists())


@contextmanager
def _opened(path: Path) -> Generator[sqlite3.Connection]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=PATIENCE_S, isolation_level=None)
        with closing(connection):
            with alone(path):
                prepare(connection)
            yield connection
    except (sqlite3.Error, OSError) as error:
        raise CacheUnusable(f"the response cache cannot be used now: {error}") from error
