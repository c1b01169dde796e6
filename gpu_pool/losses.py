"""Processes that were lost under a job, and when it has lost too many. Pure: time is an argument.

A process that ends by itself may do so because of its job, and will then do it again: few such attempts are enough.
One that somebody kills says nothing of its job, however often that happens: they are judged by time. Both are counted
anew when the job got further than ever: a job that kills its processes never gets past the place where it does.
"""

from __future__ import annotations

import msgspec

from gpu_pool.records import Record

MOST_KILLS = 30
"""Processes in a row that others may kill in any time."""
KILLS_SECONDS = 3600.0
"""How long it may go on beyond that: a job that somehow brings it about itself must end, too."""
PATIENT_KILLS = 20
"""From so many in a row on, what is started next waits, longer each time: more than it takes to find a request that
kills its worker in this way."""
MAX_REST_SECONDS = 30.0


class Kills(Record, frozen=True, kw_only=True):
    """Processes of a job that somebody killed, one after the other, without any progress in between."""

    count: int = 0
    since: float = 0.0
    """When the first one was killed, in monotonic seconds."""

    def and_another(self, now: float) -> Kills:
        """With one that was killed now."""
        return Kills(count=self.count + 1, since=self.since if self.count else now)

    def are_too_many(self, now: float) -> bool:
        """Whether it can no longer be taken for somebody's work that will end."""
        return self.count >= MOST_KILLS and now - self.since >= KILLS_SECONDS

    @property
    def rest_s(self) -> float:
        """How long what was taken from the job is to rest before it is used again."""
        doublings = self.count - PATIENT_KILLS
        return 0.0 if doublings < 0 else min(MAX_REST_SECONDS, 2.0 ** min(doublings, 10))


class Losses(Record, frozen=True, kw_only=True):
    """What is known of a job's lost attempts. Those that ended with the server are not among them."""

    attempts: int = 0
    """All of them."""
    faults: int = 0
    """Of those since the job last got further than ever: whose processes ended by themselves."""
    kills: Kills = Kills()
    """And those whose processes somebody killed."""
    done: int = 0
    """Most requests that were done in any attempt."""

    def and_another(self, *, done: int, from_outside: bool, now: float) -> Losses:
        """With one more attempt, which had so many requests done when its processes ended, now."""
        got_further = done > self.done
        faults, kills = (0, Kills()) if got_further else (self.faults, self.kills)
        return msgspec.structs.replace(
            self,
            attempts=self.attempts + 1,
            faults=faults + (not from_outside),
            kills=kills.and_another(now) if from_outside else kills,
            done=max(done, self.done),
        )

    def are_too_many(self, *, max_attempts: int, max_retries: int | None, now: float) -> bool:
        """Whether the job has failed: by its own limit, which counts each loss, or else by the operator's."""
        if max_retries is not None:
            return self.attempts > max_retries
        return self.faults >= max_attempts or self.kills.are_too_many(now)

    @property
    def times(self) -> str:
        """How often, in words."""
        return "once" if self.attempts == 1 else f"{self.attempts} times"
