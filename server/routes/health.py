"""GET /health: answers from memory, whatever else goes on."""

from __future__ import annotations

from litestar import get
from litestar.di import NamedDependency

from gpu_pool.pool import Pool
from server import views
from server.errors import problems
from server.responses import Health


@get("/health", tags=["server"], responses=problems(400))
async def get_health(pool: NamedDependency[Pool]) -> Health:
    """Whether the server answers, and can do its work."""
    return views.health(pool)
