"""The response cache of a running service: requests shared by jobs at the same time, and jobs that are resumed."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterable
from pathlib import Path

import pytest
from evalpool_server import Serve, run_server
from service import Gate, Json, Service, write_tasks

from gpu_pool.lasting import RELATIVE_TOLERANCE, differences, lasting_results, sample_differences

DOCUMENTS = 120
MANY_DOCUMENTS = 600
"""Too many to be done before it is seen that some are."""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Generator[Service]:
    """Two CPU workers and two jobs at a time."""
    folder = tmp_path_factory.mktemp("box")
    config = folder / "evalpool.toml"
    config.write_text("evaluators = 2\n")
    arguments = ("--config", config, "--include-path", write_tasks(folder / "tasks"), "--cpu-workers", 2)
    with run_server(folder / "data", *arguments) as server, Service(server) as service:
        yield service


def computed(jobs: Iterable[Json]) -> int:
    """Requests that workers answered for these jobs."""
    return sum(sum(job["progress"]["workers"].values()) for job in jobs)


def results_path(job: Json) -> Path:
    [files] = job["result"].values()
    return Path(files["results"])


def samples_paths(job: Json) -> list[Path]:
    [files] = job["result"].values()
    return [Path(path) for path in files["samples"]]


def check_same(one: Json, other: Json, tolerance: float = 0.0) -> None:
    """Both jobs gave the same files, volatile fields aside; without tolerance byte for byte."""
    first, second = lasting_results(results_path(one)), lasting_results(results_path(other))
    for results in (first, second):
        del results["config"]["use_cache"]  # as the jobs were asked
    assert differences(first, second, tolerance) == []
    assert len(samples_paths(one)) == len(samples_paths(other)) > 0
    for mine, others in zip(samples_paths(one), samples_paths(other), strict=True):
        assert sample_differences(mine, others, tolerance) == []
        if not tolerance:
            assert mine.read_bytes() == others.read_bytes()


# ---------------------------------------------------------------- at the same time


def test_two_jobs_compute_the_same_requests_once(box: Service, tiny_model: Path):
    tasks = {"limit": DOCUMENTS, "use_cache": True, "random_seed": 1}
    jobs = [box.submit(tiny_model, "long_story", "quick_choice", **tasks) for _ in range(2)]
    ended = [box.finished(job) for job in jobs]
    total = ended[0]["progress"]["total"]
    assert computed(ended) == total == 3 * DOCUMENTS
    assert sum(job["progress"]["cached"] for job in ended) == total
    check_same(*ended)


def test_the_other_job_takes_over_what_a_cancelled_one_had(box: Service, tiny_model: Path):
    options = {"limit": MANY_DOCUMENTS, "use_cache": True, "system_instruction": "cancelled"}
    jobs = [box.submit(tiny_model, "long_story", **options, apply_chat_template=True) for _ in range(2)]
    box.answering(jobs[0])
    box.client.cancel_job(jobs[0])
    assert box.finished(jobs[1])["progress"]["done"] == MANY_DOCUMENTS
    assert box.ended(jobs[0])["status"] == "cancelled"


def test_the_other_job_takes_over_what_a_killed_evaluator_had(box: Service, tiny_model: Path):
    options = {"limit": MANY_DOCUMENTS, "use_cache": True, "system_instruction": "killed"}
    jobs = [box.submit(tiny_model, "long_story", **options, apply_chat_template=True) for _ in range(2)]
    box.answering(jobs[0])
    os.kill(box.evaluator_pid(jobs[0]), signal.SIGKILL)
    ended = [box.finished(job) for job in jobs]
    assert ended[0]["attempt"] == 2
    check_same(*ended)


# ---------------------------------------------------------------- resumed


@pytest.mark.parametrize(("deterministic", "documents"), [(True, 12), (False, 40)])
def test_a_job_resumed_with_fewer_workers(
    serve: Serve, tiny_model: Path, tmp_path: Path, deterministic: bool, documents: int
):
    folder, data_dir = write_tasks(tmp_path / "tasks"), tmp_path / "data"
    gate = Gate(folder)
    tasks = ("long_story", "quick_choice", "gated_choice")
    options = {"limit": documents, "deterministic": deterministic, "num_gpus": 2}
    with Service(serve("--cpu-workers", 2, "--include-path", folder, data_dir=data_dir)) as before:
        job = before.submit(tiny_model, *tasks, use_cache=True, **options)
        before.answering(job)
        before.server.kill()
    gate.open()
    with Service(serve("--cpu-workers", 1, "--include-path", folder, data_dir=data_dir)) as after:
        resumed = after.finished(job)
        assert resumed["attempt"] == 2
        assert resumed["progress"]["cached"] > 0
        assert computed([resumed]) > 0
        assert resumed["progress"]["cached"] + computed([resumed]) == resumed["progress"]["total"]
        quiet = after.finished(after.submit(tiny_model, *tasks, use_cache=False, **options | {"num_gpus": 1}))
        assert computed([quiet]) == quiet["progress"]["total"]
    check_same(resumed, quiet, 0.0 if deterministic else RELATIVE_TOLERANCE)
