"""The database: SQLite or PostgreSQL, in one thread of its own where whole transactions run.

A transaction crosses from the event loop to that thread and back once, whatever it consists of: the crossing is what
costs, several times what SQLite takes.

A database that is locked, full or away is tried again: a request for as long as a person waits, a change of state for
as long as the server runs, for what has happened must be written. Nothing of a failed transaction stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError

from gpu_pool.engines import READS, database_url, make_engine, sqlite_file, trouble
from gpu_pool.errors import DatabaseInUse, DatabaseUnavailable, PoolError
from gpu_pool.migration import upgrade
from gpu_pool.open_file import FileReplaced, OpenFile

PATIENCE_SECONDS = 10.0
"""A transaction that someone waits for is tried for so long."""
RETRY_SECONDS = 0.2
"""Between two tries; each waits a second for a lock by itself."""
_IN_USE = 0x6576616C
"""Key of the PostgreSQL advisory lock that says that a server uses the database; it goes with the connection."""

ResultT = TypeVar("ResultT")
logger = logging.getLogger(__name__)


class Database:
    """Open it with `await Database.open(path)`. One transaction at a time: SQLite has one writer anyway."""

    def __init__(self, engine: sa.Engine, claim: IO[str] | None) -> None:
        self._engine = engine
        self._file = sqlite_file(engine.url)
        self._open_file = OpenFile(self._file, engine) if self._file else None
        self._claim = claim
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")
        self._giving_up = asyncio.Event()
        self._had_it = False
        """Whether a transaction has succeeded; who has the database to himself then is in our way only for a time."""
        self._troubled: dict[object, str] = {}
        """Why each of the transactions that wait to be tried again could not be carried out."""

    @classmethod
    async def open(cls, database: Path | str, *, alone: bool = False, migrate: bool = True) -> Database:
        """Open (or create) and migrate a SQLite file, or what a URL names; `alone`: no other may have it so.

        Raises DatabaseInUse, DatabaseTooNew, DatabaseUnavailable, and PoolError for what is no usable database.
        """
        url = database_url(database)
        if path := sqlite_file(url):
            path.parent.mkdir(parents=True, exist_ok=True)
        engine = make_engine(url)
        opened = cls(engine, _claim(engine, path) if alone else None)
        try:
            if migrate:
                await opened.transaction(upgrade)
        except DBAPIError as error:
            await opened.close()
            raise PoolError(f"the database {url} cannot be used: {error.orig}") from error
        except BaseException:
            await opened.close()
            raise
        return opened

    async def transaction(
        self, work: Callable[[sa.Connection], ResultT], *, patience_s: float | None = PATIENCE_SECONDS
    ) -> ResultT:
        """What `work` returns, once what it wrote is durable; nothing of it is written when it raises.

        While the database cannot be used, it is tried again for `patience_s` seconds (None: until `give_up`); so `work`
        may run again even after it was committed, when the connection was lost before that was known. A caller that is
        cancelled meanwhile does not know whether it was written. Raises DatabaseUnavailable.
        """
        return await self._carry_out(self._write, work, patience_s)

    async def read(self, work: Callable[[sa.Connection], ResultT]) -> ResultT:
        """What `work` returns; it only reads, and is not held up by who writes. Raises DatabaseUnavailable."""
        return await self._carry_out(self._read, work, PATIENCE_SECONDS)

    async def _carry_out(
        self,
        run: Callable[[Callable[[sa.Connection], ResultT]], ResultT],
        work: Callable[[sa.Connection], ResultT],
        patience_s: float | None,
    ) -> ResultT:
        loop = asyncio.get_running_loop()
        deadline = None if patience_s is None else loop.time() + patience_s
        ticket = object()
        try:
            while True:
                try:
                    result = await loop.run_in_executor(self._thread, run, work)
                    self._had_it = True
                    return result
                except Exception as error:
                    reason = self._reason(error)
                    if reason is None:
                        raise
                    if ticket not in self._troubled:
                        logger.error("the database cannot be used and is tried again: %s (%s)", reason, error)
                    self._troubled[ticket] = reason
                    is_late = deadline is not None and (loop.time() >= deadline or isinstance(error, FileReplaced))
                    if self._giving_up.is_set() or is_late:  # nobody mends a file while a request waits
                        raise DatabaseUnavailable(reason) from error
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._giving_up.wait(), RETRY_SECONDS)
        finally:
            self._troubled.pop(ticket, None)

    def _reason(self, error: Exception) -> str | None:
        """Why the database cannot be used now; None when that is no matter of time."""
        if self._had_it and isinstance(error, DatabaseInUse):
            return (
                "another session has it; as a rule that is our own last one, until the database server notices that "
                "its connection is lost"
            )
        return str(error) if isinstance(error, FileReplaced) else trouble(error, self._file)

    @property
    def trouble(self) -> str | None:
        """Why a transaction waits to be tried again, or the next one would; None while none does."""
        return next(iter(self._troubled.values()), self._open_file and self._open_file.trouble)

    async def look(self) -> None:
        """Notice what has been done to the file, as the next transaction would."""
        if self._open_file:
            with contextlib.suppress(FileReplaced):
                await asyncio.get_running_loop().run_in_executor(self._thread, self._open_file.check)

    def _write(self, work: Callable[[sa.Connection], ResultT]) -> ResultT:
        if self._open_file:
            self._open_file.check()
        with self._engine.begin() as connection:
            return work(connection)

    def _read(self, work: Callable[[sa.Connection], ResultT]) -> ResultT:
        with self._engine.connect().execution_options(**{READS: True}) as connection, connection.begin():
            return work(connection)

    def give_up(self) -> None:
        """From now on each transaction is tried once: the server ends."""
        self._giving_up.set()

    async def close(self) -> None:
        """Finish what was begun and close the database."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.dispose)
        self._thread.shutdown()
        if self._claim:
            self._claim.close()


def _claim(engine: sa.Engine, path: Path | None) -> IO[str] | None:
    """Have the database alone for as long as this process uses it: by a lock on a file beside it, or in PostgreSQL."""
    if path is None:
        event.listen(engine, "connect", _claim_connection)
        return None
    lock = path.with_suffix(".in-use").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise DatabaseInUse(f"another server uses the database {path}") from None
    return lock


def _claim_connection(connection: DBAPIConnection, record: object) -> None:
    cursor = connection.cursor()
    try:  # waits a moment (lock_timeout): the connection of a server that was killed ends when its query has
        cursor.execute(f"SELECT pg_advisory_lock({_IN_USE})")
        connection.commit()
    except Exception as error:
        connection.close()
        if getattr(error, "sqlstate", None) == "55P03":
            raise DatabaseInUse("another server uses this database") from None
        raise
