"""The file of the response cache: its tables, older files brought up to date, and what happens when it cannot be used.

A cache is a convenience: what goes wrong with its file is logged, and those who use it compute instead.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from gpu_pool.claim_owners import is_alive
from gpu_pool.file_identity import file_identity
from gpu_pool.file_lock import alone

Answer = tuple[float, bool] | str
"""(log-probability, greedy) of a log-likelihood request, or the text of a generation request."""
Result = TypeVar("Result")
Kind = Literal["read", "written"]

PATIENCE_S = 10.0
"""How long to wait for those who write: they need milliseconds; longer means a stuck disk or process."""
IMPATIENCE_S = 0.05
"""How long to wait once that was in vain, until it succeeds again: a batch must not wait as long each time."""
SECONDS_A_DAY = 86_400
_CORRUPT = (11, 26)  # SQLITE_CORRUPT, SQLITE_NOTADB
_BUSY = (5, 6)  # SQLITE_BUSY, SQLITE_LOCKED
_FULL = (13,)  # SQLITE_FULL

_VERSION = 2
_TABLES = (
    """CREATE TABLE models (
        id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, name TEXT NOT NULL, hits INTEGER NOT NULL)""",
    # answers by the order of their coming, so that those of a batch lie together and leave whole pages behind
    "CREATE TABLE responses (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, answer BLOB NOT NULL)",
    # responses first..last are of one model; `bytes` are those of keys and answers, `day` is that of the latest use
    """CREATE TABLE batches (
        first INTEGER PRIMARY KEY, last INTEGER NOT NULL, bytes INTEGER NOT NULL, model INTEGER NOT NULL,
        day INTEGER NOT NULL)""",
    "CREATE INDEX batches_by_day ON batches (day, first)",
    "CREATE TABLE claims (key BLOB PRIMARY KEY, owner TEXT NOT NULL) WITHOUT ROWID",
)

_log = logging.getLogger(__name__)
decode = msgspec.msgpack.Decoder(Answer).decode


def today() -> int:
    """Days since 1970, UTC."""
    return int(time.time() // SECONDS_A_DAY)


class CacheFile:
    """One process's connection to the file; safe to use from several threads, one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None
        """Which file that is."""
        self._impatient: set[Kind] = set()
        """Where the last wait for others was in vain."""
        self._trouble = ""
        """What was logged last and still holds."""

    def read(self, work: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
        """What `work` finds, outside any transaction; `otherwise` when the file cannot be read."""
        return self._attempt("read", work, otherwise)

    def write(
        self, work: Callable[[sqlite3.Connection], Result], otherwise: Result, *, is_last_chance: bool = False
    ) -> Result:
        """What `work` returns, in one transaction; `otherwise` when the file cannot be written: it is as it was.

        A last chance waits for others once more, even if that was in vain before.
        """

        def transaction(connection: sqlite3.Connection) -> Result:
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk has ended it already
                    connection.execute("ROLLBACK")
                raise
            return result

        if is_last_chance:
            self._impatient.discard("written")
        return self._attempt("written", transaction, otherwise)

    def close(self) -> None:
        """Close the file; it opens again by itself."""
        with self._lock:
            self._drop_connection()

    def _attempt(self, kind: Kind, work: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
        with self._lock:
            try:
                connection = self._open(kind)
                result = work(connection)
            except (sqlite3.Error, msgspec.DecodeError, OSError) as error:
                self._on_trouble(kind, error)
                return otherwise
            self._impatient.discard(kind)
            if not self._impatient:
                self._trouble = ""
            return result

    def _open(self, kind: Kind) -> sqlite3.Connection:
        patience = IMPATIENCE_S if kind in self._impatient else PATIENCE_S
        if self._connection is not None and file_identity(self.path) != self._opened:
            _log.warning("The response cache %s was deleted or replaced: going on with what is there", self.path)
            self._drop_connection()  # what was claimed in the old file may be computed twice
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=patience, isolation_level=None, check_same_thread=False)
            self._connection = connection
            self._opened = file_identity(self.path)
            with alone(self.path):  # SQLite does not wait for its turn to change the journal of a new file
                prepare(connection)
        self._connection.execute(f"PRAGMA busy_timeout={int(patience * 1000)}")
        return self._connection

    def _drop_connection(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):  # the file may be gone under it
                self._connection.close()
            self._connection = None

    def _on_trouble(self, kind: Kind, error: Exception) -> None:
        """A line in the log, once; a corrupt file is moved aside."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        trouble = f"The response cache {self.path} could not be {kind}{_advice(code)}: {error}"
        if trouble != self._trouble:
            _log.warning("%s", trouble)
        self._trouble = trouble
        if code in _BUSY:
            self._impatient.add(kind)
            return
        self._drop_connection()
        if isinstance(error, msgspec.DecodeError) or code in _CORRUPT:
            self._move_aside()

    def _move_aside(self) -> None:
        with alone(self.path):
            if not _is_corrupt(self.path):
                return  # another evaluator has replaced it meanwhile
            aside = f"{self.path}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
            for suffix in ("", "-wal", "-shm"):
                file = Path(f"{self.path}{suffix}")
                if file.exists():
                    file.rename(f"{aside}{suffix}")
            _log.warning("The response cache is corrupt: moved to %s, starting an empty one", aside)


def _advice(code: int) -> str:
    if code in _BUSY:
        return " while another process has it locked"
    return " until there is room on its disk" if code in _FULL else ""


def prepare(connection: sqlite3.Connection) -> None:
    """Make the tables of a new file, bring an older one up to date, end void claims; call it under `alone`."""
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # of a new file: deleted pages can be given back
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    version = _version(connection)
    if version > _VERSION:
        raise sqlite3.NotSupportedError("it is of a newer version")
    if version < _VERSION:
        _upgrade(connection)
    with suppress(sqlite3.OperationalError):  # locked, or its disk is full: it can be read all the same
        _end_void_claims(connection)


def _end_void_claims(connection: sqlite3.Connection) -> None:
    """Delete what processes have claimed that were killed: otherwise a claim goes when its request is made again."""
    owners = connection.execute("SELECT DISTINCT owner FROM claims").fetchall()
    void = [owner for owner in owners if not is_alive(*owner)]
    if void:
        connection.executemany("DELETE FROM claims WHERE owner = ?", void)


def _version(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


def _upgrade(connection: sqlite3.Connection) -> None:
    """From nothing, or from the first version, which had only keys and answers."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        is_old = connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'responses'").fetchone() is not None
        if is_old:
            connection.execute("ALTER TABLE responses RENAME TO old_responses")
        for table in _TABLES:
            connection.execute(table)
        if is_old:
            _take_over(connection)
        connection.execute(f"PRAGMA user_version={_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    if is_old:
        with suppress(sqlite3.Error):  # without room for a copy, deleted pages are used again but not given back
            connection.execute("VACUUM")


def _take_over(connection: sqlite3.Connection) -> None:
    """The answers of `old_responses`, as one batch of a model that nobody noted."""
    connection.execute("INSERT INTO responses (key, answer) SELECT key, answer FROM old_responses")
    connection.execute("DROP TABLE old_responses")
    entries, size = connection.execute("SELECT count(*), sum(length(key) + length(answer)) FROM responses").fetchone()
    if entries:
        connection.execute("INSERT INTO models VALUES (1, '', '', 0)")
        connection.execute("INSERT INTO batches VALUES (1, ?, ?, 1, ?)", (entries, size, today()))


def _is_corrupt(path: Path) -> bool:
    """Whether a fresh connection finds the file damaged or an entry of it unreadable."""
    try:
        connection = sqlite3.connect(path, timeout=PATIENCE_S)
        try:
            if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                return True
            for (answer,) in connection.execute("SELECT answer FROM responses"):
                decode(answer)
        finally:
            connection.close()
    except (sqlite3.DatabaseError, msgspec.DecodeError):
        return True
    return False
