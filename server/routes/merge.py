"""POST /merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from litestar import post
from litestar.di import NamedDependency
from litestar.enums import RequestEncodingType
from litestar.openapi.spec import Example
from litestar.params import BodyKwarg

from gpu_pool.merge import merge_checkpoint
from server.errors import problems
from server.requests import MergeRequest
from server.responses import MergeResult
from server.settings import Settings

_EXAMPLES = [Example(summary="In place", value={"checkpoint_path": "/runs/a/checkpoint-1000"})]


@post("/merge", status_code=200, tags=["checkpoints"], responses=problems(400, 404, 413, 415, 422))
async def merge(
    data: Annotated[MergeRequest, BodyKwarg(media_type=RequestEncodingType.JSON, examples=_EXAMPLES)],
    settings: NamedDependency[Settings],
) -> MergeResult:
    """Merge a sharded FSDP checkpoint into one that can be evaluated; answers when it is done."""
    output = Path(data.output_path) if data.output_path else None
    roots = (settings.pool.data_dir, *settings.pool.output_roots)
    merged = await merge_checkpoint(Path(data.checkpoint_path), output, data.checkpoint_type, roots)
    return MergeResult(success=True, message="Checkpoint merged successfully", merged_path=str(merged))
