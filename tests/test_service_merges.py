"""Merges through the whole service: waited for or not, cancelled, cut off by a crash, and before an evaluation."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest
from evalpool_server import ROOT, Serve, run_server
from safetensors.numpy import load_file
from service import Json, Service, await_end, until, write_tasks

from server.client import EvalError, JobFailed

pytestmark = pytest.mark.slow


@pytest.fixture
def checkpoint(distcp_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(distcp_checkpoint, tmp_path / "checkpoint-10")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Generator[Service]:
    """A server that these tests share; each has a checkpoint of its own."""
    folder = tmp_path_factory.mktemp("service")
    flags = ("--cpu-workers", 1, "--include-path", write_tasks(folder / "tasks"))
    flags = (*flags, "--output-root", tmp_path_factory.getbasetemp())
    with run_server(folder / "data", *flags) as server, Service(server) as service:
        yield service


def hold(service: Service, job_id: str) -> int:
    """Stop the process of a merge that runs, or is about to; its pid."""
    service.job_once(job_id, lambda job: job["status"] == "running", "it runs")
    pid = until(lambda: _pid(service, job_id), "it has a process")
    os.kill(pid, signal.SIGSTOP)
    return pid


def _pid(service: Service, job_id: str) -> int | None:
    try:
        return service.evaluator_pid(job_id)
    except ValueError:
        return None


def weights(folder: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(folder / "model.safetensors").items()}


def test_a_merge_that_is_waited_for(service: Service, checkpoint: Path, tmp_path: Path):
    answer = service.client.merge_checkpoint(str(checkpoint), str(tmp_path / "out"), "ema")
    assert answer == {
        "success": True,
        "message": "Checkpoint merged successfully",
        "merged_path": str(tmp_path / "out"),
    }
    [job] = service.client.jobs(limit=1)["jobs"]
    assert (job["kind"], job["status"], job["phase"], job["merged_path"]) == (
        *("merge", "completed", None, str(tmp_path / "out")),
    )
    assert (job["progress"]["phase"], job["progress"]["done"]) == ("merging", job["progress"]["total"])
    assert job["request"]["checkpoint_type"] == "ema"
    assert [event["event"] for event in service.client.events(job["job_id"])["events"]] == [
        *("submitted", "started", "completed"),
    ]
    assert "merged into" in service.client.log(job["job_id"])
    done = service.finished(service.submit(tmp_path / "out", "quick_choice", limit=4))
    assert done["metrics"]["quick_choice"]


def test_in_place_as_the_reference_does_it(service: Service, checkpoint: Path):
    body = {"checkpoint_path": str(checkpoint), "output_path": None, "checkpoint_type": "regular"}
    answer = httpx.post(f"{service.server.url}/merge", json=body, timeout=None)
    assert answer.status_code == 200
    assert answer.json()["merged_path"] == str(checkpoint)
    assert service.finished(service.submit(checkpoint, "quick_choice", limit=4))["metrics"]


def test_what_goes_wrong_is_said_in_the_old_form_too(service: Service, checkpoint: Path, tmp_path: Path):
    shard = checkpoint / "pytorch_model_fsdp_0" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(EvalError, match=r"__1_0\.distcp is truncated: it has 1000 bytes") as refused:
        service.client.merge_checkpoint(str(checkpoint), str(tmp_path / "out"))
    assert refused.value.response.status_code == 400
    submitted = service.client.submit_merge(str(checkpoint), str(tmp_path / "out"))
    with pytest.raises(JobFailed, match="is truncated"):
        service.client.wait_for_job(submitted["job_id"], verbose=False)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".merging-*"))


def test_a_merge_in_the_background_is_shown_and_keeps_nobody_waiting(
    service: Service, checkpoint: Path, tiny_model: Path, tmp_path: Path
):
    response = httpx.post(
        f"{service.server.url}/merge",
        json={"checkpoint_path": str(checkpoint), "output_path": str(tmp_path / "a"), "tags": ["merge"]},
        headers={"Prefer": "respond-async"},
        timeout=None,
    )
    running = response.json()["job_id"]
    assert (response.status_code, response.headers["Location"]) == (202, f"/jobs/{running}")
    pid = hold(service, running)
    waiting = service.client.submit_merge(str(checkpoint), str(tmp_path / "b"))["job_id"]
    again = service.client.submit_merge(str(checkpoint), str(tmp_path / "a"))
    assert (again["job_id"], again["message"]) == (running, "The same merge is running already")
    queue = service.client.get_queue_status()
    assert (queue["running_jobs"], queue["queued_jobs"]) == ([running], [waiting])
    assert queue["waiting"][0]["reason"] == f"Job {running} is being merged."
    assert service.finished(service.submit(tiny_model, "quick_choice", limit=4))["metrics"]  # passes both
    os.kill(pid, signal.SIGCONT)
    for job_id, name in ((running, "a"), (waiting, "b")):
        assert service.finished(job_id)["merged_path"] == str(tmp_path / name)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert [job["job_id"] for job in service.client.jobs(tags=["merge"])["jobs"]] == [running]


def test_a_merge_can_be_cancelled(service: Service, checkpoint: Path, tmp_path: Path):
    running = service.client.submit_merge(str(checkpoint), str(tmp_path / "a"))["job_id"]
    pid = hold(service, running)
    waiting = service.client.submit_merge(str(checkpoint), str(tmp_path / "b"))["job_id"]
    for job_id in (waiting, running):
        service.client.cancel_job(job_id)
        assert service.ended(job_id)["status"] == "cancelled"
    await_end(pid)
    assert not list(tmp_path.glob(".merging-*"))
    assert not (tmp_path / "a").exists()
    with pytest.raises(EvalError, match="already finished"):
        service.client.cancel_job(running)


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_merge_survives_the_end_of_the_server(serve: Serve, checkpoint: Path, tmp_path: Path, end: str):
    data_dir, flags = tmp_path / "data", ("--cpu-workers", 1, "--output-root", tmp_path)
    with Service(serve(*flags, data_dir=data_dir)) as before:
        running = before.client.submit_merge(str(checkpoint), str(tmp_path / "a"))["job_id"]
        hold(before, running)
        waiting = before.client.submit_merge(str(checkpoint), str(tmp_path / "b"))["job_id"]
        cancelled = before.client.submit_merge(str(checkpoint), str(tmp_path / "c"))["job_id"]
        before.client.cancel_job(cancelled)
        getattr(before.server, end)()  # asserts that no process is left
        assert not (tmp_path / "a").exists()
    with Service(serve(*flags, data_dir=data_dir)) as after:
        assert after.finished(running)["attempt"] == 2
        assert after.finished(waiting)["attempt"] == 1
        assert after.job(cancelled)["status"] == "cancelled"
        events = [event["event"] for event in after.client.events(running)["events"]]
        assert events == ["submitted", "started", "requeued", "started", "completed"]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert not list(tmp_path.glob(".merging-*"))


def test_a_process_that_is_killed_is_replaced(service: Service, checkpoint: Path, tmp_path: Path):
    job_id = service.client.submit_merge(str(checkpoint), str(tmp_path / "a"))["job_id"]
    os.kill(hold(service, job_id), signal.SIGKILL)
    job = service.finished(job_id)
    assert (job["attempt"], job["retries"]) == (2, 1)


# ---------------------------------------------------------------- before an evaluation


def evaluate(service: Service, model: Path, **options: Any) -> str:
    return service.submit(model, "quick_choice", limit=4, **options)


def merges_of(service: Service, checkpoint: Path) -> list[Json]:
    jobs = service.client.jobs(limit=50)["jobs"]
    return [job for job in jobs if job["request"].get("checkpoint_path") == str(checkpoint)]


def refusal(service: Service, model: Path, **options: Any) -> Json:
    with pytest.raises(EvalError) as refused:
        evaluate(service, model, **options)
    assert refused.value.response.status_code == 422
    return refused.value.fields[0]


def test_a_sharded_checkpoint_is_merged_when_that_is_asked_for(service: Service, checkpoint: Path):
    jobs = {kind: evaluate(service, checkpoint, merge=kind) for kind in ("regular", "ema")}
    for kind, job_id in jobs.items():
        job = service.finished(job_id)
        assert job["model"]["args"]["pretrained"] == str(checkpoint / f"merged-{kind}")
        assert job["request"]["merge"] == kind
    merges = merges_of(service, checkpoint)
    assert {job["merged_path"] for job in merges} == {str(checkpoint / f"merged-{kind}") for kind in jobs}
    again = service.client.evaluate(str(checkpoint), ["quick_choice"], limit=4, device="cpu", merge="ema")["job_id"]
    assert service.finished(again)["metrics"] == service.job(jobs["ema"])["metrics"]
    assert merges_of(service, checkpoint) == merges  # it was merged already


def test_it_waits_for_its_merge_and_can_be_cancelled_meanwhile(service: Service, checkpoint: Path):
    cancelled, kept = evaluate(service, checkpoint, merge="ema"), evaluate(service, checkpoint, merge="ema")
    [merge] = until(lambda: merges_of(service, checkpoint), "it merges")
    pid = hold(service, merge["job_id"])
    waits = {wait["job_id"]: wait["reason"] for wait in service.client.get_queue_status()["waiting"]}
    assert waits == dict.fromkeys((cancelled, kept), f"Job {merge['job_id']} merges its checkpoint.")
    service.client.cancel_job(cancelled)
    assert service.job(cancelled)["status"] == "cancelled"
    os.kill(pid, signal.SIGCONT)
    assert service.finished(kept)["metrics"]


def test_an_evaluation_whose_checkpoint_cannot_be_merged_fails(service: Service, checkpoint: Path):
    (checkpoint / "pytorch_model_fsdp_0" / ".metadata").write_bytes(b"nonsense")
    job = service.ended(evaluate(service, checkpoint, merge="regular"))
    assert job["status"] == "failed"
    assert ".metadata is no metadata of torch.distributed.checkpoint" in job["error"]


def test_what_cannot_be_merged_is_refused(service: Service, checkpoint: Path, tiny_model: Path, tmp_path: Path):
    sharded = refusal(service, checkpoint)
    assert sharded["field"] == "model_args.pretrained"
    assert '"merge": "regular" (or "ema") has it merged first' in sharded["problem"]
    whole = refusal(service, tiny_model, merge="regular")
    assert whole["field"] == "merge"
    assert "has no regular shards" in whole["problem"]
    above = refusal(service, tmp_path, merge="regular")
    assert above["field"] == "model_args.pretrained"
    assert f"name one, such as {checkpoint}" in above["problem"]
    assert refusal(service, tmp_path / "nope", merge="ema")["field"] == "model_args.pretrained"
    assert refusal(service, checkpoint, merge="ema", model_args={"dtype": "int3"})["field"] == "model_args.dtype"
    assert refusal(service, checkpoint, merge="last")["field"] == "merge"


# ---------------------------------------------------------------- the command line


def test_the_command_line(service: Service, checkpoint: Path, tmp_path: Path):
    ran = evalpool(service, "merge", str(checkpoint), "--output", str(tmp_path / "out"), "--max-shard-bytes", "100000")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(tmp_path / "out")
    assert "100% of" in ran.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    listed = evalpool(service, "jobs").stdout
    assert "merge" in listed
    assert "checkpoint-10" in listed
    failed = evalpool(service, "merge", str(tmp_path / "nope"))
    assert failed.returncode == 1
    assert f"{tmp_path / 'nope'} not found" in failed.stderr
    job_id = evalpool(service, "merge", str(checkpoint), "--type", "ema", "--no-wait").stdout.strip()
    assert evalpool(service, "watch", job_id).stdout.strip() == str(checkpoint)


def evalpool(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "EVALPOOL_URL": service.server.url, "COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "server", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
