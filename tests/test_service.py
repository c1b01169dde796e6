"""The running service: cancellation, lost processes, shared workers, changed models. Real processes, a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Generator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from evalpool_server import run_server
from service import PATIENCE_SECONDS, Service, await_end, until, write_tasks
from tiny_checkpoints import make_tiny

from server.client import EvalError, JobFailed

ENDLESS = 3000
"""Documents of a `long_story` that outlasts every test."""
DROP_SECONDS = 5.0
"""Steps take milliseconds; a worker that a loaded machine keeps waiting must not be taken for one that hangs."""

MODEL_PATIENCE_SECONDS = 3.0


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Generator[Service]:
    """Two CPU workers; a worker that hangs is killed soon."""
    folder = tmp_path_factory.mktemp("box")
    config = folder / "evalpool.toml"
    config.write_text(f"drop_timeout_s = {DROP_SECONDS}\nmodel_patience_s = {MODEL_PATIENCE_SECONDS}\n")
    tasks = write_tasks(folder / "tasks")
    arguments = ("--config", config, "--include-path", tasks, "--cpu-workers", 2)
    with run_server(folder / "data", *arguments) as server, Service(server) as service:
        yield service


@pytest.fixture(autouse=True)
def nothing_runs_on(request: pytest.FixtureRequest) -> Generator[None]:
    """A test that failed leaves no job to the next one."""
    yield
    if "box" in request.fixturenames:
        box: Service = request.getfixturevalue("box")
        for job_id in (queue := box.client.get_queue_status())["running_jobs"] + queue["queued_jobs"]:
            box.client.cancel_job(job_id)
            box.ended(job_id)


@pytest.fixture
def own_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the model that the test may spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "own-model"))


def occupy_all_evaluators(box: Service, model: Path) -> list[str]:
    """Jobs that run until they are cancelled: as many as there are evaluators."""
    running = [box.submit(model, "long_story", limit=ENDLESS) for _ in range(3)]
    for job_id in running:
        box.job_once(job_id, lambda job: job["status"] == "running", "it runs")
    return running


def check_workers_stayed_warm(box: Service, model: Path, before: dict[str, int]) -> None:
    """The next job gets the workers that were there before, which are those that are there."""
    following = box.finished(box.submit(model, "quick_choice", limit=4))
    assert set(following["progress"]["workers"]) <= set(before)
    assert box.worker_pids() == before


# ---------------------------------------------------------------- cancellation


def test_cancelling_a_running_job_keeps_its_worker_warm(box: Service, tiny_model: Path):
    job_id = box.submit(tiny_model, "long_story", limit=ENDLESS)
    box.answering(job_id)
    evaluator = box.evaluator_pid(job_id)
    before = box.worker_pids()
    box.client.cancel_job(job_id)
    job = box.client.wait_for_job(job_id, timeout=PATIENCE_SECONDS, verbose=False)
    assert (job["status"], job["result"]) == ("cancelled", None)
    await_end(evaluator)
    check_workers_stayed_warm(box, tiny_model, before)


def test_cancelling_queued_jobs(box: Service, tiny_model: Path):
    running = occupy_all_evaluators(box, tiny_model)
    queued = box.submit(tiny_model, "quick_choice", limit=4)
    assert box.job(queued)["position_in_queue"] == 0
    box.client.cancel_job(queued)
    job = box.job(queued)
    assert (job["status"], job["started_at"], job["position_in_queue"]) == ("cancelled", None, None)
    with pytest.raises(EvalError) as refused:
        box.client.cancel_job(queued)
    assert refused.value.response.status_code == 400
    for job_id in running:
        box.client.cancel_job(job_id)
    assert [box.ended(job_id)["status"] for job_id in running] == ["cancelled"] * 3


def test_cancelling_at_once(box: Service, tiny_model: Path):
    """Wherever the job is on its way from submission to its worker."""
    jobs = [box.submit(tiny_model, "long_story", limit=ENDLESS) for _ in range(6)]
    for job_id in reversed(jobs):
        box.client.cancel_job(job_id)
    assert [box.ended(job_id)["status"] for job_id in jobs] == ["cancelled"] * 6
    box.finished(box.submit(tiny_model, "quick_choice", limit=4))


def test_a_worker_that_hangs_is_killed_when_its_job_is_cancelled(box: Service, tiny_model: Path):
    job_id = box.submit(tiny_model, "long_story", limit=ENDLESS)
    box.answering(job_id)
    [worker] = box.workers_of(job_id)
    os.kill(worker["pid"], signal.SIGSTOP)
    box.client.cancel_job(job_id)
    assert box.ended(job_id)["status"] == "cancelled"
    await_end(worker["pid"])
    following = box.finished(box.submit(tiny_model, "quick_choice", limit=4))
    assert worker["worker_id"] not in following["progress"]["workers"]


# ---------------------------------------------------------------- limits of time


def test_a_job_that_runs_for_longer_than_it_may_fails_and_its_worker_stays_warm(box: Service, tiny_model: Path):
    box.finished(box.submit(tiny_model, "quick_choice", limit=4))
    before = box.worker_pids()
    job_id = box.submit(tiny_model, "long_story", limit=ENDLESS, timeout_s=3)
    job = box.ended(job_id)
    assert (job["status"], job["error"]) == ("failed", "it ran for longer than its timeout_s of 3 s")
    assert box.client.events(job_id)["events"][-1]["cause"] == job["error"]
    check_workers_stayed_warm(box, tiny_model, before)


def test_waiting_in_the_queue_is_not_counted_as_run(box: Service, tiny_model: Path):
    running = occupy_all_evaluators(box, tiny_model)
    queued = box.submit(tiny_model, "long_story", limit=ENDLESS, timeout_s=1)
    created = datetime.fromisoformat(box.job(queued)["created_at"])
    until(lambda: datetime.now(UTC) > created + timedelta(seconds=2), "it has waited for longer than it may run")
    assert box.job(queued)["status"] == "queued"
    box.client.cancel_job(running[0])
    job = box.ended(queued)
    assert job["error"] == "it ran for longer than its timeout_s of 1 s"
    started, ended = (datetime.fromisoformat(job[name]) for name in ("started_at", "completed_at"))
    assert ended - started > timedelta(seconds=1)


# ---------------------------------------------------------------- lost processes


def test_a_job_survives_its_worker(box: Service, tiny_model: Path):
    job_id = box.submit(tiny_model, "long_story", limit=400)
    box.answering(job_id)
    [worker] = box.workers_of(job_id)
    os.kill(worker["pid"], signal.SIGKILL)
    job = box.finished(job_id)
    assert job["attempt"] == 1
    assert len(job["progress"]["workers"]) == 2
    assert sum(job["progress"]["workers"].values()) == job["progress"]["total"] == 400
    assert box.client.samples_page(job_id)["total"] == 400


def test_a_job_survives_its_evaluator(box: Service, tiny_model: Path):
    job_id = box.submit(tiny_model, "long_story", limit=400)
    box.answering(job_id)
    workers = box.worker_pids()
    os.kill(box.evaluator_pid(job_id), signal.SIGKILL)
    job = box.finished(job_id)
    assert job["attempt"] == 2
    assert box.client.samples_page(job_id)["total"] == 400
    assert box.worker_pids() == workers


# ---------------------------------------------------------------- several workers, several jobs


def test_a_job_on_two_workers(box: Service, tiny_model: Path):
    endless = box.submit(tiny_model, "long_story", limit=ENDLESS, num_gpus=2)
    box.job_once(endless, lambda job: job["progress"] and len(job["progress"]["workers"]) == 2, "two workers answer")
    box.client.cancel_job(endless)
    box.ended(endless)
    job = box.finished(box.submit(tiny_model, "long_story", limit=200, num_gpus=2))
    served = job["progress"]["workers"]
    assert len(served) == 2
    assert min(served.values()) > 0
    assert sum(served.values()) == 200


def test_a_job_on_two_workers_gives_one_back_to_a_job_that_waits(box: Service, tiny_model: Path):
    large = box.submit(tiny_model, "long_story", limit=ENDLESS, num_gpus=2)
    box.job_once(large, lambda job: job["progress"] and len(job["progress"]["workers"]) == 2, "two workers answer")
    before = {worker["worker_id"] for worker in box.workers_of(large)}
    other = box.submit(tiny_model, "quick_choice", limit=4, model_args={"max_length": 2000})
    assert box.finished(other)["progress"]["workers"].keys().isdisjoint(before)
    job = box.job(large)
    assert (job["status"], job["attempt"]) == ("running", 1)
    until(lambda: len(box.workers_of(large)) == 2, "it grows again onto what nobody needs")


def test_three_jobs_overlap(box: Service, tiny_model: Path):
    jobs = [box.submit(tiny_model, "long_story", limit=ENDLESS) for _ in range(3)]
    for job_id in jobs:
        box.answering(job_id)
    assert sorted(box.client.get_queue_status()["running_jobs"]) == sorted(jobs)


def test_each_task_is_published_as_it_completes(box: Service, tiny_model: Path):
    job_id = box.submit(tiny_model, "quick_choice", "long_story", limit=ENDLESS)
    job = box.job_once(job_id, lambda job: job["metrics"], "it has its first scores")
    assert (job["status"], job["result"], list(job["metrics"])) == ("running", None, ["quick_choice"])
    assert 0 <= job["metrics"]["quick_choice"]["acc,none"] <= 1
    assert box.client.samples_page(job_id, "quick_choice")["total"] == ENDLESS
    with pytest.raises(EvalError):
        box.client.samples_page(job_id, "long_story")


# ---------------------------------------------------------------- how a model is computed


@pytest.mark.parametrize(
    ("model", "route", "reason"),
    [
        ("tiny_model", "tree", "self-check: logits differ by"),
        ("tiny_t5", "plain", "T5ForConditionalGeneration does not call transformers' attention interface"),
    ],
)
def test_the_route_of_a_model_is_told(
    box: Service, model: str, route: str, reason: str, request: pytest.FixtureRequest
):
    """By the job and its result file, and of each worker by GET /workers."""
    job = box.finished(box.submit(request.getfixturevalue(model), "quick_choice", limit=4))
    [files] = job["result"].values()
    told = json.loads(Path(files["results"]).read_text())["evalpool"]
    assert told["engine_routes"] == job["progress"]["routes"]
    [found] = told["engine_routes"]
    assert found["route"] == route
    assert found["reason"].startswith(reason)
    [served] = job["progress"]["workers"]
    descriptions = {worker["worker_id"]: worker["description"] for worker in box.client.workers()["workers"]}
    assert descriptions[served].endswith(f"; {route} route: {found['reason']}")


# ---------------------------------------------------------------- models that change


def log_probabilities(box: Service, job_id: str) -> list[float]:
    return [float(response[0]) for sample in box.client.samples(job_id) for response in sample["filtered_resps"]]


def test_overwritten_weights_are_another_model(box: Service, own_model: Path):
    first, again = (box.submit(own_model, "quick_choice", limit=4) for _ in range(2))
    first_job, again_job = box.finished(first), box.finished(again)
    make_tiny("model", own_model, "1")
    second = box.submit(own_model, "quick_choice", limit=4)
    second_job = box.finished(second)
    assert first_job["model"]["fingerprint"] == again_job["model"]["fingerprint"]
    assert first_job["model"]["fingerprint"] != second_job["model"]["fingerprint"]
    assert not set(first_job["progress"]["workers"]) & set(second_job["progress"]["workers"])
    assert log_probabilities(box, first) == pytest.approx(log_probabilities(box, again), rel=1e-5)
    assert log_probabilities(box, first) != pytest.approx(log_probabilities(box, second), rel=1e-2)


def test_a_model_that_vanishes_while_its_job_waits(box: Service, tiny_model: Path, own_model: Path):
    running = occupy_all_evaluators(box, tiny_model)
    make_tiny("model", own_model, "2")
    queued = box.submit(own_model, "quick_choice", limit=4)
    box.job_once(queued, lambda job: job["model"], "its model is known")
    shutil.rmtree(own_model)
    for job_id in running:
        box.client.cancel_job(job_id)
    with pytest.raises(JobFailed) as failed:
        box.client.wait_for_job(queued, timeout=PATIENCE_SECONDS, verbose=False)
    error = failed.value.job["error"]
    assert f"{own_model} does not exist on the server" in error
    assert "its files have not changed for 3 s (setting model_patience_s)" in error
    assert box.client.is_healthy()


def test_a_model_that_is_half_written_when_its_job_starts(box: Service, tiny_model: Path, own_model: Path):
    """As by training that overwrites its latest checkpoint: the job is of the content that there is in the end."""
    make_tiny("model", own_model, "3")
    running = occupy_all_evaluators(box, tiny_model)
    queued = box.submit(own_model, "quick_choice", limit=4)
    box.job_once(queued, lambda job: job["model"], "its model is known")
    weights = own_model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    for job_id in running:
        box.client.cancel_job(job_id)
    until(lambda: "requeued" in [each["event"] for each in box.client.events(queued)["events"]], "it begins anew")
    weights.write_bytes(whole)
    assert box.finished(queued)["retries"] == 0
    box.finished(again := box.submit(own_model, "quick_choice", limit=4))
    assert log_probabilities(box, queued) == pytest.approx(log_probabilities(box, again), rel=1e-5)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_corrupt_model(box: Service, own_model: Path, name: str):
    file = own_model / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    job = box.ended(box.submit(own_model, "quick_choice", limit=4))
    assert job["status"] == "failed"
    assert str(own_model) in job["error"]
    assert box.client.is_healthy()
