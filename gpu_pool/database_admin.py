"""What an operator does with the database: look whether its tables are up to date, and bring them there."""

from __future__ import annotations

from pathlib import Path

from gpu_pool.database import Database
from gpu_pool.engines import database_url, sqlite_file
from gpu_pool.migration import Standing, standing, upgrade
from gpu_pool.settings import PoolSettings


def database_of(settings: PoolSettings) -> Path | str:
    """Where the jobs are kept: a SQLite file in the data folder unless the operator names another database."""
    return settings.database or settings.data_dir.absolute() / "jobs.sqlite"


async def check_database(settings: PoolSettings) -> tuple[str, bool]:
    """How the tables stand in a sentence, and whether they are up to date; changes nothing, a server may run.

    Raises DatabaseUnavailable, and PoolError for what is no usable database.
    """
    url = database_url(database_of(settings))
    path = sqlite_file(url)
    if path and not path.exists():
        return f"{url}: there is no database yet; `evalpool serve` or `evalpool db upgrade` makes it", False
    database = await Database.open(database_of(settings), migrate=False)
    try:
        found = await database.read(standing)
    finally:
        await database.close()
    return f"{url}: {_in_words(found)}", found.is_current


async def upgrade_database(settings: PoolSettings) -> str:
    """Bring the tables up to date; a sentence that says what was done.

    Raises DatabaseInUse while a server runs, DatabaseTooNew, DatabaseUnavailable, and PoolError.
    """
    database = await Database.open(database_of(settings), alone=True, migrate=False)
    try:
        before = await database.transaction(upgrade)
    finally:
        await database.close()
    if before.is_current:
        return f"The tables are up to date already (revision {before.newest})"
    return f"The tables are upgraded from {before.current or 'nothing'} to revision {before.newest}"


def _in_words(found: Standing) -> str:
    if found.is_current:
        return f"the tables are up to date (revision {found.newest})"
    if not found.known:
        return (
            f"the tables are at revision {found.current}, which a newer evalpool made; "
            f"this version knows them up to {found.newest}"
        )
    if found.current is None:
        return "the database has no tables yet; `evalpool serve` or `evalpool db upgrade` makes them"
    return (
        f"the tables are at revision {found.current}; `evalpool db upgrade` or the next start of the server brings "
        f"them to {found.newest}"
    )
