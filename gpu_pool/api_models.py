"""What `model` and `model_args` of a request mean that is answered by an endpoint of the operator's list."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from gpu_pool.checkpoints import check_tokenizer
from gpu_pool.endpoints import PATHS, Endpoint
from gpu_pool.errors import InvalidRequest, PoolError
from gpu_pool.model_names import MODEL_NAMES
from gpu_pool.models import local_tokenizer
from gpu_pool.records import ApiModel, ModelArgs, Record
from gpu_pool.suggestions import close_names

_SECRETS = ("api_key", "api_version", "auth_token", "header", "headers", "key", "password", "token")
"""What must not come with a request, whatever it is."""
_SAME = {
    "custom_prefix_token_id": "prefix_token_id",
    "model_version": "model",
    "pretrained": "model",
    "timeout": "timeout_s",
}
"""Names that lm-eval and lmms-eval have -> ours."""
API_MEANINGLESS = frozenset(
    {
        *("adaptive_concurrency", "adaptive_decrease_factor", "adaptive_failure_threshold", "adaptive_increase_step"),
        *("adaptive_max_concurrency", "adaptive_min_concurrency", "adaptive_target_latency_s", "httpx_trust_env"),
        *("max_size_in_mb", "prefix_aware_queue", "prefix_hash_chars", "retry_backoff_s", "tokenizer_backend"),
        "use_fast_tokenizer",
    }
)
"""Arguments that are accepted and mean nothing: the operator's settings say how an endpoint is asked."""


class ApiArgs(Record, frozen=True, kw_only=True):
    """`model_args` of a model behind an endpoint."""

    endpoint: str | None = None
    base_url: str | None = None
    """Instead of `endpoint`: the address of one that is listed."""
    model: str | None = None
    num_concurrent: Annotated[int, Meta(ge=1)] | None = None
    max_retries: Annotated[int, Meta(ge=0)] | None = None
    timeout_s: Annotated[float, Meta(gt=0)] | None = None
    tokenizer: str | None = None
    """A local folder or hub id: log-likelihoods are asked by tokens."""
    max_length: Annotated[int, Meta(ge=2)] | None = None
    """Tokens of prompt and answer, where there is a tokenizer; longer prompts lose their beginning."""
    add_bos_token: bool = False
    prefix_token_id: Annotated[int, Meta(ge=0)] | None = None
    max_images: Annotated[int, Meta(ge=1)] = 999
    interleave: bool = True
    think_end_token: str | None = None


def is_api(model: str) -> bool:
    """Whether `model` is a name of models behind endpoints."""
    name = MODEL_NAMES.get(model)
    return name is not None and name.runs_on == "api"


def resolve_api(model: str, model_args: Mapping[str, Any], endpoints: Mapping[str, Endpoint]) -> ApiModel:
    """What a request with a name of `is_api` asks, and which endpoint. Nothing is read.

    Raises:
        InvalidRequest: naming `model` or `model_args.<key>`. What a request says beside is not repeated: there may be
            a key in it.
    """
    args = _decode(model_args)
    name, endpoint = _endpoint(model, args, endpoints)
    wanted = args.model or endpoint.model
    if not wanted:
        raise InvalidRequest("model_args.model", f"the endpoint's name of the model is needed; {name} has no default")
    for key, limit in (("num_concurrent", endpoint.num_concurrent), ("max_retries", endpoint.max_retries)):
        value = getattr(args, key)
        if value is not None and value > limit:
            raise InvalidRequest(f"model_args.{key}", f"must be at most {limit}, the operator's limit for {name}")
    return ApiModel(
        endpoint=name,
        base_url=endpoint.base_url,
        kind=endpoint.kind,
        model=wanted,
        num_concurrent=args.num_concurrent or endpoint.num_concurrent,
        max_retries=endpoint.max_retries if args.max_retries is None else args.max_retries,
        timeout_s=min(args.timeout_s or endpoint.timeout_s, endpoint.timeout_s),
        think_end_token=args.think_end_token,
        is_cached=endpoint.cache,
    )


def resolve_api_args(model_args: Mapping[str, Any], api: ApiModel) -> ModelArgs:
    """What is known here of the model; a tokenizer of the hub is made local. Call it in a thread.

    Raises:
        InvalidRequest: naming `model_args.tokenizer`.
    """
    args = _decode(model_args)
    field, tokenizer = "model_args.tokenizer", args.tokenizer
    if tokenizer is not None:
        if api.kind == "chat":
            raise InvalidRequest(field, "must be left out: a chat endpoint is sent text")
        if os.path.exists(tokenizer):
            check_tokenizer(Path(tokenizer), field)
        else:
            tokenizer = local_tokenizer(tokenizer, field)
    return ModelArgs(
        pretrained=api.model,
        tokenizer=tokenizer,
        max_length=args.max_length,
        add_bos_token=args.add_bos_token,
        prefix_token_id=args.prefix_token_id,
        max_images=args.max_images,
        interleave=args.interleave,
        think_end_token=args.think_end_token,
    )


def why_no_scores(args: ModelArgs, api: ApiModel, endpoint: Endpoint) -> str | None:
    """Why a model gives no log-likelihoods; None: it does."""
    if api.kind == "chat":
        return "a chat endpoint gives no log-probabilities of a prompt"
    if not endpoint.logprobs:
        return f"endpoint {api.endpoint} is not said to give log-probabilities of prompts (its setting logprobs)"
    if args.tokenizer is None:
        return "they are asked by tokens, and the request names no model_args.tokenizer"
    return None


# ---------------------------------------------------------------- the request's words


def _decode(model_args: Mapping[str, Any]) -> ApiArgs:
    known = ApiArgs.__struct_fields__
    values: dict[str, Any] = {}
    for key, value in model_args.items():
        name = _SAME.get(key, key)
        if name in _SECRETS:
            problem = "must be left out: keys are the operator's, who lists endpoints with what belongs to each"
            raise InvalidRequest(f"model_args.{key}", problem)
        if name in API_MEANINGLESS:
            continue
        if name not in known:
            problem = f"unknown for a model behind an endpoint; known are {', '.join(sorted(known))}"
            raise InvalidRequest(f"model_args.{key}", problem, choices=close_names(key, known))
        if name in values and values[name] != value:
            raise InvalidRequest(f"model_args.{key}", f"is {name} here, which the request gives another value")
        values[name] = value
    try:
        return msgspec.convert(values, ApiArgs, strict=True)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        raise InvalidRequest(f"model_args.{path.rstrip('`')}", problem.replace("`", "")) from None


def _endpoint(model: str, args: ApiArgs, endpoints: Mapping[str, Endpoint]) -> tuple[str, Endpoint]:
    """The endpoint that is meant: by its name, by its address, or the only one of the kind."""
    kind = MODEL_NAMES[model].kind
    fitting = {name: endpoint for name, endpoint in endpoints.items() if endpoint.kind == kind}
    listed = tuple(sorted(fitting))
    if not listed:
        raise InvalidRequest("model", f"the operator of this server lists no {kind} endpoint (setting endpoints)")
    if args.endpoint is not None:
        if args.endpoint not in fitting:
            problem = f"must be one of the {kind} endpoints that the operator lists: {', '.join(listed)}"
            raise InvalidRequest("model_args.endpoint", problem, choices=listed)
        fitting = {args.endpoint: fitting[args.endpoint]}
    if args.base_url is not None:
        wanted = _bare(args.base_url)
        fitting = {name: endpoint for name, endpoint in fitting.items() if _bare(endpoint.base_url) == wanted}
        if not fitting:
            problem = f"is the address of no {kind} endpoint that the operator lists; name one by `endpoint`"
            raise InvalidRequest("model_args.base_url", problem, choices=listed)
    if len(fitting) > 1:
        raise InvalidRequest("model_args.endpoint", f"must say which: {', '.join(listed)}", choices=listed)
    return next(iter(fitting.items()))


def _bare(url: str) -> str:
    """An address without what is asked there: lm-eval's have it, others do not."""
    bare = url.rstrip("/")
    for path in PATHS.values():
        bare = bare.removesuffix(path)
    return bare


# ---------------------------------------------------------------- the operator's settings


def check_endpoints(endpoints: Mapping[str, Endpoint]) -> None:
    """Raise PoolError where a listed endpoint cannot be used as it is written."""
    for name, endpoint in endpoints.items():
        if problem := _problem(name, endpoint):
            raise PoolError(f"endpoints.{name}: {problem}")


def _problem(name: str, endpoint: Endpoint) -> str | None:
    if not name or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        return "a name has letters, digits, dots, dashes and underscores only"
    parts = urlsplit(endpoint.base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "base_url must be like https://api.openai.com/v1"
    if parts.username or parts.password or parts.query or parts.fragment:
        return "base_url must be without user, password, query and fragment; the key goes into key_env or key_file"
    if endpoint.base_url.rstrip("/").endswith(tuple(PATHS.values())):
        return f"base_url must end before {PATHS[endpoint.kind]}"
    if endpoint.key_env is not None and endpoint.key_file is not None:
        return "only one of key_env and key_file can be given"
    if endpoint.key_env is not None and not os.environ.get(endpoint.key_env):
        return f"the environment has no variable {endpoint.key_env} (key_env)"
    if endpoint.key_file is not None and not os.access(endpoint.key_file, os.R_OK):
        return f"{endpoint.key_file} cannot be read (key_file)"
    if endpoint.logprobs and endpoint.kind == "chat":
        return "logprobs is of completions: a chat endpoint gives none of a prompt"
    return None
