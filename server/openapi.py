"""The OpenAPI document and its page: exactly what the server accepts, readable without internet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from litestar import Litestar, Request, Response, get
from litestar.enums import MediaType
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.openapi.spec import Tag
from litestar.static_files import create_static_files_router
from litestar.types import Method
from litestar.types.internal_types import PathParameterDefinition

from server import box_responses, requests, responses

STATIC = Path(__file__).parent / "static"
API_VERSION = "0.1.0"
_REF = "#/components/schemas/{name}"
_JOB_LINKS = {
    name: {"operationId": name, "parameters": {"job_id": "$response.body#/job_id"}}
    for name in ("get_job", "get_samples", "get_log", "cancel_job")
}
"""What can follow a submission."""

_MERGE_LINKS = {name: link for name, link in _JOB_LINKS.items() if name != "get_samples"}
_LOCATION = {"Location": {"description": "Where the job is", "schema": {"type": "string"}}}

_DESCRIPTION = """Evaluation as a service for language models on a box of GPUs.

Submit with `POST /evaluate`, follow with `GET /jobs/{job_id}`. Every error is RFC 9457 problem+json; `errors` names the
fields. Numbers are never guessed from strings, unknown fields are refused, and of `limit`, 10.0 counts as 10 while 1.0
is refused as ambiguous.
"""


def document(app: Litestar) -> dict[str, Any]:
    """The app's OpenAPI document, corrected where Litestar's says something else than the server does."""
    spec = app.openapi_schema.to_schema()
    bodies = vars(requests) | vars(responses) | vars(box_responses)
    structs = [bodies[name] for name in spec["components"]["schemas"]]
    # Litestar's own components lose `additionalProperties: false` and the bounds inside unions
    spec["components"]["schemas"] = msgspec.json.schema_components(structs, ref_template=_REF)[1]
    for path in spec["paths"].values():
        for operation in path.values():
            operation["summary"] = operation.pop("description")
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = _without_null(parameter["schema"])
    spec["paths"]["/evaluate"]["post"]["responses"]["200"]["links"] = _JOB_LINKS
    spec["paths"]["/merge"]["post"]["responses"]["202"] |= {"links": _MERGE_LINKS, "headers": _LOCATION}
    return spec


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter may be left out, but its text is never null."""
    match schema:
        case {"oneOf": [present, {"type": "null"}]}:
            return present
        case _:
            return schema


def _operation_id(handler: HTTPRouteHandler, _method: Method, _path: list[str | PathParameterDefinition]) -> str:
    return handler.handler_name


class _Document(OpenAPIRenderPlugin):
    """The document, at /docs/openapi.json."""

    def __init__(self) -> None:
        super().__init__(path="/openapi.json", media_type=MediaType.JSON)

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return self.render_json(request, document(request.app))


class _Page(OpenAPIRenderPlugin):
    """Swagger UI, from our own static files."""

    def __init__(self) -> None:
        super().__init__(path="/")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return (STATIC / "docs.html").read_bytes()


@get("/openapi.json", sync_to_thread=False, include_in_schema=False)
def openapi_json(request: Request[Any, Any, Any]) -> Response[dict[str, Any]]:
    """The document where most tools look for it."""
    return Response(document(request.app))


static_files = create_static_files_router("/docs/static", directories=[STATIC])


def openapi_config() -> OpenAPIConfig:
    """The page at /docs and the document beside it."""
    return OpenAPIConfig(
        title="evalpool",
        version=API_VERSION,
        description=_DESCRIPTION,
        path="/docs",
        render_plugins=[_Page(), _Document()],
        tags=[
            Tag(name="jobs", description="Submit, follow, harvest, cancel"),
            Tag(name="catalogue", description="Which tasks and models there are"),
            Tag(name="server", description="Queue, GPUs, workers, health"),
            Tag(name="checkpoints", description="Make training checkpoints loadable"),
        ],
        use_handler_docstrings=True,
        operation_id_creator=_operation_id,
    )
