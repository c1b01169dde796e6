"""The application: routes, errors, documentation, and the pool whose life is the application's lifespan."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from litestar import Litestar, Router
from litestar.di import Provide
from litestar.exceptions import HTTPException

from gpu_pool.pool import Pool
from server.errors import problem_response
from server.openapi import openapi_config, openapi_json, static_files
from server.routes import cache, catalog, evaluate, gpus, health, jobs, merge, queue
from server.settings import Settings
from server.strict_json import StrictRequest, refuse_unknown_parameters

HANDLERS = [
    evaluate.evaluate,
    jobs.list_jobs,
    jobs.get_job,
    jobs.cancel_job,
    jobs.get_events,
    jobs.get_samples,
    jobs.get_log,
    queue.get_queue,
    health.get_health,
    catalog.list_tasks,
    catalog.list_models,
    gpus.list_gpus,
    gpus.release_gpu,
    gpus.list_workers,
    merge.merge,
    cache.get_cache,
    cache.prune_cache,
]


def create_app(settings: Settings, pool: Pool | None = None) -> Litestar:
    """The REST face over `pool` (by default a new one), which starts and stops with the application."""
    pool = pool or Pool(settings.pool)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncGenerator[None, None]:
        await pool.start()
        try:
            yield
        finally:
            await pool.stop()

    def provide_pool() -> Pool:
        return pool

    def provide_settings() -> Settings:
        return settings

    return Litestar(
        route_handlers=[
            Router("/", route_handlers=HANDLERS, before_request=refuse_unknown_parameters),
            openapi_json,
            static_files,
        ],
        dependencies={
            "pool": Provide(provide_pool, sync_to_thread=False),
            "settings": Provide(provide_settings, sync_to_thread=False),
        },
        exception_handlers={HTTPException: problem_response, Exception: problem_response},
        request_class=StrictRequest,
        request_max_body_size=settings.max_body_bytes,
        openapi_config=openapi_config(),
        lifespan=[lifespan],
        logging_config=None,
    )
