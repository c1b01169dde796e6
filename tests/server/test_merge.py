"""POST /merge: the reference's shape and statuses, and the answer of who need not wait."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_pool import FakePool
from live_server import live_server

from gpu_pool.records import Job, JobState, Phase, Progress, TaskProgress


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What looks like a sharded checkpoint."""
    folder = tmp_path / "checkpoint-7"
    shards = folder / "pytorch_model_fsdp_0"
    shards.mkdir(parents=True)
    (shards / ".metadata").touch()
    (folder / "config.json").write_text("{}")
    return folder


def merge_until(url: str, pool: FakePool, checkpoint: Path, **ending: Any) -> tuple[httpx.Response, Job]:
    """The answer to a merge that ends so once it is submitted, and its job."""
    body = {"checkpoint_path": str(checkpoint), "output_path": None, "checkpoint_type": "regular"}
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(httpx.post, f"{url}/merge", json=body, timeout=None)
        [job_id] = pool.until(lambda: pool.queue().queued)
        assert not answer.done()
        ended = pool.change(job_id, **ending)
        return answer.result(), ended


def test_who_waits_gets_the_old_form(tmp_path: Path, checkpoint: Path):
    with live_server(tmp_path) as (url, pool):
        response, _ = merge_until(url, pool, checkpoint, state=JobState.COMPLETED)
    assert response.status_code == 200
    assert response.json() == {
        "success": True,
        "message": "Checkpoint merged successfully",
        "merged_path": str(checkpoint),
    }


def test_who_waits_is_told_what_went_wrong(tmp_path: Path, checkpoint: Path):
    with live_server(tmp_path) as (url, pool):
        failed, _ = merge_until(url, pool, checkpoint, state=JobState.FAILED, error="a shard is missing")
        cancelled, job = merge_until(url, pool, checkpoint, state=JobState.CANCELLED)
    assert (failed.status_code, failed.json()["detail"]) == (400, "a shard is missing")
    assert (cancelled.status_code, cancelled.json()["detail"]) == (400, f"the merge, job {job.id}, was cancelled")


@pytest.mark.parametrize("prefer", ["respond-async", "wait=5, Respond-Async", "handling=strict,respond-async"])
async def test_who_need_not_wait_gets_a_job(api: Any, fake_pool: FakePool, checkpoint: Path, prefer: str):
    body = {"checkpoint_path": str(checkpoint), "priority": 3, "tags": ["a"], "max_shard_bytes": 1000}
    response = await api.post("/merge", json=body, headers={"Prefer": prefer})
    job_id = response.json()["job_id"]
    assert response.status_code == 202
    assert (response.headers["Location"], response.headers["Preference-Applied"]) == (
        f"/jobs/{job_id}",
        "respond-async",
    )
    assert response.json() | {"job_id": ""} == {
        "job_id": "",
        "status": "queued",
        "position_in_queue": 0,
        "message": "Job queued successfully. Position in queue: 0",
    }
    progress = Progress(phase=Phase.MERGING, tasks={"weights": TaskProgress(done=3, total=9)})
    fake_pool.change(job_id, state=JobState.RUNNING, progress=progress)
    job = (await api.get(response.headers["Location"])).json()
    assert (job["kind"], job["phase"], job["progress"]["done"], job["merged_path"]) == ("merge", "merging", 3, None)
    assert job["request"] == body | {"output_path": None, "checkpoint_type": "regular"}
    assert job["tags"] == ["a"]
    again = await api.post("/merge", json=body, headers={"Prefer": prefer})
    assert (again.json()["job_id"], again.json()["message"]) == (job_id, "The same merge is running already")
    fake_pool.change(job_id, state=JobState.COMPLETED)
    assert (await api.get(f"/jobs/{job_id}")).json()["merged_path"] == str(checkpoint)
    assert (await api.get(f"/jobs/{job_id}/samples")).status_code == 404


async def test_a_checkpoint_that_is_not_there(api: Any):
    response = await api.post("/merge", json={"checkpoint_path": "/nope", "output_path": None})
    assert (response.status_code, response.json()["detail"]) == (404, "Checkpoint /nope not found")


async def test_a_folder_without_shards(api: Any, tmp_path: Path):
    response = await api.post("/merge", json={"checkpoint_path": str(tmp_path), "checkpoint_type": "ema"})
    assert response.status_code == 400
    assert "pytorch_ema_model_fsdp_0" in response.json()["detail"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "checkpoint_path"),
        ({"checkpoint_path": ""}, "checkpoint_path"),
        ({"checkpoint_path": "/nope", "checkpoint_type": "best"}, "checkpoint_type"),
        ({"checkpoint_path": "/nope", "output": "/x"}, "output"),
        ({"checkpoint_path": "/nope", "max_shard_bytes": 0}, "max_shard_bytes"),
        ({"checkpoint_path": "/nope", "tags": ["a", "a"]}, "tags[1]"),
    ],
)
async def test_refusals(api: Any, body: dict[str, Any], field: str):
    response = await api.post("/merge", json=body)
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == field


async def test_a_place_that_is_not_allowed(api: Any, checkpoint: Path):
    response = await api.post("/merge", json={"checkpoint_path": str(checkpoint), "output_path": "/elsewhere"})
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "output_path"
