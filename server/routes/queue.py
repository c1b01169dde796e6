"""GET /queue."""

from __future__ import annotations

from typing import Annotated

from litestar import get
from litestar.di import NamedDependency
from litestar.params import QueryParameter

from gpu_pool.pool import Pool
from gpu_pool.reasons import MOST_EXPLAINED
from server import views
from server.errors import problems
from server.responses import QueueInfo


@get("/queue", tags=["server"], responses=problems(400))
async def get_queue(
    pool: NamedDependency[Pool],
    explain: Annotated[
        int,
        QueryParameter(ge=0, le=MOST_EXPLAINED, description="Of how many waiting jobs to give reasons"),
    ] = 100,
) -> QueueInfo:
    """What waits, runs and is done; for the first waiting jobs also why they wait, and when they may start."""
    return views.queue_info(pool.queue(), pool.waiting(explain))
