"""The response cache: answers of models to deterministic requests, one SQLite file shared by all evaluators.

Keys are digests of everything that decides an answer (see `answer_key`), so an entry is never wrong, only unused.
Who is about to compute an answer claims its key, so that nobody else computes it meanwhile; claims of a process that
has ended are void.
"""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from gpu_pool.cache_file import Answer, CacheFile, decode, today
from gpu_pool.cache_upkeep import make_room
from gpu_pool.claim_owners import is_alive, new_owner
from gpu_pool.records import DEFAULT_CACHE_MAX_BYTES

ENGINE_VERSION = "7"
"""Part of every key; raised when our engine changes what it answers."""
MAX_BATCH = 4096
"""Answers whose use is noted as one."""

_KEYS_PER_QUERY = 500
_MAX_UNSAVED = 10_000  # answers to keep for a next try

_encode = msgspec.msgpack.Encoder().encode
__all__ = ["ENGINE_VERSION", "Answer", "CachedModel", "Reservation", "ResponseCache", "answer_key", "cache_path"]


def cache_path(data_dir: Path) -> Path:
    """The cache file in a data folder."""
    return data_dir / "cache" / "responses.sqlite"


def answer_key(scope: bytes, *parts: bytes) -> bytes:
    """sha256 over `scope` (model, arguments, versions) and the parts of one request, unambiguous whatever they hold."""
    digest = hashlib.sha256(scope)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


class CachedModel(NamedTuple):
    """Whose answers they are: for statistics and pruning, not part of any key."""

    fingerprint: str = ""
    name: str = ""


UNKNOWN_MODEL = CachedModel()


class Reservation(NamedTuple):
    """What came of wanting to compute some requests."""

    answers: dict[bytes, Answer]
    """Those that are known already."""
    elsewhere: set[bytes]
    """Those that others compute just now. All the rest are claimed for the caller."""


class ResponseCache:
    """One process's view of the cache; safe to use from several threads."""

    def __init__(self, path: Path, max_bytes: int = DEFAULT_CACHE_MAX_BYTES) -> None:
        self._file = CacheFile(path)
        self._max_bytes = max_bytes
        self._owner = new_owner()
        self._pending = threading.Lock()
        """Held by whoever adds to the following, and writes it."""
        self._unsaved: dict[bytes, tuple[CachedModel, bytes]] = {}
        """Answers that could not be written, each with its model: the next attempt includes them."""
        self._unreleased: set[bytes] = set()
        """Claims, likewise."""

    def lookup(self, keys: Sequence[bytes]) -> dict[bytes, Answer]:
        """The answers known for some of `keys`."""
        found, stale = self._file.read(lambda connection: _find(connection, keys), ({}, []))
        if stale:
            self._file.write(lambda connection: _note_use(connection, stale), None)
        return found

    def store(self, answers: Mapping[bytes, Answer], model: CachedModel = UNKNOWN_MODEL) -> None:
        """Keep these answers and end their claims, in one transaction; the first answer to a key stays.

        So are those before that could not be written, which without `answers` is all that is done.
        """
        with self._pending:
            self._unsaved.update((key, (model, _encode(answer))) for key, answer in answers.items())
            self._unreleased.update(answers)
            if not self._unsaved and not self._unreleased:
                return
            if self._file.write(self._write_pending, False):
                self._unsaved.clear()
                self._unreleased.clear()
                self._file.read(lambda connection: make_room(connection, self._max_bytes), 0)
            for key in list(self._unsaved)[: max(0, len(self._unsaved) - _MAX_UNSAVED)]:
                del self._unsaved[key]

    def _write_pending(self, connection: sqlite3.Connection) -> bool:
        self._insert_unsaved(connection)
        _delete_claims(connection, self._unreleased, self._owner)
        return True

    def _insert_unsaved(self, connection: sqlite3.Connection) -> None:
        of_model: defaultdict[CachedModel, dict[bytes, bytes]] = defaultdict(dict)
        for key, (model, answer) in self._unsaved.items():
            of_model[model][key] = answer
        for model, answers in of_model.items():
            _insert(connection, answers, model)

    # ------------------------------------------------------------------ claims

    def reserve(self, keys: Sequence[bytes]) -> Reservation:
        """Claim those of `keys` that nobody has answered and no other living process has claimed.

        Without a usable file all are the caller's.
        """

        def work(connection: sqlite3.Connection) -> Reservation:
            answers, stale = _find(connection, keys)
            _note_use(connection, stale)
            missing = [key for key in keys if key not in answers]
            return Reservation(answers, _claim(connection, missing, self._owner))

        return self._file.write(work, Reservation({}, set()))

    def release(self, keys: Iterable[bytes]) -> None:
        """Others may compute these; those that the caller has not claimed stay as they are."""
        with self._pending:
            self._unreleased.update(keys)
            if self._unreleased and self._file.write(self._release_pending, False):
                self._unreleased.clear()

    def _release_pending(self, connection: sqlite3.Connection) -> bool:
        _delete_claims(connection, self._unreleased, self._owner)
        return True

    def unclaimed(self, keys: Collection[bytes]) -> set[bytes]:
        """Those of `keys` that no other living process computes."""

        def work(connection: sqlite3.Connection) -> set[bytes]:
            owners = _owners(connection, keys)
            living = {owner for owner in set(owners.values()) - {self._owner} if is_alive(owner)}
            return {key for key in keys if owners.get(key) not in living}

        return self._file.read(work, set(keys))

    def leave(self, model: CachedModel, hits: int) -> None:
        """End all claims of this process; note how many answers of the model were of use."""

        def work(connection: sqlite3.Connection) -> bool:
            self._insert_unsaved(connection)
            connection.execute("DELETE FROM claims WHERE owner = ?", (self._owner,))
            if hits:
                connection.execute("UPDATE models SET hits = hits + ? WHERE id = ?", (hits, _id(connection, model)))
            return True

        with self._pending:
            if self._file.write(work, False, is_last_chance=True):  # what stays claimed others wait for, for minutes
                self._unsaved.clear()
                self._unreleased.clear()

    def close(self) -> None:
        """Close the file; it opens again by itself."""
        self._file.close()


def _parts(keys: Iterable[bytes]) -> Iterator[tuple[list[bytes], str]]:
    """Some keys at a time, and as many question marks."""
    rest = iter(keys)
    while part := list(itertools.islice(rest, _KEYS_PER_QUERY)):
        yield part, ",".join("?" * len(part))


def _find(connection: sqlite3.Connection, keys: Iterable[bytes]) -> tuple[dict[bytes, Answer], list[int]]:
    """The answers, and the batches (their first ids) whose use today is not noted yet."""
    found: dict[bytes, Answer] = {}
    ids: list[int] = []
    for part, marks in _parts(keys):
        query = f"SELECT id, key, answer FROM responses WHERE key IN ({marks})"
        for number, key, answer in connection.execute(query, part):
            found[key] = decode(answer)
            ids.append(number)
    return found, list(_stale_batches(connection, sorted(ids)))


def _stale_batches(connection: sqlite3.Connection, ids: list[int]) -> Iterator[int]:
    day, covered = today(), 0
    for number in ids:
        if number > covered:
            query = "SELECT first, last, day FROM batches WHERE first <= ? ORDER BY first DESC LIMIT 1"
            first, covered, used = connection.execute(query, (number,)).fetchone() or (0, number, day)
            if used < day:
                yield first


def _note_use(connection: sqlite3.Connection, batches: Iterable[int]) -> None:
    """Today's date on these batches: each is written at most once a day."""
    connection.executemany("UPDATE batches SET day = ? WHERE first = ?", [(today(), first) for first in batches])


def _id(connection: sqlite3.Connection, model: CachedModel) -> int:
    """The model's row, made now when it is new; its name is the latest."""
    query = """INSERT INTO models (fingerprint, name, hits) VALUES (?, ?, 0)
               ON CONFLICT (fingerprint) DO UPDATE SET name = excluded.name RETURNING id"""
    return connection.execute(query, model).fetchone()[0]


def _insert(connection: sqlite3.Connection, answers: Mapping[bytes, bytes], model: CachedModel) -> None:
    """Add what is new at the end, to the last batch or as another one."""
    known = {key for part, marks in _parts(answers) for (key,) in _keys_of(connection, part, marks)}
    new = [(key, answer) for key, answer in answers.items() if key not in known]
    if not new:
        return
    number, day, size = _id(connection, model), today(), sum(len(key) + len(answer) for key, answer in new)
    query = "SELECT first, last, model, day FROM batches ORDER BY first DESC LIMIT 1"
    first, last, *of = connection.execute(query).fetchone() or (1, 0, None, None)
    rows = [(last + i, key, answer) for i, (key, answer) in enumerate(new, 1)]
    connection.executemany("INSERT INTO responses VALUES (?, ?, ?)", rows)
    if of == [number, day] and last - first + len(rows) < MAX_BATCH:
        connection.execute("UPDATE batches SET last = ?, bytes = bytes + ? WHERE first = ?", (rows[-1][0], size, first))
    else:
        connection.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?)", (last + 1, rows[-1][0], size, number, day))


def _keys_of(connection: sqlite3.Connection, part: list[bytes], marks: str) -> sqlite3.Cursor:
    return connection.execute(f"SELECT key FROM responses WHERE key IN ({marks})", part)


def _claim(connection: sqlite3.Connection, keys: Sequence[bytes], owner: str) -> set[bytes]:
    """Claim what is free, also from processes that have ended; the keys that are others'."""
    rows = [(key, owner) for key in keys]
    connection.executemany("INSERT OR IGNORE INTO claims VALUES (?, ?)", rows)
    others = {key: other for key, other in _owners(connection, keys).items() if other != owner}
    dead = [other for other in set(others.values()) if not is_alive(other)]
    for other in dead:
        connection.execute("DELETE FROM claims WHERE owner = ?", (other,))
    if dead:
        connection.executemany("INSERT OR IGNORE INTO claims VALUES (?, ?)", rows)
    return {key for key, other in others.items() if other not in dead}


def _owners(connection: sqlite3.Connection, keys: Iterable[bytes]) -> dict[bytes, str]:
    return {
        key: owner
        for part, marks in _parts(keys)
        for key, owner in connection.execute(f"SELECT key, owner FROM claims WHERE key IN ({marks})", part)
    }


def _delete_claims(connection: sqlite3.Connection, keys: Iterable[bytes], owner: str) -> None:
    connection.executemany("DELETE FROM claims WHERE key = ? AND owner = ?", ((key, owner) for key in keys))
