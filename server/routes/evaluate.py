"""POST /evaluate."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import post
from litestar.di import NamedDependency
from litestar.enums import RequestEncodingType
from litestar.openapi.spec import Example
from litestar.params import BodyKwarg

from gpu_pool.pool import Pool
from server import views
from server.errors import problems
from server.requests import EvaluateRequest
from server.responses import JobSubmitted
from server.validation import to_evaluation

_EXAMPLES = [
    Example(
        summary="Two tasks on a hub model",
        value={
            "model": "hf",
            "model_args": {"pretrained": "HuggingFaceTB/SmolLM2-135M", "dtype": "float32"},
            "tasks": ["arc_easy", "piqa"],
            "limit": 200,
            "batch_size": "auto",
        },
    ),
    Example(
        summary="A checkpoint folder, generation with few-shot examples",
        value={
            "model": "/checkpoints/step-1000",
            "tasks": ["gsm8k"],
            "num_fewshot": 5,
            "gen_kwargs": "temperature=0,max_gen_toks=64",
            "use_cache": False,
        },
    ),
]


@post("/evaluate", status_code=200, tags=["jobs"], responses=problems(400, 409, 413, 415, 422, 503))
async def evaluate(
    data: Annotated[EvaluateRequest, BodyKwarg(media_type=RequestEncodingType.JSON, examples=_EXAMPLES)],
    pool: NamedDependency[Pool],
) -> JobSubmitted:
    """Queue an evaluation; everything that can be refused is refused now."""
    job = await pool.submit(to_evaluation(data), msgspec.to_builtins(data))
    return views.submitted(job, pool.queue_position(job.id))
