"""Pages of jobs, newest first: which ids are on one. Each is a walk along an index, however many there are."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa

from gpu_pool.errors import InvalidRequest
from gpu_pool.records import JobState
from gpu_pool.tables import job_tags, jobs

_SEQUENCE = sa.select(jobs.c.sequence).where(jobs.c.id == sa.bindparam("job"))


def page_of_ids(
    connection: sa.Connection,
    states: Collection[JobState] | None,
    tags: Sequence[str],
    limit: int,
    before: str | None,
) -> list[str]:
    """At most `limit` ids of jobs in any of the states (None: all) with all of the tags, older than `before`.

    Raises InvalidRequest when there is no job `before`.
    """
    values: dict[str, Any] = {"most": limit} | {f"tag_{number}": tag for number, tag in enumerate(tags)}
    if before is not None:
        values["before"] = connection.scalar(_SEQUENCE, {"job": before})
        if values["before"] is None:
            raise InvalidRequest("cursor", f"must be the id of a job that exists; there is no job {before}")
    page = _page(older=before is not None, in_state=states is not None, tags=len(tags))
    if states is None:
        return [row.id for row in connection.execute(page, values)]
    # One indexed query a state: for `state IN (…)` databases sort every match before they cut.
    rows = [row for state in set(states) for row in connection.execute(page, {**values, "state": state})]
    return [row.id for row in sorted(rows, key=lambda row: row.sequence, reverse=True)[:limit]]


@functools.cache
def _page(*, older: bool, in_state: bool, tags: int) -> sa.Select[Any, Any]:
    """Sequence and id of jobs with :tag_0, :tag_1, …: those older than the sequence :before, those in :state, or all.

    With tags the walk is along those of the first. Statements are made once: SQLAlchemy takes longer to make one than
    SQLite to run it.
    """
    named = [job_tags.alias(f"tag_{number}") for number in range(tags)]
    sequence = named[0].c.sequence if named else jobs.c.sequence
    page = sa.select(jobs.c.sequence, jobs.c.id).order_by(sequence.desc()).limit(sa.bindparam("most", type_=sa.Integer))
    for number, table in enumerate(named):
        page = page.where(table.c.tag == sa.bindparam(f"tag_{number}"), jobs.c.sequence == table.c.sequence)
    if older:
        page = page.where(sequence < sa.bindparam("before"))
    return page.where(jobs.c.state == sa.bindparam("state")) if in_state else page
