"""The OpenAPI document says what the server accepts, and its page needs no internet."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import schemathesis
from fake_pool import SPEC, FakePool
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    missing_required_header,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from gpu_pool.records import JobResult, JobState, Progress, TaskProgress
from server.app import create_app
from server.openapi import document as document_of
from server.requests import EvaluateRequest
from server.settings import Settings
from server.strict_json import decode
from server.validation import to_evaluation

EXTERNAL = re.compile(rb"(?:https?:)?//[\w.-]+\.\w+")


@pytest.fixture
async def document(api: Any) -> dict[str, Any]:
    response = await api.get("/openapi.json")
    assert (await api.get("/docs/openapi.json")).json() == response.json()
    return response.json()


async def test_it_is_openapi_3_1(document: dict[str, Any]):
    assert document["openapi"].startswith("3.1")
    schemathesis.openapi.from_dict(document).validate()


async def test_bodies_are_strict_bounded_and_have_examples(document: dict[str, Any]):
    request = document["components"]["schemas"]["EvaluateRequest"]
    assert request["additionalProperties"] is False
    assert set(request["required"]) == {"model", "tasks"}
    assert request["properties"]["num_gpus"]["minimum"] == 0
    assert {"type": "integer", "minimum": 1, "maximum": 2**53} in request["properties"]["limit"]["anyOf"]
    assert all(field["description"] for field in request["properties"].values())
    for path in document["paths"].values():
        for operation in path.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                assert content["schema"]["examples"]


async def test_examples_are_accepted(document: dict[str, Any]):
    examples = document["paths"]["/evaluate"]["post"]["requestBody"]["content"]["application/json"]["schema"][
        "examples"
    ]
    for example in examples:
        assert to_evaluation(decode(msgspec.json.encode(example), EvaluateRequest))


async def test_every_error_is_documented_as_a_problem(document: dict[str, Any]):
    for path in document["paths"].values():
        for operation in path.values():
            errors = {status: reply for status, reply in operation["responses"].items() if status >= "400"}
            assert "400" in errors
            assert {media_type for reply in errors.values() for media_type in reply["content"]} == {
                "application/problem+json"
            }


async def test_the_page_needs_no_internet(api: Any):
    page = await api.get("/docs")
    assert page.status_code == 200
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(links) == 4
    for link in links:
        response = await api.get(link)
        assert response.status_code == 200, link
        if not link.endswith("bundle.js"):  # the bundle names sites in texts and never loads from them
            assert not EXTERNAL.search(response.content.split(b"image/svg+xml")[0]), link
    assert not EXTERNAL.search(page.content)


CHECKS = (
    not_a_server_error,
    content_type_conformance,
    missing_required_header,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)


POOL = FakePool(Path("/nonexistent"))
POOL.running = True
FUZZED = create_app(Settings(), POOL)
schema = schemathesis.openapi.from_dict(document_of(FUZZED))
schema.app = FUZZED


@schema.parametrize()
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_fuzzing_finds_nothing_outside_the_document(case: Any):
    case.call_and_validate(checks=CHECKS)


async def test_answers_about_jobs_are_inside_the_document(api: Any, fake_pool: FakePool):
    job_id = (await api.post("/evaluate", json={"model": "hf", "tasks": ["piqa"]})).json()["job_id"]
    samples = fake_pool.folder / "samples.jsonl"
    samples.write_text('{"doc_id": 0}\n')
    result = JobResult(model_name="tiny", results_path="/r.json", samples={"piqa": str(samples)})
    progress = Progress(tasks={"piqa": TaskProgress(done=1, total=2)})
    for changes in (
        {"state": JobState.RUNNING, "progress": progress, "model": SPEC, "started_at": datetime.now(UTC)},
        {"state": JobState.COMPLETED, "result": result, "completed_at": datetime.now(UTC)},
    ):
        fake_pool.change(job_id, **changes)
        for path in ("/jobs", "/jobs/{job_id}", "/jobs/{job_id}/samples", "/jobs/{job_id}/log", "/queue"):
            response = await api.get(path.format(job_id=job_id))
            schema[path]["GET"].validate_response(response)
