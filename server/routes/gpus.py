"""The box: GPUs and worker processes."""

from __future__ import annotations

from litestar import get
from litestar.di import NamedDependency

from gpu_pool.pool import Pool
from server import views
from server.errors import problems
from server.schemas import GpuList, WorkerList


@get("/gpus", tags=["server"], responses=problems(400))
async def list_gpus(pool: NamedDependency[Pool]) -> GpuList:
    """Every GPU, who holds it, and why it is not free if it is not."""
    return views.gpu_list(await pool.gpus())


@get("/workers", tags=["server"], responses=problems(400))
async def list_workers(pool: NamedDependency[Pool]) -> WorkerList:
    """Every worker process and the model it holds."""
    return views.worker_list(pool.workers())
