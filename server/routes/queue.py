"""GET /queue."""

from __future__ import annotations

from litestar import get

from gpu_pool.pool import Pool
from server import views
from server.schemas import QueueInfo


@get("/queue", tags=["server"])
async def get_queue(pool: Pool) -> QueueInfo:
    """What waits, runs and is done."""
    return views.queue_info(pool.queue())
