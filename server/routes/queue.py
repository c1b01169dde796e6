"""GET /queue."""

from __future__ import annotations

from litestar import get
from litestar.di import NamedDependency

from gpu_pool.pool import Pool
from server import views
from server.errors import problems
from server.schemas import QueueInfo


@get("/queue", tags=["server"], responses=problems(400))
async def get_queue(pool: NamedDependency[Pool]) -> QueueInfo:
    """What waits, runs and is done."""
    return views.queue_info(pool.queue())
