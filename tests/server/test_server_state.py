"""What the server says of itself: queue, health, catalogue, GPUs, workers, and errors that belong to no field."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from fake_pool import FakePool

from gpu_pool.models import model_kinds
from gpu_pool.records import JobState


async def submit(api: Any) -> str:
    return (await api.post("/evaluate", json={"model": "hf", "tasks": ["piqa"]})).json()["job_id"]


async def test_queue_and_health_agree(api: Any, fake_pool: FakePool):
    first, second, third, fourth = [await submit(api) for _ in range(4)]
    fake_pool.change(first, state=JobState.RUNNING)
    fake_pool.change(second, state=JobState.COMPLETED)
    await api.delete(f"/jobs/{third}")
    queue = (await api.get("/queue")).json()
    (wait,) = queue.pop("waiting")
    assert (wait["job_id"], wait["needs"], wait["reason"]) == (fourth, "1 GPU", "none is free")
    assert datetime.fromisoformat(wait["expected_start"]).tzinfo is not None
    assert (await api.get("/queue?explain=0")).json()["waiting"] == []
    assert (await api.get("/queue?explain=1000")).status_code == 200
    assert (await api.get("/queue?explain=1001")).status_code == 400
    assert queue == {
        "queue_size": 1,
        "running_job": first,
        "queued_jobs": [fourth],
        "completed_jobs": 1,
        "failed_jobs": 0,
        "running_jobs": [first],
        "cancelled_jobs": 1,
    }
    health = (await api.get("/health")).json()
    assert (list(health), health["status"], health["queue_size"]) == (
        ["status", "timestamp", "queue_size", "trouble"],
        "healthy",
        1,
    )
    assert datetime.fromisoformat(health["timestamp"])


async def test_catalogue(api: Any):
    assert (await api.get("/tasks")).json() == {"tasks": ["arc_easy", "mmlu", "piqa"]}
    detailed = (await api.get("/tasks?details=true")).json()
    untold = dict.fromkeys(("output_type", "modality", "documents", "note"))
    assert detailed["entries"][1] == {"name": "mmlu", "kind": "group", "library": "lm-eval", **untold}
    assert (await api.get("/models")).json() == {"models": model_kinds()}


async def test_models_with_details(api: Any):
    told = (await api.get("/models?details=true")).json()
    entries = {entry["name"]: entry for entry in told["entries"]}
    assert list(entries) == told["models"] == model_kinds()
    assert entries["llava"] == {
        "name": "llava",
        "runs_on": "engine",
        "pretrained": "llava-hf/llava-1.5-7b-hf",
        "reason": None,
        "nearest": [],
        "note": "the reference's default liuhaotian/llava-v1.5-7b in transformers' format",
        "defaults": {},
    }
    assert entries["qwen2_vl"]["defaults"] == {"num_frames": 32, "min_pixels": 3136, "max_pixels": 602112}
    assert entries["cogvlm2"]["runs_on"] is None
    assert "code of their own" in entries["cogvlm2"]["reason"]
    assert {"name": "torch_dtype", "meaning": "dtype", "note": None} in told["arguments"]


async def test_box(api: Any):
    gpu = (await api.get("/gpus")).json()["gpus"][0]
    assert (gpu["uuid"], gpu["free"], gpu["worker_id"], gpu["reason"]) == ("GPU-1", True, None, None)
    worker = (await api.get("/workers")).json()["workers"][0]
    assert (worker["worker_id"], worker["state"], worker["pid"], worker["jobs"]) == ("w1", "busy", 123, ["j"])


async def test_a_quarantined_gpu_is_released_once(api: Any):
    shown = (await api.get("/gpus")).json()
    assert (shown["held"], shown["max_gpus"], shown["problem"]) == (0, 2, None)
    assert [gpu["quarantined"] for gpu in shown["gpus"]] == [False, True]
    released = await api.post("/gpus/GPU-2/release")
    assert (released.status_code, released.json()["free"], released.json()["quarantined"]) == (200, True, False)
    again = await api.post("/gpus/GPU-2/release")
    assert again.status_code == 409
    assert "not quarantined" in again.json()["detail"]
    unknown = await api.post("/gpus/GPU-9/release")
    assert unknown.status_code == 404
    assert unknown.json()["detail"] == "There is no GPU GPU-9; there are GPU-1, GPU-2"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("PUT", "/jobs", 405), ("GET", "/evaluate", 405), ("GET", "/docs/static/nope.js", 404)],
)
async def test_routing_errors_are_problems(api: Any, method: str, path: str, status: int):
    response = await api.request(method, path)
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (response.status_code, problem["status"], problem["type"], problem["errors"]) == (
        status,
        status,
        "about:blank",
        [],
    )
    assert problem["title"]
    assert problem["detail"]
    assert status != 405 or response.headers["allow"]


async def test_the_pool_lives_as_long_as_the_application(api: Any, fake_pool: FakePool):
    assert fake_pool.running
    await fake_pool.stop()
    response = await api.post("/evaluate", json={"model": "hf", "tasks": ["piqa"]})
    assert response.status_code == 503
    assert "shutting down" in response.json()["detail"]


async def test_failures_do_not_leak(api: Any, fake_pool: FakePool, caplog: pytest.LogCaptureFixture):
    job_id = await submit(api)
    fake_pool.job_dir(job_id).mkdir()
    (fake_pool.job_dir(job_id) / "job.log").mkdir()  # a folder cannot be opened as a file
    response = await api.get(f"/jobs/{job_id}/log")
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert "Traceback" not in response.text
    assert "job.log" not in response.text
    assert "IsADirectoryError" in caplog.text
