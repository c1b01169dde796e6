"""What can go wrong, as the user reads it: an exception's docstring is its message."""

from __future__ import annotations

from collections.abc import Sequence


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
