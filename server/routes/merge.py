"""POST /merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from litestar import Response, post
from litestar.di import NamedDependency
from litestar.enums import RequestEncodingType
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import BodyKwarg, HeaderParameter

from gpu_pool.merges import merged_path
from gpu_pool.pool import Pool
from server import views
from server.errors import problems
from server.requests import MergeRequest
from server.responses import JobSubmitted, MergeResult
from server.validation import distinct

RESPOND_ASYNC = "respond-async"
"""The preference of RFC 7240, section 4.1."""

_EXAMPLES = [
    Example(summary="In place", value={"checkpoint_path": "/runs/a/checkpoint-1000"}),
    Example(
        summary="The averaged weights, elsewhere",
        value={
            "checkpoint_path": "/runs/a/checkpoint-1000",
            "output_path": "/runs/a/checkpoint-1000/averaged",
            "checkpoint_type": "ema",
        },
    ),
]
_SUBMITTED = ResponseSpec(
    JobSubmitted,
    description="The merge is queued: it was asked for with `Prefer: respond-async`",
    generate_examples=False,
)


@post(
    "/merge",
    status_code=200,
    tags=["checkpoints"],
    responses={202: _SUBMITTED, **problems(400, 404, 413, 415, 422, 503)},
)
async def merge(
    data: Annotated[MergeRequest, BodyKwarg(media_type=RequestEncodingType.JSON, examples=_EXAMPLES)],
    pool: NamedDependency[Pool],
    prefer: Annotated[
        str | None,
        HeaderParameter(name="Prefer", description='"respond-async": answer at once, with the job that merges'),
    ] = None,
) -> Response[MergeResult]:
    """Merge a sharded FSDP checkpoint into one that can be evaluated; answers when the job that does it has ended."""
    job = await pool.merge(
        Path(data.checkpoint_path),
        Path(data.output_path) if data.output_path else None,
        data.checkpoint_type,
        msgspec.to_builtins(data),
        max_shard_bytes=data.max_shard_bytes,
        priority=data.priority,
        tags=distinct("tags", data.tags or []),
    )
    if _wants_no_wait(prefer):
        return _accepted(views.submitted(job, pool.queue_position(job.id)))
    path = merged_path(await pool.merged(job.id))
    return Response(MergeResult(success=True, message="Checkpoint merged successfully", merged_path=path))


def _wants_no_wait(prefer: str | None) -> bool:
    return RESPOND_ASYNC in (preference.strip().lower() for preference in (prefer or "").split(","))


def _accepted(submitted: JobSubmitted) -> Response[Any]:
    headers = {"Location": f"/jobs/{submitted.job_id}", "Preference-Applied": RESPOND_ASYNC}
    return Response(submitted, status_code=202, headers=headers)
