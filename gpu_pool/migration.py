"""Whether the database's tables are those that this code knows, and the steps that make them so."""

from __future__ import annotations

import logging

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from gpu_pool.errors import DatabaseTooNew
from gpu_pool.records import Record

_MIGRATION_LOCK = 0x65766C6D
"""Key of the PostgreSQL advisory lock under which tables are changed; SQLite has one writer anyway."""

logger = logging.getLogger(__name__)


class Standing(Record, frozen=True, kw_only=True):
    """The revision of a database's tables (None: it has none yet) beside the newest that this code knows."""

    current: str | None
    newest: str
    known: bool

    @property
    def is_current(self) -> bool:
        return self.current == self.newest


def standing(connection: sa.Connection) -> Standing:
    """How the database stands; changes nothing."""
    current = MigrationContext.configure(connection).get_current_revision()
    revisions = [script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()]
    return Standing(current=current, newest=revisions[0], known=current is None or current in revisions)


def upgrade(connection: sa.Connection) -> Standing:
    """Bring the tables up to date within the connection's transaction; returns how they stood before.

    Raises DatabaseTooNew when a newer evalpool has changed them.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
    before = standing(connection)
    if not before.known:
        raise DatabaseTooNew(before.current, before.newest)
    if not before.is_current:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        logger.info("the database's tables are upgraded from %s to %s", before.current or "nothing", before.newest)
    return before


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "gpu_pool:migrations")
    return config
