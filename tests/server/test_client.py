"""Both clients against the real REST face, over real sockets."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import msgspec
import pytest
from fake_pool import FakePool
from live_server import live_server

from gpu_pool.records import JobResult, JobState, Phase, Progress, TaskProgress
from server.client import AsyncEvalClient, EvalClient, EvalError, JobFailed, MergeOptions, MoreOptions
from server.requests import EvaluateRequest, MergeRequest

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def live(tmp_path: Path) -> Generator[tuple[str, FakePool]]:
    with live_server(tmp_path) as running:
        yield running


@pytest.fixture
def pool(live: tuple[str, FakePool]) -> FakePool:
    return live[1]


@pytest.fixture
def url(live: tuple[str, FakePool]) -> str:
    return live[0]


@pytest.fixture
def client(url: str) -> Generator[EvalClient]:
    with EvalClient(url) as client:
        yield client


def submit(client: EvalClient, **fields: Any) -> str:
    return client.evaluate("hf", ["arc_easy"], {"pretrained": "/models/tiny"}, **fields)["job_id"]


def complete(pool: FakePool, job_id: str, records: int = 0) -> None:
    """What a pool does when the job is done: `records` samples and a score."""
    samples = pool.folder / "samples.jsonl"
    samples.write_text("".join(json.dumps({"doc_id": i}) + "\n" for i in range(records)))
    metrics = {"arc_easy": {"acc,none": 0.5, "acc_stderr,none": 0.1}}
    result = JobResult(model_name="tiny", results_path="/r.json", samples={"arc_easy": str(samples)}, metrics=metrics)
    pool.change(job_id, state=JobState.COMPLETED, result=result)


def test_the_options_are_the_servers_fields() -> None:
    named = {"model", "tasks", "model_args", "num_fewshot", "batch_size", "device", "limit", "gen_kwargs"}
    named |= {"log_samples", "predict_only", "num_gpus", "output_dir"}
    fields = {field.name for field in msgspec.structs.fields(EvaluateRequest)}
    assert named | set(get_type_hints(MoreOptions)) == fields


def test_the_options_of_a_merge_are_the_servers_fields() -> None:
    named = {"checkpoint_path", "output_path", "checkpoint_type"}
    fields = {field.name for field in msgspec.structs.fields(MergeRequest)}
    assert named | set(get_type_hints(MergeOptions)) == fields


def test_a_merge_that_is_not_waited_for(client: EvalClient, pool: FakePool, tmp_path: Path) -> None:
    checkpoint = make_sharded(tmp_path / "c")
    job_id = client.submit_merge(str(checkpoint), checkpoint_type="ema", max_shard_bytes=7, tags=["a"])["job_id"]
    pool.change(job_id, state=JobState.COMPLETED)
    job = client.wait_for_job(job_id, verbose=False)
    assert (job["kind"], job["merged_path"], job["tags"]) == ("merge", str(checkpoint), ["a"])
    assert job["request"]["max_shard_bytes"] == 7


async def test_a_merge_by_the_async_client(url: str, pool: FakePool, tmp_path: Path) -> None:
    checkpoint = make_sharded(tmp_path / "c")
    async with AsyncEvalClient(url) as client:
        job_id = (await client.submit_merge(str(checkpoint), str(checkpoint / "out"), "ema"))["job_id"]
        pool.change(job_id, state=JobState.FAILED, error="no space")
        with pytest.raises(JobFailed, match="no space"):
            await client.wait_for_job(job_id, verbose=False)


def make_sharded(folder: Path) -> Path:
    """What looks like the shards of an average."""
    shards = folder / "pytorch_ema_model_fsdp_0"
    shards.mkdir(parents=True)
    (shards / ".metadata").touch()
    (folder / "config.json").write_text("{}")
    return folder


def test_information(client: EvalClient) -> None:
    assert client.is_healthy()
    assert client.health()["queue_size"] == 0
    assert "arc_easy" in client.list_tasks()
    assert "hf" in client.list_models()
    assert client.gpus()["gpus"][0]["name"] == "H100"
    assert len(client.workers()["workers"]) == 1


def test_a_base_url_may_end_in_a_slash(url: str) -> None:
    with EvalClient(f"{url}/") as client:
        assert client.is_healthy()


def test_nobody_there() -> None:
    with EvalClient(NOWHERE) as client:
        assert not client.is_healthy()
        with pytest.raises(httpx.TransportError):
            client.health()


def test_submit_sends_what_is_given_and_leaves_the_rest_to_the_server(client: EvalClient, pool: FakePool) -> None:
    job_id = submit(client, limit=3, use_cache=False, random_seed=None)
    evaluation = pool._jobs[job_id].evaluation
    assert (evaluation.limit, evaluation.use_cache, evaluation.random_seed) == (3, False, None)
    assert evaluation.numpy_random_seed == 1234


def test_queue_and_job_pages(client: EvalClient, pool: FakePool) -> None:
    first, second, third = (submit(client) for _ in range(3))
    pool.change(first, state=JobState.RUNNING)
    queue = client.get_queue_status()
    assert (queue["running_jobs"], queue["queued_jobs"]) == ([first], [second, third])
    page = client.jobs(limit=2)
    assert [job["job_id"] for job in page["jobs"]] == [third, second]
    rest = client.jobs(limit=2, cursor=page["next_cursor"])
    assert ([job["job_id"] for job in rest["jobs"]], rest["next_cursor"]) == ([first], None)
    assert [job["job_id"] for job in client.jobs(status="running")["jobs"]] == [first]


def test_progress_and_log(client: EvalClient, pool: FakePool) -> None:
    job_id = submit(client)
    assert client.progress(job_id) is None
    progress = Progress(phase=Phase.EVALUATING, tasks={"arc_easy": TaskProgress(done=1, total=4)})
    pool.change(job_id, state=JobState.RUNNING, progress=progress)
    (pool.job_dir(job_id)).mkdir()
    (pool.job_dir(job_id) / "job.log").write_text("hello\n")
    told = client.progress(job_id)
    assert told is not None
    assert (told["phase"], told["done"], told["total"]) == ("evaluating", 1, 4)
    assert client.log(job_id) == "hello\n"


@pytest.mark.parametrize("records", [0, 1, 100, 250])
def test_samples_come_page_by_page(client: EvalClient, pool: FakePool, records: int) -> None:
    job_id = submit(client)
    complete(pool, job_id, records)
    assert [sample["doc_id"] for sample in client.samples(job_id)] == list(range(records))


def test_waiting_for_a_completed_job(client: EvalClient, pool: FakePool, capsys: pytest.CaptureFixture[str]) -> None:
    job_id = submit(client)
    seen = []

    def step(job: dict[str, Any]) -> None:
        seen.append(job["status"])
        if job["status"] == "queued":
            pool.change(job_id, state=JobState.RUNNING)
        elif job["status"] == "running":
            complete(pool, job_id)

    job = client.wait_for_job(job_id, on_progress=step)
    assert job["metrics"]["arc_easy"]["acc,none"] == 0.5
    assert seen == ["queued", "running", "completed"]
    assert capsys.readouterr().out.splitlines() == [
        f"Job {job_id[:8]}... queued (position: 0)",
        f"Job {job_id[:8]}... running",
        f"Job {job_id[:8]}... completed",
    ]


def test_waiting_for_a_failed_job(client: EvalClient, pool: FakePool) -> None:
    job_id = submit(client)
    pool.change(job_id, state=JobState.FAILED, error="no such luck")
    with pytest.raises(JobFailed, match="no such luck") as caught:
        client.wait_for_job(job_id, verbose=False)
    assert caught.value.job["job_id"] == job_id


def test_waiting_returns_on_cancellation(client: EvalClient) -> None:
    job_id = submit(client)
    client.cancel_job(job_id)
    assert client.wait_for_job(job_id, verbose=False)["status"] == "cancelled"


@pytest.mark.parametrize("poll_interval", [None, 0.01])
def test_waiting_has_a_limit(client: EvalClient, poll_interval: float | None) -> None:
    job_id = submit(client)
    with pytest.raises(TimeoutError, match=job_id):
        client.wait_for_job(job_id, poll_interval=poll_interval, timeout=0.05, verbose=False)


def test_an_error_names_the_field(client: EvalClient) -> None:
    with pytest.raises(EvalError, match="no such task") as caught:
        client.evaluate("hf", ["arc_esy"], {"pretrained": "/models/tiny"})
    error = caught.value
    assert isinstance(error, httpx.HTTPStatusError)
    assert error.response.status_code == httpx.codes.UNPROCESSABLE_ENTITY
    assert error.fields == [{"field": "tasks[0]", "problem": "no such task", "choices": ["arc_easy"]}]


def test_an_unknown_job(client: EvalClient) -> None:
    with pytest.raises(EvalError, match="Job nothing not found"):
        client.get_job("nothing")


def test_an_error_that_is_no_problem_document() -> None:
    response = httpx.Response(502, text="<html>", request=httpx.Request("GET", NOWHERE))
    assert EvalError(response).detail == "502 Bad Gateway"


async def test_the_async_client_does_the_same(url: str, pool: FakePool) -> None:
    async with AsyncEvalClient(url) as client:
        assert await client.is_healthy()
        assert "arc_easy" in await client.list_tasks()
        assert "hf" in await client.list_models()
        submitted = await client.evaluate("hf", ["arc_easy"], {"pretrained": "/models/tiny"}, limit=2)
        job_id = submitted["job_id"]
        assert (await client.get_queue_status())["queued_jobs"] == [job_id]
        assert await client.progress(job_id) is None
        assert await client.log(job_id) == ""
        job = await client.wait_for_job(job_id, on_progress=lambda _: complete(pool, job_id, 101))
        assert job["status"] == "completed"
        assert len([sample async for sample in client.samples(job_id, "arc_easy")]) == 101
        with pytest.raises(EvalError, match="already finished"):
            await client.cancel_job(job_id)
    async with AsyncEvalClient(NOWHERE) as nobody:
        assert not await nobody.is_healthy()
