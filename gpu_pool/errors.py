"""What can go wrong, as the user reads it: an exception's docstring is its message."""

from __future__ import annotations

import errno
from collections.abc import Sequence

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors that go by themselves once somebody has made room."""


class PoolError(Exception):
    """Something went wrong in the pool."""

    def __str__(self) -> str:
        return super().__str__() or (self.__doc__ or "").strip()


class InvalidRequest(PoolError):
    """A field of the request cannot be honoured."""

    def __init__(self, field: str, problem: str, *, choices: Sequence[str] = ()) -> None:
        """`field` is the path in the request ("tasks[0]", "model_args.dtype"); `problem` says what would be right."""
        self.field = field
        self.problem = problem
        self.choices = tuple(choices)
        super().__init__(f"{field}: {problem}")


class KeyReused(InvalidRequest):
    """An idempotency key is used again with another request."""

    def __init__(self, job_id: str) -> None:
        super().__init__(
            "idempotency_key",
            f"was used before with another request, of job {job_id}; choose another key, or send the same request",
        )


class JobNotFound(PoolError):
    """There is no such job."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(f"Job {job_id} not found")


class JobAlreadyFinished(PoolError):
    """Job already finished or cancelled"""


class NoSuchSamples(PoolError):
    """The job has no samples of that task."""


class ShuttingDown(PoolError):
    """The server is shutting down; submit again when it is back."""


class DataDirInUse(PoolError):
    """Another server uses this data folder."""


class DatabaseInUse(PoolError):
    """Another server uses this database."""


class DatabaseTooNew(PoolError):
    """The database's tables were changed by a newer evalpool."""

    def __init__(self, current: str | None, newest: str) -> None:
        super().__init__(
            f"the database was changed by a newer evalpool: its tables are at revision {current}, and this version "
            f"knows them up to {newest}. Run the newer version, or restore a copy of the database from before"
        )


class DatabaseUnavailable(PoolError):
    """The database cannot be used now."""

    def __init__(self, reason: str, outcome: str = "Nothing was changed; try again later") -> None:
        self.reason = reason
        super().__init__(f"The job database cannot be used now: {reason}. {outcome}")


class GpuNotFound(PoolError):
    """There is no such GPU."""

    def __init__(self, uuid: str, known: Sequence[str]) -> None:
        super().__init__(f"There is no GPU {uuid}; there are {', '.join(known) or 'none'}")


class GpuNotQuarantined(PoolError):
    """The GPU is not quarantined: there is nothing to release."""
