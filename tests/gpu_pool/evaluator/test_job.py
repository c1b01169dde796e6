"""Real evaluator processes; their workers are small fakes, so that every step can be held and every loss provoked."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from fake_worker import Behaviour, Chunk, FakeWorker, answer, failing, silent

from gpu_pool import chunk_messages as data
from gpu_pool import messages as msg
from gpu_pool.records import TaskProgress

CHOICE_REQUESTS = 3 * 12


@pytest.fixture(scope="module")
def evaluator(start_evaluator):
    """Shared by the tests here, one job after the other."""
    return start_evaluator()


@pytest.fixture
def job_id(request: pytest.FixtureRequest) -> str:
    return request.node.name


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator:
    """Start a fake worker; returns its address."""
    workers: list[FakeWorker] = []

    def start(behaviour: Behaviour = answer, **options: str) -> Path:
        workers.append(FakeWorker(f"w{len(workers)}", tmp_path / f"w{len(workers)}", behaviour, **options))
        return workers[-1].address

    yield start
    for worker in workers:
        worker.close()


def test_a_task_is_published_while_another_runs(evaluator, job_id, start_worker) -> None:
    release = threading.Event()

    def hold_scoring(worker: FakeWorker, chunk: object) -> msg.Message:
        if isinstance(chunk, data.LoglikelihoodChunk):
            release.wait()
        return answer(worker, chunk)

    evaluator.start(job_id, tasks=("local_generation", "local_choice"), use_cache=False)
    evaluator.attach(job_id, "w", start_worker(hold_scoring))
    first = evaluator.receive()
    assert isinstance(first, msg.TaskDone)
    assert first.task == "local_generation"
    assert len(Path(first.samples_path).read_text().splitlines()) == 12 * 2  # documents, filters
    release.set()
    *_, done = evaluator.finish()
    assert isinstance(done, msg.JobDone)
    assert done.progress.workers == {"w": CHOICE_REQUESTS + 24}


def test_the_first_requests_are_answered_while_others_are_built(
    evaluator, job_id, start_worker, local_tasks: Path
) -> None:
    def let_go(worker: FakeWorker, chunk: object) -> msg.Message:
        if not worker.chunks:
            (local_tasks / "held.fifo").open("w").close()
        return answer(worker, chunk)

    evaluator.start(job_id, tasks=("local_held",), use_cache=False)
    evaluator.attach(job_id, "w", start_worker(let_go))
    *_, done = evaluator.finish()
    assert done.progress.tasks["local_held"] == TaskProgress(done=100, total=100)
    assert len(Path(done.result.samples["local_held"]).read_text().splitlines()) == 100


def test_a_lost_worker_costs_nothing(evaluator, job_id, start_worker) -> None:
    evaluator.start(job_id, tasks=("local_choice",), use_cache=False)
    has_chunk = threading.Event()

    def hang(worker: FakeWorker, chunk: object) -> None:
        has_chunk.set()
        silent(worker, chunk)

    evaluator.attach(job_id, "w0", start_worker(hang))
    has_chunk.wait()
    evaluator.send(msg.DetachWorker(job_id=job_id, worker_id="w0"))
    evaluator.attach(job_id, "w1", start_worker())
    *_, done = evaluator.finish()
    assert done.progress.workers == {"w1": CHOICE_REQUESTS}


def test_a_failure_names_the_task_and_leaves_the_evaluator_ready(evaluator, job_id, start_worker) -> None:
    job_dir = evaluator.start(job_id, tasks=("local_choice",), use_cache=False)
    evaluator.attach(job_id, "w", start_worker(failing))
    (failed,) = evaluator.finish()
    assert isinstance(failed, msg.JobFailed)
    assert re.fullmatch(
        r"local_choice: 1 of 36 requests( so far)? ended in an error \(2.78%, more than max_error_share 0 allows\): "
        r"out of memory \(1\)",
        failed.error,
    )
    assert "Traceback" in (job_dir / "job.log").read_text()


def failing_on_the_first(worker: FakeWorker, chunk: Chunk) -> msg.Message:
    """Fail, politely, whenever the first sequence that this worker has seen is asked for."""
    sequences = [
        tuple(tokens) for tokens in (chunk.sequences if hasattr(chunk, "sequences") else chunk.prompts).unpack()
    ]
    worker.first = getattr(worker, "first", sequences[0])
    if worker.first in sequences:
        return data.ChunkFailed(chunk_id=chunk.chunk_id, error="RuntimeError: a bad number")
    return answer(worker, chunk)


def test_a_job_within_its_error_share_completes_and_says_what_is_missing(evaluator, job_id, start_worker) -> None:
    ours = {"tasks": ("local_choice", "local_generation"), "system_instruction": job_id}  # not cached by other tests
    evaluator.start(job_id, max_error_share=0.1, **ours)
    evaluator.attach(job_id, "w", start_worker(failing_on_the_first))
    *published, done = evaluator.finish()
    assert isinstance(done, msg.JobDone)
    metrics = {message.task: message.metrics for message in published if isinstance(message, msg.TaskDone)}
    assert metrics["local_choice"]["evalpool_errored"] == 1
    assert done.result.errored == {"local_choice": 1}
    assert done.progress.tasks["local_choice"] == TaskProgress(done=36, total=36, errored=1)
    assert done.progress.tasks["local_generation"].errored == 0
    assert [metrics.get("evalpool_errored") for metrics in done.result.metrics.values()] == [1, None]

    results = json.loads(Path(done.result.results_path).read_text())
    assert results["evalpool"]["errors"] == {
        "errored": 1,
        "max_error_share": 0.1,
        "tasks": {
            "local_choice": {
                "answered": 35,
                "errored_excluded": 1,
                "documents_excluded": 1,
                "causes": {"RuntimeError: a bad number": 1},
            },
            "local_generation": {"answered": 24, "errored_excluded": 0, "documents_excluded": 0, "causes": {}},
        },
    }
    assert results["results"] == done.result.metrics
    assert results["n-samples"]["local_choice"] == {"original": 12, "effective": 11}
    samples = [json.loads(line) for line in Path(done.result.samples["local_choice"]).read_text().splitlines()]
    assert len(samples) == 12
    (errored,) = [sample for sample in samples if "evalpool_error" in sample]
    assert errored["evalpool_error"] == "RuntimeError: a bad number"
    assert "acc" not in errored
    scored = [sample["acc"] for sample in samples if sample is not errored]
    assert results["results"]["local_choice"]["acc,none"] == statistics.mean(scored)

    evaluator.start(f"{job_id}-again", **ours)
    evaluator.attach(f"{job_id}-again", "w", start_worker())
    *_, again = evaluator.finish()
    assert again.progress.workers == {"w": 1}, "what ended in an error is not cached, all else is"
    assert again.result.errored == {}


def test_an_empty_choice_is_the_error_of_its_sample(evaluator, job_id, start_worker) -> None:
    """Before anything is asked, and as if a worker had found it out."""
    evaluator.start(job_id, tasks=("local_blank", "local_choice"), use_cache=False, max_error_share=0.1)
    evaluator.attach(job_id, "w", start_worker())
    *_, done = evaluator.finish()
    assert isinstance(done, msg.JobDone)
    assert done.result.errored == {"local_blank": 4}
    assert done.progress.tasks["local_blank"] == TaskProgress(done=24, total=24, errored=4)
    samples = [json.loads(line) for line in Path(done.result.samples["local_blank"]).read_text().splitlines()]
    why = "A context or continuation has no tokens: there is nothing to score"
    assert [sample.get("evalpool_error") for sample in samples] == [None, why, None] * 4
    evaluator.start(f"{job_id}-strict", tasks=("local_blank",), use_cache=False)
    (failed,) = evaluator.finish()
    assert failed.error.startswith("local_blank: 1 of 24 requests so far ended in an error")
    assert why in failed.error


@pytest.mark.parametrize("task", ["local_generation", "local_choice"])
def test_what_was_computed_the_plain_way_is_in_the_results(task, evaluator, job_id, start_worker) -> None:
    def leave(worker: FakeWorker, chunk: Chunk) -> msg.Message:
        return msgspec.structs.replace(answer(worker, chunk), plainly="it is too long")

    for behaviour, told in ((leave, ["it is too long"]), (answer, [])):
        evaluator.start(f"{job_id}-{len(told)}", tasks=(task,), use_cache=False)
        evaluator.attach(f"{job_id}-{len(told)}", "w", start_worker(behaviour))
        *_, done = evaluator.finish()
        results = json.loads(Path(done.result.results_path).read_text())
        assert results["evalpool"]["engine_plain_requests"] == told


def test_every_route_by_which_workers_compute_is_told_once(evaluator, job_id, start_worker) -> None:
    """Also that of one that is gone."""
    evaluator.start(job_id, tasks=("local_choice",), use_cache=False)
    for worker_id, reason in (("w0", "no memory"), ("w1", "no memory"), ("w2", "a self-check")):
        asked = threading.Event()

        def hang(worker: FakeWorker, chunk: object, asked: threading.Event = asked) -> None:
            asked.set()
            silent(worker, chunk)

        evaluator.attach(job_id, worker_id, start_worker(hang, route_reason=reason))
        asked.wait()
        evaluator.send(msg.DetachWorker(job_id=job_id, worker_id=worker_id))
    evaluator.attach(job_id, "w3", start_worker(route_reason="no memory"))
    *_, done = evaluator.finish()
    assert isinstance(done, msg.JobDone)
    assert [(told.route, told.reason) for told in done.progress.routes] == [
        ("plain", "no memory"),
        ("plain", "a self-check"),
    ]
    results = json.loads(Path(done.result.results_path).read_text())
    assert results["evalpool"]["engine_routes"] == [
        {"route": "plain", "reason": "no memory"},
        {"route": "plain", "reason": "a self-check"},
    ]


def test_a_task_without_any_answer_has_no_scores(evaluator, job_id, start_worker) -> None:
    evaluator.start(job_id, tasks=("local_group",), use_cache=False, limit=2, max_error_share=1.0)
    evaluator.attach(job_id, "w", start_worker(failing))
    *_, done = evaluator.finish()
    assert isinstance(done, msg.JobDone)
    assert sum(done.result.errored.values()) == done.progress.total == done.progress.errored
    assert not any("," in key for metrics in done.result.metrics.values() for key in metrics)
    assert done.result.metrics["local_group"]["evalpool_errored"] == done.progress.total
    samples = [json.loads(line) for line in Path(done.result.samples["local_choice"]).read_text().splitlines()]
    assert [sample["evalpool_error"] for sample in samples] == ["out of memory"] * 2


def test_an_error_share_is_judged_when_all_requests_are_known(evaluator, job_id, start_worker) -> None:
    evaluator.start(job_id, tasks=("local_choice",), use_cache=False, max_error_share=0.02)
    evaluator.attach(job_id, "w", start_worker(failing_on_the_first))
    (failed,) = evaluator.finish()
    assert failed.error == (
        "local_choice: 1 of 36 requests ended in an error (2.78%, more than max_error_share 0.02 allows): "
        "RuntimeError: a bad number (1)"
    )


@pytest.mark.parametrize(
    ("gen_kwargs", "problem"),
    [
        ({"max_gen_toks": 5000}, "max_gen_toks (5000) must be less than the model's maximum sequence length (2048)"),
        ({"max_gen_toks": 0}, "generation_kwargs.max_gen_toks must be 1 or more, not 0"),
    ],
)
def test_a_job_that_cannot_be_built(gen_kwargs, problem, evaluator, job_id, start_worker) -> None:
    evaluator.start(job_id, tasks=("local_generation",), gen_kwargs=gen_kwargs)
    (failed,) = evaluator.finish()
    assert failed.error == f"local_generation: {problem}"


def test_a_second_run_comes_from_the_cache(evaluator, job_id, start_worker) -> None:
    tasks = ("local_choice", "local_rolling", "local_generation")
    evaluator.start(job_id, tasks=tasks)
    evaluator.attach(job_id, "w", start_worker())
    *_, first = evaluator.finish()
    assert first.progress.cached == 0
    evaluator.start(f"{job_id}-again", tasks=tasks)
    *_, again = evaluator.finish()  # no worker at all
    assert again.progress.cached == again.progress.total == first.progress.total
    assert again.result.metrics == first.result.metrics
    assert set(again.result.samples.values()).isdisjoint(first.result.samples.values())


def test_sampling_is_not_cached_and_has_a_seed_for_each_repeat(evaluator, job_id, tmp_path) -> None:
    options = {"tasks": ("local_generation",), "limit": 1, "gen_kwargs": {"do_sample": True, "temperature": 0.7}}
    seeds = []
    for attempt in ("a", "b"):
        worker = FakeWorker("w", tmp_path / attempt)
        evaluator.start(job_id + attempt, **options)
        evaluator.attach(job_id + attempt, "w", worker.address)
        *_, done = evaluator.finish()
        assert done.progress.workers == {"w": 2}
        seeds.append([seed for chunk in worker.chunks for seed in chunk.seeds])
        worker.close()
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 2


def test_a_system_instruction_is_never_left_out(evaluator, job_id, tiny_model: Path, spec_of, tmp_path: Path) -> None:
    refusing = shutil.copytree(tiny_model, tmp_path / "refusing")
    (refusing / "chat_template.jinja").write_text("{{ raise_exception('No') if messages[0].role == 'system' }}")
    options = {"tasks": ("local_generation",), "apply_chat_template": True, "system_instruction": "Be brief."}
    evaluator.start(job_id, spec_of(refusing), use_cache=False, **options)
    failed = evaluator.finish()[-1]
    assert isinstance(failed, msg.JobFailed)
    assert failed.error == ("local_generation: system_instruction: the model's chat template takes no system turn")


def test_a_checkpoint_that_changed_after_submission(
    evaluator, job_id, start_worker, tiny_model: Path, spec_of, tmp_path: Path
) -> None:
    latest = shutil.copytree(tiny_model, tmp_path / "latest")
    with (latest / "tokenizer_config.json").open("a") as file:
        file.write("\n")
        file.flush()
        submitted = spec_of(latest)  # content that no other test has made the evaluator warm for
        file.write("\n")
    evaluator.start(job_id, submitted, tasks=("local_choice",), use_cache=False)
    evaluator.attach(job_id, "w", start_worker())  # a warm replica of what was there before
    assert evaluator.finish() == [
        msg.JobFailed(job_id=job_id, error=f"{latest} has changed since the job was submitted", content_changed=True)
    ]


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_checkpoint_that_is_half_written_when_its_job_begins(
    evaluator, job_id, tiny_model: Path, spec_of, tmp_path: Path, name: str
) -> None:
    latest = shutil.copytree(tiny_model, tmp_path / "latest")
    with (latest / "tokenizer_config.json").open("a") as file:
        file.write("\n" * (2 + len(name)))  # content that no other test has made the evaluator warm for
    submitted = spec_of(latest)
    whole = (latest / name).read_bytes()
    (latest / name).write_bytes(whole[: len(whole) // 2])
    evaluator.start(job_id, submitted, tasks=("local_choice",), use_cache=False)
    [failed] = evaluator.finish()
    assert str(latest) in failed.error
    assert failed.content_changed


def test_a_log_that_cannot_be_written_costs_the_log_not_the_job(evaluator, job_id, start_worker, tmp_path) -> None:
    for number, log_path in enumerate([Path("/dev/full"), tmp_path, tmp_path / "file" / "below" / "job.log"]):
        (tmp_path / "file").touch()
        evaluator.start(f"{job_id}-{number}", log_path=log_path, tasks=("local_choice",), use_cache=False, limit=2)
        evaluator.attach(f"{job_id}-{number}", f"w{number}", start_worker())
        assert isinstance(evaluator.finish()[-1], msg.JobDone)
    assert "belongs into another log: [Errno 20]" in (evaluator.folder / "evaluator.log").read_text()


def test_questions_between_jobs(evaluator) -> None:
    evaluator.send(msg.CheckTasks(check_id=7, tasks=("local_choice", "local_choise")))
    checked = evaluator.receive()
    assert checked.check_id == 7
    assert [problem.task for problem in checked.problems] == ["local_choise"]
    evaluator.send(msg.BuildCatalogue())
    names = {entry.name for entry in evaluator.receive().entries}
    assert {"local_choice", "local_group"} <= names


def test_the_process_ends_with_its_pipe_even_in_a_job(start_evaluator, job_id) -> None:
    evaluator = start_evaluator()
    evaluator.start(job_id, tasks=("local_choice",), use_cache=False)  # without a worker it cannot end by itself
    evaluator.send(msg.Shutdown())
    with pytest.raises(EOFError):
        evaluator.receive()
