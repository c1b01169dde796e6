"""The box: GPUs and worker processes."""

from __future__ import annotations

from litestar import get, post
from litestar.di import NamedDependency
from litestar.params import FromPath

from gpu_pool.pool import Pool
from server import views
from server.box_responses import GpuInfo, GpuList, WorkerList
from server.errors import problems


@get("/gpus", tags=["server"], responses=problems(400))
async def list_gpus(pool: NamedDependency[Pool]) -> GpuList:
    """Every GPU, who is on it, and why it is not free if it is not."""
    return views.gpu_list(await pool.gpus(), pool)


@post("/gpus/{uuid:str}/release", status_code=200, tags=["server"], responses=problems(400, 404, 409))
async def release_gpu(uuid: FromPath[str], pool: NamedDependency[Pool]) -> GpuInfo:
    """Let a GPU be used again that was quarantined, or whose memory had errors; it must still be free by NVML."""
    return views.gpu_info(await pool.release_gpu(uuid))


@get("/workers", tags=["server"], responses=problems(400))
async def list_workers(pool: NamedDependency[Pool]) -> WorkerList:
    """Every worker process and the model it holds."""
    return views.worker_list(pool.workers())
