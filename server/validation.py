"""From a request body to the pool's Evaluation: the checks that need no model, task or device."""

from __future__ import annotations

from typing import Any, Literal

from gpu_pool.errors import InvalidRequest
from gpu_pool.gen_kwargs import parse_gen_kwargs
from gpu_pool.records import Evaluation
from server.requests import MOST_DOCUMENTS, EvaluateRequest
from server.strict_json import check_storable


def to_evaluation(request: EvaluateRequest) -> Evaluation:
    """The request with its shorthands resolved. Raises InvalidRequest naming the field."""
    return Evaluation(
        model=request.model,
        tasks=distinct("tasks", request.tasks),
        model_args=request.model_args or {},
        num_fewshot=request.num_fewshot,
        batch_size=_batch_size(request.batch_size),
        device=request.device,
        limit=_limit(request.limit),
        gen_kwargs=_gen_kwargs(request.gen_kwargs),
        log_samples=request.log_samples,
        predict_only=request.predict_only,
        num_gpus=request.num_gpus,
        merge=request.merge,
        output_dir=request.output_dir,
        use_cache=request.use_cache,
        deterministic=request.deterministic,
        apply_chat_template=request.apply_chat_template,
        system_instruction=request.system_instruction,
        fewshot_as_multiturn=request.fewshot_as_multiturn,
        random_seed=request.random_seed,
        numpy_random_seed=request.numpy_random_seed,
        torch_random_seed=request.torch_random_seed,
        fewshot_random_seed=request.fewshot_random_seed,
        bootstrap_iters=request.bootstrap_iters,
        priority=request.priority,
        timeout_s=request.timeout_s,
        max_retries=request.max_retries,
        max_error_share=request.max_error_share,
        tags=distinct("tags", request.tags or []),
        idempotency_key=request.idempotency_key,
    )


def distinct(field: str, names: list[str]) -> tuple[str, ...]:
    """The names; raises InvalidRequest for one that is there twice."""
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(f"{field}[{index}]", f'"{name}" is named twice; name each once')
    return tuple(names)


def _batch_size(value: int | str | None) -> int | Literal["auto"]:
    return "auto" if value is None or value == "auto" else int(value)


def _gen_kwargs(value: str | dict[str, Any] | None) -> dict[str, Any]:
    options = parse_gen_kwargs(value)
    check_storable(options, "gen_kwargs")  # a string can hold numbers that the body's own check has not seen
    return options


def _limit(value: int | float | None) -> int | float | None:
    """Floats above 1 must be whole; 1.0 could mean one document or all of them."""
    if not isinstance(value, float) or value < 1:
        return value
    if value == 1.0:
        raise InvalidRequest("limit", "1.0 is ambiguous: 1 is one document, leaving it out is all of them")
    if not value.is_integer():
        raise InvalidRequest("limit", f"{value} is no number of documents (1, 2, …) and no fraction between 0 and 1")
    if value > MOST_DOCUMENTS:
        raise InvalidRequest("limit", f"{value} is more than {MOST_DOCUMENTS}; leave it out for all documents")
    return int(value)
