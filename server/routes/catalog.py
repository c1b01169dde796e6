"""What may be asked for: tasks and models."""

from __future__ import annotations

from typing import Annotated

from litestar import get
from litestar.di import NamedDependency
from litestar.params import QueryParameter

from gpu_pool.pool import Pool
from server import views
from server.errors import problems
from server.responses import ModelList, TaskList


@get("/tasks", tags=["catalogue"], responses=problems(400))
async def list_tasks(
    pool: NamedDependency[Pool],
    details: Annotated[bool, QueryParameter(description="Say also what each name is")] = False,
) -> TaskList:
    """Names that `tasks` may contain."""
    return views.task_list(await pool.catalogue(), details)


@get("/models", tags=["catalogue"], responses=problems(400))
async def list_models(
    pool: NamedDependency[Pool],
    details: Annotated[bool, QueryParameter(description="Say also what each name is here")] = False,
) -> ModelList:
    """Kinds that `model` may name; it may also be a path or a hub id."""
    return views.model_list(pool.settings.endpoints, details)
