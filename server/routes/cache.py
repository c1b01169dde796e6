"""The response cache: what is in it, and pruning it."""

from __future__ import annotations

from typing import Annotated

from litestar import get, post
from litestar.di import NamedDependency
from litestar.enums import RequestEncodingType
from litestar.openapi.spec import Example
from litestar.params import BodyKwarg

from gpu_pool.pool import Pool
from server import views
from server.box_responses import CacheInfo, CachePruned
from server.errors import problems
from server.requests import PruneRequest

_EXAMPLES = [Example(summary="Not used for a month", value={"older_than_days": 30})]


@get("/cache", tags=["server"], responses=problems(400, 503))
async def get_cache(pool: NamedDependency[Pool]) -> CacheInfo:
    """How much the response cache holds, of which models, and how often it was of use."""
    return views.cache_info(await pool.cache_use())


@post("/cache/prune", status_code=200, tags=["server"], responses=problems(400, 413, 415, 422, 503))
async def prune_cache(
    data: Annotated[PruneRequest, BodyKwarg(media_type=RequestEncodingType.JSON, examples=_EXAMPLES)],
    pool: NamedDependency[Pool],
) -> CachePruned:
    """Delete answers that were not used for a while, or a model's; with neither, what is above the size limit."""
    pruned = await pool.prune_cache(data.older_than_days, data.model)
    return CachePruned(deleted_entries=pruned.entries, freed_bytes=pruned.freed_bytes)
