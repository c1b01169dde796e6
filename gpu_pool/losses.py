"""Attempts that were lost with their processes, and when a job has lost too many. Pure.

A process that ends by itself may do so because of its job, and will then do it again: few such attempts are enough.
One that somebody kills says nothing of its job, so many are allowed. Both are counted anew when the job got further
than ever: a job that kills its processes never gets past the place where it does.
"""

from __future__ import annotations

import msgspec

from gpu_pool.records import Record

MOST_KILLS = 30
"""Attempts in a row that others may end by a kill. A job that somehow brings that about itself must end, too."""


class Losses(Record, frozen=True, kw_only=True):
    """What is known of a job's lost attempts. Those that ended with the server are not among them."""

    attempts: int = 0
    """All of them."""
    faults: int = 0
    """Of those since the job last got further than ever: whose processes ended by themselves."""
    kills: int = 0
    """And those whose processes somebody killed."""
    done: int = 0
    """Most requests that were done in any attempt."""

    def and_another(self, *, done: int, from_outside: bool) -> Losses:
        """With one more attempt, which had so many requests done when its processes ended."""
        got_further = done > self.done
        faults, kills = (0, 0) if got_further else (self.faults, self.kills)
        return msgspec.structs.replace(
            self,
            attempts=self.attempts + 1,
            faults=faults + (not from_outside),
            kills=kills + from_outside,
            done=max(done, self.done),
        )

    def are_too_many(self, *, max_attempts: int, max_retries: int | None) -> bool:
        """Whether the job has failed: by its own limit, which counts each loss, or else by the operator's."""
        if max_retries is not None:
            return self.attempts > max_retries
        return self.faults >= max_attempts or self.kills >= MOST_KILLS

    @property
    def times(self) -> str:
        """How often, in words."""
        return "once" if self.attempts == 1 else f"{self.attempts} times"
