"""The database in trouble: locked by another, on a full disk, shut down, in use, too new. Real files, real servers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from databases import connection, execute, make_job, query
from postgres_server import PostgresServer

from gpu_pool import database as database_module
from gpu_pool import store as store_module
from gpu_pool.database import _IN_USE, Database
from gpu_pool.engines import database_url
from gpu_pool.errors import DatabaseInUse, DatabaseTooNew, DatabaseUnavailable, PoolError
from gpu_pool.records import Job, JobState
from gpu_pool.store import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits gives up after the first try, which waits a second for a lock."""
    monkeypatch.setattr(Database.transaction, "__kwdefaults__", {"patience_s": 0.0})
    monkeypatch.setattr(database_module, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(store_module, "PATIENCE_SECONDS", 0.0)


@pytest.fixture
async def store(database: Path | str) -> AsyncIterator[Store]:
    opened = await Store.open(database)
    yield opened
    await opened.close()


@contextlib.contextmanager
def locked(database: Path | str):
    """Another program has the jobs locked for writing."""
    if isinstance(database, Path):
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
    else:
        with connection(database) as other:
            other.execute(sa.text("LOCK TABLE jobs IN SHARE MODE"))
            yield


async def troubled(store: Store, change: asyncio.Task[bool]) -> str:
    """What the store says once `change` waits for it."""
    while store.trouble is None:
        assert not change.done(), "nothing was in the way"
        await asyncio.sleep(0.01)
    return store.trouble


@pytest.mark.usefixtures("impatient")
async def test_a_request_to_a_locked_database_is_refused_and_changes_nothing(
    store: Store, database: Path | str
) -> None:
    await store.add(make_job("1"))
    with locked(database):
        with pytest.raises(DatabaseUnavailable, match=r"another process has .* locked"):
            await store.add(make_job("2"))
        assert (await store.get("1")).id == "1"
        assert [job.id for job in await store.list(None, 5)] == ["1"]
        assert store.trouble is None  # nobody waits any more
    await store.add(make_job("2"))
    assert [job.id for job in await store.list(None, 5)] == ["2", "1"]


async def test_a_change_of_state_outlasts_a_lock(store: Store, database: Path | str) -> None:
    await store.add(make_job("1"))
    with locked(database):
        change = asyncio.create_task(store.change_state("1", JobState.QUEUED, JobState.RUNNING, attempt=1))
        holder = "it locked" if isinstance(database, str) else f"{database} locked; end what holds it"
        assert f"another process has {holder}" in await troubled(store, change)
        assert (await store.get("1")).state is JobState.QUEUED
    assert await change
    assert store.trouble is None
    assert [entry.event for entry in await store.history("1")] == ["submitted", "started"]


async def test_a_change_of_state_ends_with_the_server(store: Store, database: Path | str) -> None:
    await store.add(make_job("1"))
    with locked(database):
        change = asyncio.create_task(store.change_state("1", JobState.QUEUED, JobState.RUNNING))
        await troubled(store, change)
        store.give_up()
        with pytest.raises(DatabaseUnavailable):
            await change
    assert (await store.get("1")).state is JobState.QUEUED


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Unless it is set, the connection breaks after the next commit and before its answer, and this is set."""
    commit = Database._write
    broken = threading.Event()

    def commit_then_break(self: Database, work: object) -> object:
        result = commit(self, work)
        if not broken.is_set():
            broken.set()
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise error
        return result

    broken.set()
    monkeypatch.setattr(Database, "_write", commit_then_break)
    return broken


async def test_a_commit_that_was_lost_sight_of_is_not_taken_for_a_rival(store: Store, broken: threading.Event) -> None:
    """What was written is found when tried again."""
    broken.clear()
    job = make_job("1")
    assert await store.add(job) == job
    broken.clear()
    assert await store.change_state("1", JobState.QUEUED, JobState.RUNNING, attempt=1)
    assert [entry.event for entry in await store.history("1")] == ["submitted", "started"]
    broken.clear()
    assert not await store.change_state("1", JobState.QUEUED, JobState.RUNNING, attempt=2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("asked_again", [False, True])
async def test_a_commit_that_was_lost_sight_of_for_good_is_found_later(
    store: Store, broken: threading.Event, asked_again: bool
) -> None:
    """By itself, or when its key is asked for."""
    late: asyncio.Queue[Job] = asyncio.Queue()
    broken.clear()
    with pytest.raises(DatabaseUnavailable, match="GET /jobs will show"):
        await store.add(job := make_job("1", idempotency_key="k"), late=late.put)
    if asked_again:
        assert await store.by_key("k") == job
        assert late.get_nowait() == job
    else:
        assert await asyncio.wait_for(late.get(), 30) == job
    await store.change_state("1", JobState.QUEUED, JobState.RUNNING)  # after whoever looks for it
    assert late.empty()


@pytest.mark.usefixtures("impatient")
async def test_what_was_never_to_be_committed_is_not_found_later(store: Store, database: Path | str) -> None:
    late: asyncio.Queue[Job] = asyncio.Queue()
    with locked(database), pytest.raises(DatabaseUnavailable, match="Nothing was changed"):
        await store.add(make_job("1"), late=late.put)
    assert await store.list(None, 5) == []
    assert late.empty()


async def test_our_own_lost_session_is_waited_for(postgres: PostgresServer) -> None:
    """The database server may learn hours later that a connection is lost; until then its session has our lock."""
    url = postgres.new_database()
    store = await Store.open(url, alone=True)
    await store.add(make_job("1"))
    with connection(url) as other:
        waits = asyncio.create_task(asyncio.to_thread(other.exec_driver_sql, f"SELECT pg_advisory_lock({_IN_USE})"))
        with connection(url) as operator:
            ours = f"objid = {_IN_USE} AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            while not operator.exec_driver_sql("SELECT 1 FROM pg_locks WHERE NOT granted AND " + ours).all():
                await asyncio.sleep(0.01)
            operator.exec_driver_sql("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE granted AND " + ours)
        await waits
        change = asyncio.create_task(store.change_state("1", JobState.QUEUED, JobState.RUNNING))
        while "our own last one" not in await troubled(store, change):
            await asyncio.sleep(0.01)
    assert await change
    with pytest.raises(DatabaseInUse):
        await Store.open(url, alone=True)
    await store.close()


async def test_a_postgresql_that_restarts_is_waited_for() -> None:
    with PostgresServer.started() as server:
        store = await Store.open(server.new_database())
        await store.add(make_job("1"))
        server.stop()
        change = asyncio.create_task(store.change_state("1", JobState.QUEUED, JobState.RUNNING))
        assert await troubled(store, change)
        server.start()
        assert await change
        assert (await store.get("1")).state is JobState.RUNNING
        await store.close()


async def test_a_postgresql_that_takes_no_writes_for_a_time_is_waited_for() -> None:
    with PostgresServer.started() as server:  # as a standby does, or a hosted one whose disk is full
        url = server.new_database()
        store = await Store.open(url)
        await store.add(make_job("1"))
        configure(url, "SET default_transaction_read_only = on")
        while not await read_only(store):  # a session takes a setting up when it next hears of it
            await asyncio.sleep(0.01)
        change = asyncio.create_task(store.change_state("1", JobState.QUEUED, JobState.RUNNING))
        assert await troubled(store, change) == "it takes no writes"
        assert (await store.get("1")).state is JobState.QUEUED
        configure(url, "RESET default_transaction_read_only")
        assert await change
        await store.close()


async def read_only(store: Store) -> bool:
    """Whether the store's own session would refuse to write."""

    def setting(connection: sa.Connection) -> str:
        return connection.exec_driver_sql("SHOW default_transaction_read_only").scalar_one()

    return await store._database.read(setting) == "on"


def configure(url: str, setting: str) -> None:
    """Change a setting of a PostgreSQL server, for the sessions that there are, too, before long."""
    engine = sa.create_engine(database_url(url), poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as opened:
        opened.exec_driver_sql(f"ALTER SYSTEM {setting}")
        opened.exec_driver_sql("SELECT pg_reload_conf()")


FILLER = """
import asyncio, resource, signal, sys
from pathlib import Path
from gpu_pool.errors import DatabaseUnavailable
from gpu_pool.records import JobState
from gpu_pool.store import Store
sys.path += sys.argv[2:]
from databases import make_job

async def main():
    path = Path(sys.argv[1])
    store = await Store.open(path)
    await store.add(make_job("1"))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.with_name(path.name + "-wal").stat().st_size, whole[1]))
    change = asyncio.create_task(store.change_state("1", JobState.QUEUED, JobState.RUNNING, attempt=1))
    while store.trouble is None:
        await asyncio.sleep(0.01)
    print(store.trouble)
    print((await store.get("1")).state)
    resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    print(await change, store.trouble)
    await store.close()

asyncio.run(main())
"""


def test_a_file_that_cannot_grow_is_waited_for(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILLER, str(tmp_path / "jobs.sqlite"), *sys.path]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    trouble, state, end = ran.stdout.splitlines()
    assert re.search(f"(the disk of {tmp_path} is full; make room there)|(the disk of {tmp_path} cannot be)", trouble)
    assert (state, end) == ("queued", "True None")
    assert query(tmp_path / "jobs.sqlite", "SELECT state FROM jobs") == [("running",)]


async def test_a_newer_database_is_refused_as_it_is(store: Store, database: Path | str) -> None:
    execute(database, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(DatabaseTooNew, match="revision 9999"):
        await Store.open(database)
    assert query(database, "SELECT version_num FROM alembic_version") == [("9999",)]


async def test_one_server_a_database(database: Path | str) -> None:
    first = await Store.open(database, alone=True)
    with pytest.raises(DatabaseInUse):
        await Store.open(database, alone=True)
    await (await Store.open(database)).close()  # who only looks may
    await first.close()
    await (await Store.open(database, alone=True)).close()


HOLDER = """
import asyncio, sys
from pathlib import Path
from gpu_pool.store import Store

async def main():
    store = await Store.open(sys.argv[1] if "://" in sys.argv[1] else Path(sys.argv[1]), alone=True)
    print("open", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_killed_server_leaves_the_database_to_the_next(database: Path | str) -> None:
    command = [sys.executable, "-c", HOLDER, str(database)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        os.kill(holder.pid, signal.SIGKILL)
    await (await Store.open(database, alone=True)).close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("jobs.sqlite", "must be a URL"),
        ("mysql://root@localhost/x", "must be postgresql"),
        ("sqlite://", "must be postgresql"),
    ],
)
def test_what_is_no_database_of_ours_is_refused(url: str, said: str) -> None:
    with pytest.raises(PoolError, match=f"^database: {said}"):
        database_url(url)


def test_urls_of_both_kinds(tmp_path: Path) -> None:
    assert database_url(f"sqlite:///{tmp_path}/x.db") == database_url(tmp_path / "x.db")
    assert database_url("postgresql://u@h/n").drivername == "postgresql+psycopg"


async def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_text("once upon a time\n" * 1000)
    with pytest.raises(PoolError, match="not a database"):
        await Store.open(tmp_path / "jobs.sqlite")


@pytest.mark.usefixtures("impatient")
async def test_a_server_that_is_not_there_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnavailable) as caught:
        await Store.open(f"postgresql://me:secret@/name?host={tmp_path}")
    assert "secret" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
