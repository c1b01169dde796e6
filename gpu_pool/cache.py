"""The response cache: answers of models to deterministic requests, one SQLite file shared by all evaluators.

Keys are digests of everything that decides an answer (see `answer_key`), so an entry is never wrong, only unused.
The cache is a convenience: what goes wrong with it is logged and the job computes instead.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

ENGINE_VERSION = "1"
"""Part of every key; raised when our engine changes what it answers."""

Answer = tuple[float, bool] | str
"""(log-probability, greedy) of a log-likelihood request, or the text of a generation request."""

_BUSY_TIMEOUT_S = 30.0  # writers hold the lock for milliseconds; longer means a stuck disk
_KEYS_PER_QUERY = 500
_CORRUPT = (11, 26)  # SQLITE_CORRUPT, SQLITE_NOTADB

_SCHEMA = "CREATE TABLE IF NOT EXISTS responses (key BLOB PRIMARY KEY, answer BLOB NOT NULL) WITHOUT ROWID"

_log = logging.getLogger(__name__)
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Answer).decode


def answer_key(scope: bytes, *parts: bytes) -> bytes:
    """sha256 over `scope` (model, arguments, versions) and the parts of one request, unambiguous whatever they hold."""
    digest = hashlib.sha256(scope)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


class ResponseCache:
    """One process's view of the cache; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def lookup(self, keys: Sequence[bytes]) -> dict[bytes, Answer]:
        """The answers known for some of `keys`."""
        found: dict[bytes, Answer] = {}
        with self._lock, self._forgiving("read"):
            connection = self._open()
            for start in range(0, len(keys), _KEYS_PER_QUERY):
                part = keys[start : start + _KEYS_PER_QUERY]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, answer FROM responses WHERE key IN ({marks})"
                found.update((key, _decode(answer)) for key, answer in connection.execute(query, part))
        return found

    def store(self, answers: Mapping[bytes, Answer]) -> None:
        """Keep these answers, in one transaction; the first answer to a key stays."""
        rows = [(key, _encode(answer)) for key, answer in answers.items()]
        with self._lock, self._forgiving("written"):
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.executemany("INSERT OR IGNORE INTO responses VALUES (?, ?)", rows)
            except BaseException:
                connection.rollback()
                raise
            connection.commit()

    def close(self) -> None:
        """Close the file; it opens again by itself."""
        with self._lock:
            self._drop_connection()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(
                self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._connection = connection
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(_SCHEMA)
        return self._connection

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def _forgiving(self, what: str) -> Generator[None]:
        """Turn trouble with the file into a line in the log; a corrupt file is moved aside."""
        try:
            yield
        except (sqlite3.Error, msgspec.DecodeError, OSError) as error:
            _log.warning("The response cache could not be %s: %s", what, error)
            self._drop_connection()
            if isinstance(error, msgspec.DecodeError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _CORRUPT:
                self._move_aside()

    def _move_aside(self) -> None:
        with open(self._path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_corrupt(self._path):
                return  # another evaluator has replaced it meanwhile
            aside = f"{self._path}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
            for suffix in ("", "-wal", "-shm"):
                file = Path(f"{self._path}{suffix}")
                if file.exists():
                    file.rename(f"{aside}{suffix}")
            _log.warning("The response cache is corrupt: moved to %s, starting an empty one", aside)


def _is_corrupt(path: Path) -> bool:
    """Whether a fresh connection finds the file damaged or an entry of it unreadable."""
    try:
        connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S)
        try:
            if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                return True
            for (answer,) in connection.execute("SELECT answer FROM responses"):
                _decode(answer)
        finally:
            connection.close()
    except (sqlite3.DatabaseError, msgspec.DecodeError):
        return True
    return False
