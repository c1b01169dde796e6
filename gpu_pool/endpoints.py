"""Endpoints that answer as OpenAI's API does: what the operator lists, and what follows for a job. No key is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from gpu_pool.records import TEXT_ONLY, ApiModel, Modality, Record

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
"""Of each kind of endpoint, after its base URL."""


class Endpoint(Record, frozen=True, kw_only=True):
    """One endpoint, and how it may be used. Its key is in a variable of the server's environment, or in a file."""

    base_url: str
    """Such as https://api.openai.com/v1: what comes before /chat/completions."""
    kind: Literal["chat", "completions"] = "chat"
    model: str | None = None
    """The model where a request names none."""
    key_env: str | None = None
    key_file: Path | None = None
    num_concurrent: Annotated[int, Meta(ge=1, le=1024)] = 8
    """Most requests at once, all jobs together."""
    timeout_s: Annotated[float, Meta(gt=0)] = 120.0
    """How long one try may take."""
    max_retries: Annotated[int, Meta(ge=0, le=100)] = 5
    """Further tries of a request that was refused for now (408, 409, 425, 429, 5xx), or lost on the way."""
    retry_pause_s: Annotated[float, Meta(gt=0)] = 1.0
    """Before the first of them; it doubles with each, and is as long as the endpoint asks for by Retry-After."""
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls the most tokens to generate."""
    logprobs: bool = False
    """Whether it gives the log-probabilities of a prompt's tokens (`echo` and `logprobs` of completions)."""
    cache: bool = False
    """Whether answers without sampling may be kept in the response cache: a provider may change a model any time."""

    @property
    def url(self) -> str:
        """Where requests go."""
        return self.base_url.rstrip("/") + PATHS[self.kind]


def slot_id(endpoint: str) -> str:
    """The slot of the process that asks the endpoint of this name."""
    return f"api:{endpoint}"


def api_fingerprint(model: ApiModel) -> str:
    """What a model behind an endpoint is known by: nobody can tell its content."""
    return f"{slot_id(model.endpoint)}/{model.model}@{model.base_url}"


def taken_by(model: ApiModel) -> frozenset[Modality]:
    """What a model behind an endpoint can be sent, whatever it makes of it."""
    return frozenset({"text", "image"}) if model.kind == "chat" else TEXT_ONLY
