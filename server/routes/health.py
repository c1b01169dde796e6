"""GET /health: answers from memory, whatever else goes on."""

from __future__ import annotations

from litestar import get

from gpu_pool.pool import Pool
from server import views
from server.schemas import Health


@get("/health", tags=["server"])
async def get_health(pool: Pool) -> Health:
    """Whether the server answers."""
    return views.health(pool.queue())
