"""Jobs over REST: the reference's shapes, and what is new beside them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from fake_pool import SPEC, FakePool

from gpu_pool.records import EngineRoute, JobResult, JobState, Phase, Progress, TaskProgress

REFERENCE_KEYS = [
    *("job_id", "status", "created_at", "started_at", "completed_at"),
    *("request", "result", "error", "position_in_queue"),
]


async def submit(api: Any, **fields: Any) -> str:
    response = await api.post("/evaluate", json={"model": "hf", "tasks": ["piqa"], **fields})
    return response.json()["job_id"]


async def test_submission_has_the_references_shape(api: Any):
    first = (await api.post("/evaluate", json={"model": "hf", "tasks": ["piqa"]})).json()
    assert first == {
        "job_id": str(UUID(first["job_id"])),
        "status": "queued",
        "position_in_queue": 0,
        "message": "Job queued successfully. Position in queue: 0",
    }
    second = (await api.post("/evaluate", json={"model": "hf", "tasks": ["piqa"]})).json()
    assert (second["position_in_queue"], second["message"][-1]) == (1, "1")


async def test_a_queued_job(api: Any):
    await submit(api)
    job_id = await submit(api, limit=10.0)
    job = (await api.get(f"/jobs/{job_id}")).json()
    assert list(job)[:9] == REFERENCE_KEYS
    assert (job["status"], job["position_in_queue"], job["progress"], job["model"]) == ("queued", 1, None, None)
    assert datetime.fromisoformat(job["created_at"]).tzinfo is not None
    assert (job["started_at"], job["completed_at"], job["result"], job["error"]) == (None, None, None, None)
    assert job["request"]["tasks"] == ["piqa"]
    assert job["request"]["num_gpus"] == 1  # defaults are filled in
    assert job["waits_for"] == "none is free"
    assert datetime.fromisoformat(job["expected_start"]) > datetime.now(UTC) - timedelta(minutes=1)


async def test_a_running_job_shows_its_progress(api: Any, fake_pool: FakePool):
    job_id = await submit(api)
    progress = Progress(
        phase=Phase.EVALUATING,
        tasks={"piqa": TaskProgress(done=3, total=8, errored=1)},
        cached=1,
        workers={"w1": 2},
        routes=(EngineRoute(route="plain", reason="no memory"),),
    )
    fake_pool.change(
        job_id, state=JobState.RUNNING, started_at=datetime.now(UTC), progress=progress, model=SPEC, attempt=1
    )
    job = (await api.get(f"/jobs/{job_id}")).json()
    assert (job["status"], job["phase"], job["attempt"], job["position_in_queue"]) == ("running", "evaluating", 1, None)
    assert (job["waits_for"], job["expected_start"]) == (None, None)
    assert job["progress"] == {
        "phase": "evaluating",
        "done": 3,
        "total": 8,
        "cached": 1,
        "errored": 1,
        "tasks": {"piqa": {"done": 3, "total": 8, "errored": 1}},
        "workers": {"w1": 2},
        "routes": [{"route": "plain", "reason": "no memory"}],
        "eta_seconds": 12.5,
    }
    assert job["model"]["fingerprint"] == SPEC.fingerprint
    assert job["model"]["args"] == {"pretrained": "/models/tiny"}


async def test_a_completed_job_has_files_and_scores(api: Any, fake_pool: FakePool):
    job_id = await submit(api)
    scores = {"piqa": {"acc,none": 0.5, "acc_stderr,none": float("nan")}}
    result = JobResult(model_name="tiny", results_path="/r.json", samples={"piqa": "/s.jsonl"}, metrics=scores)
    fake_pool.change(job_id, state=JobState.COMPLETED, completed_at=datetime.now(UTC), result=result)
    job = (await api.get(f"/jobs/{job_id}")).json()
    assert job["status"] == "completed"
    assert job["result"] == {"tiny": {"results": "/r.json", "samples": ["/s.jsonl"]}}
    assert job["metrics"] == {"piqa": {"acc,none": 0.5, "acc_stderr,none": None}}


async def test_an_ended_job_shows_the_same_in_every_list_until_it_changes(api: Any, fake_pool: FakePool):
    job_id = await submit(api)
    fake_pool.change(job_id, state=JobState.FAILED, error="first")
    for error in ("first", "first", "second"):
        fake_pool.change(job_id, error=error)
        [listed] = (await api.get("/jobs")).json()["jobs"]
        assert listed == (await api.get(f"/jobs/{job_id}")).json()
        assert listed["error"] == error


async def test_no_samples_no_paths(api: Any, fake_pool: FakePool):
    job_id = await submit(api)
    fake_pool.change(job_id, state=JobState.COMPLETED, result=JobResult(model_name="tiny", results_path="/r.json"))
    assert (await api.get(f"/jobs/{job_id}")).json()["result"]["tiny"]["samples"] == []


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/samples"), ("GET", "/log")], ids=str
)
async def test_unknown_jobs(api: Any, method: str, path: str):
    response = await api.request(method, f"/jobs/nope{path}")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["detail"] == "Job nope not found"


async def test_cancelling(api: Any, fake_pool: FakePool):
    queued, running = await submit(api), await submit(api)
    fake_pool.change(running, state=JobState.RUNNING)
    for job_id, status in ((queued, "cancelled"), (running, "running")):  # the running one is on its way
        response = await api.delete(f"/jobs/{job_id}")
        assert (response.status_code, response.json()) == (200, {"message": f"Job {job_id} cancelled"})
        assert (await api.get(f"/jobs/{job_id}")).json()["status"] == status
    again = await api.delete(f"/jobs/{queued}")
    assert (again.status_code, again.json()["detail"]) == (400, "Job already finished or cancelled")


async def test_pages_are_newest_first_and_complete(api: Any):
    submitted = [await submit(api) for _ in range(5)]
    seen: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = (await api.get("/jobs", params={"limit": 2, **cursor})).json()
        seen += [job["job_id"] for job in page["jobs"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert seen == submitted[::-1]


async def test_filter_by_status(api: Any, fake_pool: FakePool):
    job_ids = [await submit(api) for _ in range(3)]
    fake_pool.change(job_ids[0], state=JobState.RUNNING)
    fake_pool.change(job_ids[1], state=JobState.CANCELLING)
    page = (await api.get("/jobs", params={"status": "running"})).json()
    assert [job["job_id"] for job in page["jobs"]] == [job_ids[1], job_ids[0]]
    assert {job["status"] for job in page["jobs"]} == {"running"}


@pytest.mark.parametrize(
    ("query", "field", "status"),
    [
        ("limit=0", "limit", 400),
        ("limit=201", "limit", 400),
        ("limit=x", "limit", 400),
        ("status=cancelling", "status", 400),
        ("state=queued", "state", 400),
        ("cursor=nope", "cursor", 422),
    ],
)
async def test_wrong_query_parameters(api: Any, query: str, field: str, status: int):
    response = await api.get(f"/jobs?{query}")
    assert response.status_code == status
    assert response.json()["errors"][0]["field"] == field


async def with_samples(api: Any, pool: FakePool, tasks: list[str], count: int) -> str:
    job_id = await submit(api, tasks=tasks)
    paths: dict[str, str] = {}
    for task in tasks:
        path: Path = pool.folder / f"{task}.jsonl"
        path.write_text("".join(json.dumps({"doc_id": i, "acc": float("nan")}) + "\n" for i in range(count)))
        paths[task] = str(path)
    result = JobResult(model_name="tiny", results_path="/r.json", samples=paths)
    pool.change(job_id, state=JobState.COMPLETED, result=result, samples=paths)
    return job_id


async def test_sample_pages(api: Any, fake_pool: FakePool):
    job_id = await with_samples(api, fake_pool, ["piqa"], 7)
    page = (await api.get(f"/jobs/{job_id}/samples", params={"offset": 5, "limit": 5})).json()
    assert {key: page[key] for key in ("task", "offset", "limit", "total")} == {
        "task": "piqa",
        "offset": 5,
        "limit": 5,
        "total": 7,
    }
    assert page["samples"] == [{"doc_id": 5, "acc": None}, {"doc_id": 6, "acc": None}]
    beyond = (await api.get(f"/jobs/{job_id}/samples", params={"offset": 100})).json()
    assert (beyond["samples"], beyond["total"]) == ([], 7)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('{"x": [1.0, "caf\N{LATIN SMALL LETTER E WITH ACUTE}"]}', [1.0, "caf\N{LATIN SMALL LETTER E WITH ACUTE}"]),
        ('{"x": [NaN, -Infinity, 1e400]}', [None, None, None]),
        (r'{"x": "half a character: \ud83d"}', "half a character: ?"),
        (r'{"x": "a whole one: \ud83d\ude00"}', "a whole one: \N{GRINNING FACE}"),
    ],
)
async def test_samples_beyond_json_are_shown(api: Any, fake_pool: FakePool, line: str, shown: object):
    job_id = await with_samples(api, fake_pool, ["piqa"], 1)
    (fake_pool.folder / "piqa.jsonl").write_text(f"{line}\n", encoding="utf-8")
    response = await api.get(f"/jobs/{job_id}/samples")
    assert response.status_code == 200
    assert response.json()["samples"] == [{"x": shown}]


@pytest.mark.parametrize("query", ["", "?task=nope"])
async def test_samples_of_which_task(api: Any, fake_pool: FakePool, query: str):
    job_id = await with_samples(api, fake_pool, ["piqa", "arc_easy"], 1)
    response = await api.get(f"/jobs/{job_id}/samples{query}")
    assert response.status_code == 404
    assert "piqa, arc_easy" in response.json()["detail"]
    assert (await api.get(f"/jobs/{job_id}/samples?task=arc_easy")).json()["total"] == 1


async def test_samples_that_are_not_there(api: Any, fake_pool: FakePool):
    assert (await api.get(f"/jobs/{await submit(api)}/samples")).status_code == 404
    job_id = await with_samples(api, fake_pool, ["piqa"], 1)
    (fake_pool.folder / "piqa.jsonl").unlink()
    assert (await api.get(f"/jobs/{job_id}/samples")).status_code == 404


async def test_log(api: Any, fake_pool: FakePool):
    job_id = await submit(api)
    assert (await api.get(f"/jobs/{job_id}/log")).text == ""
    fake_pool.job_dir(job_id).mkdir()
    (fake_pool.job_dir(job_id) / "job.log").write_bytes(b"one\ntwo \xff\nthree")
    response = await api.get(f"/jobs/{job_id}/log")
    assert response.headers["content-type"].startswith("text/plain")
    assert response.text == "one\ntwo \N{REPLACEMENT CHARACTER}\nthree"
    assert (await api.get(f"/jobs/{job_id}/log?tail=1")).text == "three"
    assert (await api.get(f"/jobs/{job_id}/log?tail=0")).status_code == 400


async def test_tail_of_a_log_larger_than_a_block(api: Any, fake_pool: FakePool):
    job_id = await submit(api)
    fake_pool.job_dir(job_id).mkdir()
    lines = [f"line {i} {'x' * 1000}\n" for i in range(3000)]
    (fake_pool.job_dir(job_id) / "job.log").write_text("".join(lines))
    assert (await api.get(f"/jobs/{job_id}/log?tail=2000")).text == "".join(lines[-2000:])
