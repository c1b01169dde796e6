"""The file of a SQLite database and whether it still is the one that its path names.

Deleted or replaced under a server it takes everything that is written, and nobody finds that again. So it is compared
before each transaction, which costs some microseconds, and saved as soon as it is found to be another.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection

from gpu_pool.errors import PoolError
from gpu_pool.file_identity import file_identity

logger = logging.getLogger(__name__)


class FileReplaced(PoolError):
    """The database's file was deleted or replaced."""


class OpenFile:
    """What one engine has open. `check` it in the thread that uses the engine, while it uses no connection."""

    def __init__(self, path: Path, engine: sa.Engine) -> None:
        self._path = path
        self._engine = engine
        self._opened: tuple[int, int] | None = None
        """Device and inode of what was opened first; None before."""
        self.trouble: str | None = None
        """What is wrong and what helps, as `check` has found it last."""
        event.listen(engine, "connect", self._note)

    def check(self) -> None:
        """Raises FileReplaced."""
        if self._opened is None or self._opened == file_identity(self._path):
            self.trouble = None
            return
        if self.trouble is None:
            self.trouble = self._describe(self._save())
            logger.error("%s", self.trouble)
        raise FileReplaced(self.trouble)

    def _note(self, connection: DBAPIConnection, record: object) -> None:
        self._opened = self._opened or file_identity(self._path)

    def _save(self) -> Path | None:
        """Write what is open to a file beside the path; None where that fails."""
        copy = self._path.with_name(f"{self._path.name}.saved-{time.strftime('%Y%m%d-%H%M%S')}")
        connection = self._engine.raw_connection()
        try:
            connection.cursor().execute("VACUUM INTO ?", (str(copy),))
        except sqlite3.Error:
            logger.exception("the content of %s cannot be saved", self._path)
            return None
        finally:
            connection.close()
        return copy

    def _describe(self, copy: Path | None) -> str:
        what = f"{self._path} was deleted or replaced while the server has it open; put it back"
        if copy is None:
            return f"{what}, or its jobs are lost when the server ends"
        return (
            f"{what}, or stop the server, move {copy}, which has all its jobs, to {self._path}, remove "
            f"{self._path.name}-wal if it is there, and start the server again"
        )
