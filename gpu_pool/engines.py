"""The two databases: SQLite in a file and PostgreSQL by URL, made alike: how to connect, and what an error means."""

from __future__ import annotations

import importlib.util
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError

from gpu_pool.errors import PoolError
from gpu_pool.file_lock import alone

LOCK_WAIT_MS = 1000
"""One try waits so long for what another process holds (a backup, a person with a shell); then others have a turn."""
CONNECT_WAIT_SECONDS = 5
_KEEPALIVE = (15, 5, 3)
"""Seconds of silence before the other end of a connection is asked whether it is there, between two such questions, and
how many go unanswered before it is taken for lost. Otherwise that takes hours."""
READS = "reads"
"""Execution option of a connection that only reads: it needs no write lock."""

_LOCKED = "another process has {file} locked; end what holds it, such as a backup or a shell"
_SQLITE_TROUBLE = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_FULL: "the disk of {folder} is full; make room there",
    sqlite3.SQLITE_IOERR: "the disk of {folder} cannot be read or written; look into the system's log",
    sqlite3.SQLITE_CANTOPEN: "{file} cannot be opened; look whether it is there, and whose it is",
    sqlite3.SQLITE_READONLY: "{file} cannot be written; look whose it is, and how its disk is mounted",
}
_POSTGRES_TROUBLE = {
    "25006": "it takes no writes",  # a standby, or a hosted server whose disk is full
    "53100": "the disk of the database server is full; make room there",
    "55P03": "another process has it locked",
    "57P01": "it was shut down",
    "57P02": "it was shut down",
    "57P03": "it is starting or shutting down",
}


def database_url(database: Path | str) -> sa.URL:
    """The URL of a SQLite file, or the one that is written; raises PoolError for one that cannot be used."""
    if isinstance(database, Path):
        return sa.URL.create("sqlite", database=str(database.absolute()))
    try:
        url = sa.make_url(database)
    except ArgumentError:
        raise PoolError("database: must be a URL such as postgresql://user@host/name") from None
    match url.get_backend_name():
        case "sqlite" if url.database:
            return sa.URL.create("sqlite", database=str(Path(url.database).absolute()))
        case "postgresql":
            if importlib.util.find_spec("psycopg") is None:
                raise PoolError("database: PostgreSQL needs the package psycopg: pip install 'evalpool[postgres]'")
            return url.set(drivername="postgresql+psycopg")
        case _:
            raise PoolError("database: must be postgresql://… or sqlite:///FILE")


def sqlite_file(url: sa.URL) -> Path | None:
    """The file of a SQLite database."""
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def make_engine(url: sa.URL) -> sa.Engine:
    """An engine with one connection. Nothing is opened yet."""
    if path := sqlite_file(url):
        return _sqlite_engine(url, path)
    return _engine(url.set(query=_postgres_parameters() | url.query))


def _postgres_parameters() -> dict[str, str]:
    """Of a connection, for libpq: both ends notice within half a minute that the other is gone, whatever is between."""
    idle, interval, count = _KEEPALIVE
    both = {"keepalives_idle": idle, "keepalives_interval": interval, "keepalives_count": count}
    theirs = {"lock_timeout": LOCK_WAIT_MS} | {f"tcp_{name}": value for name, value in both.items()}
    ours = {"connect_timeout": CONNECT_WAIT_SECONDS, "tcp_user_timeout": 1000 * (idle + interval * count)} | both
    options = " ".join(f"-c {name}={value}" for name, value in theirs.items())
    return {"options": options} | {name: str(value) for name, value in ours.items()}


def trouble(error: BaseException, file: Path | None) -> str | None:
    """Why the database cannot be used now and what helps; None when the error is no such trouble but a mistake.

    `file` is that of a SQLite database.
    """
    original = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(original, sqlite3.Error):
        code: int = getattr(original, "sqlite_errorcode", 0) & 0xFF  # the lower byte is the primary code
        what = _SQLITE_TROUBLE.get(code)
        return what and what.format(file=file, folder=file and file.parent)
    if type(original).__module__.partition(".")[0] != "psycopg":
        return None
    state: str | None = getattr(original, "sqlstate", None)
    operational = "OperationalError" in {base.__name__ for base in type(original).__mro__}
    if state in _POSTGRES_TROUBLE or operational or (isinstance(error, DBAPIError) and error.connection_invalidated):
        first_line = str(original).strip().partition("\n")[0]
        return _POSTGRES_TROUBLE.get(state or "", first_line or "the connection was lost")
    return None


def _engine(url: sa.URL) -> sa.Engine:
    return sa.create_engine(
        url,
        pool_size=1,
        max_overflow=0,
        json_serializer=lambda value: msgspec.json.encode(value).decode(),  # pyright: ignore[reportUnknownLambdaType]
        json_deserializer=msgspec.json.decode,
    )


def _sqlite_engine(url: sa.URL, path: Path) -> sa.Engine:
    engine = _engine(url)

    def configure(connection: DBAPIConnection, record: object) -> None:
        connection.isolation_level = None  # the driver's own BEGIN would leave DDL outside the transaction
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {LOCK_WAIT_MS}")
        with alone(path):  # SQLite does not wait for its turn to change the journal of a new file
            cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")  # NORMAL may lose the last commits with the power
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    event.listen(engine, "connect", configure)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _begin_sqlite(connection: sa.Connection) -> None:
    options: Any = connection.get_execution_options()
    connection.exec_driver_sql("BEGIN" if options.get(READS) else "BEGIN IMMEDIATE")
