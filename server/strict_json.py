"""Strict requests: bodies decoded straight into the handler's Struct, and what is wrong with those that do not fit."""

from __future__ import annotations

import functools
import re
from typing import Any

import msgspec
from litestar import Request
from litestar.exceptions import HTTPException, ValidationException
from litestar.exceptions.http_exceptions import RequestEntityTooLarge

from gpu_pool.errors import InvalidRequest
from gpu_pool.suggestions import close_names

_MESSAGE = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`")
_MAX_DEPTH = 32
_MAX_INT = 2**63 - 1


class MalformedJson(HTTPException):
    """The body is not JSON."""

    status_code = 400


class UnsupportedMediaType(HTTPException):
    """The body must be sent as application/json."""

    status_code = 415


class StrictRequest(Request[Any, Any, Any]):
    """A request whose JSON body is decoded without conversions ("2" is no number) and without unknown fields."""

    async def body(self) -> bytes:
        """The body's bytes, of handlers that want one. Raises RequestEntityTooLarge, saying what the limit is, and
        MalformedJson for an empty body, which Litestar would call a missing parameter."""
        try:
            if body := await super().body():
                return body
        except RequestEntityTooLarge as error:
            most = self.route_handler.resolve_request_max_body_size()
            raise RequestEntityTooLarge(detail=f"The body must not be larger than {most} bytes") from error
        raise MalformedJson(detail="The body is empty; send a JSON object")

    async def json(self) -> Any:
        """The body as the type of the handler's `data` parameter.

        Raises UnsupportedMediaType, MalformedJson, InvalidRequest.
        """
        if self.content_type[0].lower() != "application/json":
            raise UnsupportedMediaType(detail="Send the body as Content-Type: application/json")
        return decode(await self.body(), self.route_handler.parsed_fn_signature.parameters["data"].annotation)


async def refuse_unknown_parameters(request: Request[Any, Any, Any]) -> None:
    """Before each request: a misspelt query parameter must not be ignored. Raises ValidationException.

    Async although it awaits nothing: Litestar would run a plain function in a thread, at a third of a request's cost.
    """
    known = request.route_handler.parsed_fn_signature.parameters
    unknown = [{"key": key, "message": "unknown parameter"} for key in request.query_params if key not in known]
    if unknown:
        raise ValidationException(extra=unknown)


def decode(body: bytes, type_: Any) -> Any:
    """`body` as a `type_`, all values of which can be stored and sent on. Raises MalformedJson, InvalidRequest."""
    try:
        value = _decoder(type_).decode(body)
    except msgspec.ValidationError as error:
        raise _invalid_request(str(error), type_) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedJson(detail=f"The body is not JSON: {error}") from error
    for name in type_.__struct_fields__:
        check_storable(getattr(value, name), name)
    return value


@functools.cache
def _decoder(type_: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(type_)


def check_storable(value: Any, path: str, depth: int = 0) -> None:
    """Refuse what JSON allows but files, processes and the database do not. Raises InvalidRequest."""
    match value:
        case str() if "\0" in value:
            raise InvalidRequest(path, "must not contain the NUL character")
        case int() if not -_MAX_INT <= value <= _MAX_INT:
            raise InvalidRequest(path, "is outside the range of 64-bit integers")
        case list() | dict() if depth > _MAX_DEPTH:
            raise InvalidRequest(path, f"is nested more than {_MAX_DEPTH} levels deep")
        case list():
            for index, item in enumerate(value):
                check_storable(item, f"{path}[{index}]", depth + 1)
        case dict():
            for key, item in value.items():
                check_storable(key, path)
                check_storable(item, f"{path}.{key}", depth + 1)
        case _:
            pass


def _invalid_request(message: str, type_: Any) -> InvalidRequest:
    """msgspec's first error, with the field's name and description."""
    match_ = _MESSAGE.fullmatch(message)
    assert match_ is not None  # the pattern matches every text
    what, path = match_["what"], (match_["path"] or "").removeprefix(".")
    if unknown := _UNKNOWN.fullmatch(what):
        known = [field.encode_name for field in msgspec.structs.fields(type_)]
        close = close_names(unknown["name"], known) or known
        return InvalidRequest(unknown["name"], "unknown field", choices=close)
    if missing := _MISSING.fullmatch(what):
        return InvalidRequest(missing["name"], f"missing; {_description(type_, missing['name'])}")
    if not path:
        return InvalidRequest("body", "must be a JSON object")
    name = re.split(r"[.\[]", path, maxsplit=1)[0]
    return InvalidRequest(path, f"{_plain(what)}. Right would be: {_description(type_, name)}")


def _plain(what: str) -> str:
    """msgspec's words without the regular expression, which tells a person nothing."""
    return "Invalid value" if " matching regex " in what else what.replace("`", "")


def _description(type_: Any, name: str) -> str:
    """The field's description in OpenAPI: it says what would be right."""
    return _properties(type_)[name].get("description", "a value of the documented type")


@functools.cache
def _properties(type_: Any) -> dict[str, dict[str, Any]]:
    """The fields' schemas: making them takes longer than all the rest of a refusal."""
    return msgspec.json.schema_components([type_])[1][type_.__name__]["properties"]
