"""The one table from errors to HTTP: all leave as RFC 9457 problem+json, and a 500 says nothing of its cause."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException
from litestar.openapi.datastructures import ResponseSpec

from gpu_pool.cache_upkeep import CacheUnusable
from gpu_pool.desk import DeskUnavailable
from gpu_pool.errors import (
    DatabaseUnavailable,
    GpuNotFound,
    GpuNotQuarantined,
    InvalidRequest,
    JobAlreadyFinished,
    JobNotFound,
    KeyReused,
    NoSuchSamples,
    ShuttingDown,
)
from gpu_pool.merge import CheckpointNotFound, NotMergeable
from server.responses import FieldProblem, Problem

MEDIA_TYPE = "application/problem+json"

STATUS_OF: dict[type[Exception], HTTPStatus] = {
    InvalidRequest: HTTPStatus.UNPROCESSABLE_ENTITY,
    KeyReused: HTTPStatus.CONFLICT,
    JobNotFound: HTTPStatus.NOT_FOUND,
    NoSuchSamples: HTTPStatus.NOT_FOUND,
    JobAlreadyFinished: HTTPStatus.BAD_REQUEST,
    CheckpointNotFound: HTTPStatus.NOT_FOUND,
    NotMergeable: HTTPStatus.BAD_REQUEST,
    GpuNotFound: HTTPStatus.NOT_FOUND,
    GpuNotQuarantined: HTTPStatus.CONFLICT,
    ShuttingDown: HTTPStatus.SERVICE_UNAVAILABLE,
    DeskUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    DatabaseUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    CacheUnusable: HTTPStatus.SERVICE_UNAVAILABLE,
}

_NAMES = {"data": "body"}
"""Names of a handler's parameters that a client knows by another."""

_log = logging.getLogger(__name__)


def problem_response(request: Request[Any, Any, Any], error: Exception) -> Response[Problem]:
    """The exception handler of the whole application."""
    problem = problem_of(error)
    if problem.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    headers = error.headers if isinstance(error, HTTPException) else None
    return Response(problem, status_code=problem.status, media_type=MEDIA_TYPE, headers=headers)


def problem_of(error: Exception) -> Problem:
    """What the client is told of `error`."""
    if status := STATUS_OF.get(type(error)):
        return _problem(status, str(error), _field_problems(error))
    if isinstance(error, HTTPException) and error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
        errors = _parameter_problems(error)
        detail = "; ".join(f"{item.field}: {item.problem}" for item in errors) or error.detail
        return _problem(HTTPStatus(error.status_code), detail, errors)
    return _problem(HTTPStatus.INTERNAL_SERVER_ERROR, "The server failed to answer; its log says why", [])


def problems(*statuses: HTTPStatus | int) -> dict[int, ResponseSpec]:
    """A handler's `responses`: these statuses, each with a problem+json body."""
    return {int(status): _response_spec(HTTPStatus(status)) for status in statuses}


def _response_spec(status: HTTPStatus) -> ResponseSpec:
    return ResponseSpec(Problem, description=status.phrase, media_type=MEDIA_TYPE, generate_examples=False)


def _problem(status: HTTPStatus, detail: str, errors: list[FieldProblem]) -> Problem:
    return Problem(type="about:blank", title=status.phrase, status=int(status), detail=detail, errors=errors)


def _field_problems(error: Exception) -> list[FieldProblem]:
    if not isinstance(error, InvalidRequest):
        return []
    return [FieldProblem(field=error.field, problem=error.problem, choices=list(error.choices))]


class _Extra(msgspec.Struct):
    """How Litestar describes a wrong path or query parameter."""

    message: str
    key: str


def _parameter_problems(error: HTTPException) -> list[FieldProblem]:
    if not error.extra:
        return []
    extras = msgspec.convert(error.extra, list[_Extra])
    return [FieldProblem(field=_NAMES.get(extra.key, extra.key), problem=extra.message, choices=[]) for extra in extras]
