"""The command line as a person runs it: real processes against the real REST face."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import get_origin

import pytest
from fake_pool import FakePool
from live_server import live_server
from rich.console import Console

from gpu_pool.cache import CachedModel, ResponseCache, cache_path
from gpu_pool.records import JobResult, JobState, Phase, Progress, TaskProgress
from server import cli, cli_serve
from server.cli_view import JobBars
from server.client import EvalClient
from server.settings import FIELD_TYPES, Settings, flag_of

ROOT = Path(__file__).parents[2]
COMMAND_SECONDS = 120.0  # each takes about one on a quiet machine
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def live(tmp_path: Path) -> Generator[tuple[str, FakePool]]:
    with live_server(tmp_path) as running:
        yield running


@pytest.fixture
def pool(live: tuple[str, FakePool]) -> FakePool:
    return live[1]


def evalpool(*arguments: str, url: str = "http://127.0.0.1:9") -> subprocess.CompletedProcess[str]:
    """Run the command; narrow enough a terminal must not cut what scripts read."""
    environ = {**os.environ, "EVALPOOL_URL": url, "COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "server", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS
    )


@pytest.fixture
def run(live: tuple[str, FakePool]) -> Run:
    return lambda *arguments: evalpool(*arguments, url=live[0])


def submit(run: Run, *arguments: str) -> str:
    ran = run("submit", "--model", "hf", "--model-args", "pretrained=/models/tiny", "--tasks", "arc_easy", *arguments)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def complete(pool: FakePool, job_id: str) -> None:
    metrics = {"arc_easy": {"alias": "arc_easy", "acc,none": 0.4321, "acc_stderr,none": 0.0123}}
    result = JobResult(
        model_name="tiny", results_path="/out/r.json", samples={"arc_easy": "/out/s.jsonl"}, metrics=metrics
    )
    progress = Progress(phase=Phase.SCORING, tasks={"arc_easy": TaskProgress(done=4, total=4)})
    pool.change(job_id, state=JobState.COMPLETED, result=result, progress=progress)


def test_submit_prints_the_job_and_sends_every_option(run: Run, pool: FakePool) -> None:
    job_id = submit(
        run,
        *("--tasks", "piqa,mmlu"),
        *("--model-args", '{"dtype": "float32"}', "--limit", "8", "--num-fewshot", "2", "--batch-size", "4"),
        *("--device", "cpu", "--num-gpus", "0", "--gen-kwargs", "temperature=0", "--no-cache", "--predict-only"),
        *("--no-log-samples", "--apply-chat-template", "--system-instruction", "Be brief."),
    )
    evaluation = pool._jobs[job_id].evaluation
    assert evaluation.tasks == ("arc_easy", "piqa", "mmlu")
    assert evaluation.model_args == {"pretrained": "/models/tiny", "dtype": "float32"}
    assert (evaluation.limit, evaluation.num_fewshot, evaluation.batch_size) == (8, 2, 4)
    assert (evaluation.device, evaluation.num_gpus) == ("cpu", 0)
    assert evaluation.gen_kwargs == {"temperature": 0}
    assert (evaluation.use_cache, evaluation.predict_only, evaluation.log_samples) == (False, True, False)
    assert (evaluation.apply_chat_template, evaluation.system_instruction) == (True, "Be brief.")


@pytest.mark.parametrize(("text", "limit"), [("8", 8), ("0.25", 0.25)])
def test_limits(run: Run, pool: FakePool, text: str, limit: float) -> None:
    assert pool._jobs[submit(run, "--limit", text)].evaluation.limit == limit


def test_jobs_are_listed(run: Run, pool: FakePool) -> None:
    first, second = submit(run), submit(run)
    complete(pool, first)
    shown = run("jobs").stdout
    assert shown.index(second) < shown.index(first)
    assert "queued (0 ahead)" in shown
    assert "completed" in shown
    assert second not in run("jobs", "--status", "completed").stdout


def test_results_show_scores_with_errors_and_paths(run: Run, pool: FakePool) -> None:
    job_id = submit(run)
    complete(pool, job_id)
    shown = run("results", job_id)
    assert shown.returncode == 0
    for text in ("arc_easy", "acc", "0.4321", "0.0123", "/out/r.json", "/out/s.jsonl"):
        assert text in shown.stdout
    as_json = run("results", job_id, "--json").stdout
    assert json.loads(as_json)["arc_easy"]["acc,none"] == 0.4321


def test_errored_requests_are_shown_with_the_scores(run: Run, pool: FakePool) -> None:
    job_id = submit(run)
    metrics = {
        "arc_easy": {"acc,none": 0.4321, "evalpool_errored": 37},
        "piqa": {"acc,none": 0.5},
        "boolq": {"alias": "boolq", "evalpool_errored": 12},  # all of them: it has no scores
    }
    counts = {task: values.get("evalpool_errored", 0) for task, values in metrics.items()}
    tasks = {task: TaskProgress(done=99, total=99, errored=count) for task, count in counts.items()}
    result = JobResult(model_name="tiny", results_path="/out/r.json", metrics=metrics)
    progress = Progress(phase=Phase.SCORING, tasks=tasks)
    pool.change(job_id, state=JobState.COMPLETED, result=result, progress=progress)
    watched = run("watch", job_id)
    for table in (run("results", job_id).stdout, watched.stdout):
        rows = {row[0]: row for line in table.splitlines() if (row := line.replace("│", " ").split())}
        assert "Errored" in table
        assert [rows[task][-1] for task in metrics] == ["37", "0", "12"]
    for note in ("49 errored", "37 errored", "12 errored"):
        assert note in watched.stderr
    assert "49 errored" in run("jobs").stdout


def test_missing_scores_are_shown_with_their_reasons(run: Run, pool: FakePool) -> None:
    job_id = submit(run)
    metrics = {"mme": {"acc,none": 0.4321, "evalpool_missing": {"pairs,strict": "an image [2] is left out"}}}
    result = JobResult(model_name="tiny", results_path="/out/r.json", metrics=metrics)
    progress = Progress(phase=Phase.SCORING, tasks={"mme": TaskProgress(done=9, total=9)})
    pool.change(job_id, state=JobState.COMPLETED, result=result, progress=progress)
    shown = " ".join(run("results", job_id).stdout.replace("│", " ").split())
    assert "mme acc none 0.4321" in shown
    assert "mme pairs strict missing: an image [2] is left out" in shown


def test_watch_ends_with_the_job(run: Run, pool: FakePool) -> None:
    job_id = submit(run)
    complete(pool, job_id)
    watched = run("watch", job_id)
    assert watched.returncode == 0
    assert "4/4" in watched.stderr
    assert "0.4321" in watched.stdout


def test_who_watches_a_waiting_job_sees_why_it_waits(live: tuple[str, FakePool], run: Run) -> None:
    shown = StringIO()
    with EvalClient(live[0]) as client, JobBars(Console(file=shown, width=200)) as bars:
        bars.show(client.get_job(submit(run)))
    assert "none is free" in shown.getvalue()


def test_a_failed_job_is_a_failed_command(run: Run, pool: FakePool) -> None:
    job_id = submit(run)
    pool.change(job_id, state=JobState.FAILED, error="out of\nmemory [really]")
    for command in ("watch", "results"):
        ran = run(command, job_id)
        assert ran.returncode == 1
        assert ran.stderr.splitlines()[-1] == "error: the job is failed: out of memory [really]"


def test_cancel(run: Run, pool: FakePool) -> None:
    job_id = submit(run)
    assert "cancelled" in run("cancel", job_id).stdout
    assert pool._jobs[job_id].state is JobState.CANCELLED
    again = run("cancel", job_id)
    assert (again.returncode, again.stderr) == (1, "error: Job already finished or cancelled\n")


def test_gpus_are_shown_with_what_is_wrong_and_released(run: Run) -> None:
    ready, quarantined = (line.split() for line in run("gpus").stdout.splitlines() if "GPU-" in line)
    assert ready == ["0", "GPU-1", "H100", "79.0", "of", "80.0", "free"]
    assert " ".join(quarantined) == "1 GPU-2 H100 79.0 of 80.0 It is quarantined: its memory is not back."
    released = run("gpus", "release", "GPU-2")
    assert (released.returncode, released.stdout) == (0, "GPU 1 is released\n")
    assert "quarantined" not in run("gpus").stdout
    for uuid, words in (("GPU-2", "is not quarantined"), ("GPU-9", "there are GPU-1, GPU-2")):
        refused = run("gpus", "release", uuid)
        assert refused.returncode == 1
        assert refused.stderr.startswith("error: ")
        assert words in refused.stderr


def test_the_cache_is_shown_and_pruned(run: Run, pool: FakePool) -> None:
    with closing(ResponseCache(cache_path(pool.folder))) as cache:
        cache.store({b"a": "text"}, CachedModel("ab" * 32, "/models/one"))
    title, _, *rows = run("cache", "stats").stdout.splitlines()
    assert title.startswith("1 answers in ")
    assert "10737418240 bytes" in title
    [row] = [row for row in rows if "/models/one" in row]
    assert "abababababab" in row
    unknown = run("cache", "prune", "--model", "/models/two")
    assert (unknown.returncode, "/models/one" in unknown.stderr) == (1, True)
    assert run("cache", "prune").stdout.startswith("0 answers deleted")
    assert run("cache", "prune", "--older-than-days", "0").stdout.startswith("1 answers deleted")
    assert json.loads(run("cache", "stats", "--json").stdout)["entries"] == 0


def test_an_error_is_one_line_with_the_field(run: Run) -> None:
    ran = run("submit", "--model", "hf", "--tasks", "arc_esy")
    assert ran.returncode == 1
    assert ran.stderr == "error: tasks[0]: no such task (choices: arc_easy)\n"


def test_no_server() -> None:
    ran = evalpool("jobs")
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: no server answers at http://127.0.0.1:9")
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "flags", [("--port", "65536"), ("--config", "/nowhere.toml"), ("--cpu-workers", "-1"), ("--idle-worker-s", "-1")]
)
def test_serve_refuses_bad_settings(flags: tuple[str, str]) -> None:
    ran = evalpool("serve", *flags)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1


def test_each_setting_but_tables_has_a_flag_with_its_meaning() -> None:
    ran = evalpool("serve", "--help")
    assert ran.returncode == 0, ran.stderr
    shown = ran.stdout.replace("\n", " ")
    for name, type_ in FIELD_TYPES.items():
        assert (f"{flag_of(name)} " in shown) == (get_origin(type_) is not dict), name
    assert "--allow-gpu " in shown
    assert "Most GPUs that workers hold at once" in shown


def test_flags_become_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "evalpool.toml"
    config.write_text("idle_worker_s = 7\nmax_workers_per_gpu = 3\nallow_judges = true\nallow_gpus = ['0']\n")
    served: list[Settings] = []
    monkeypatch.setattr(cli_serve, "serve", served.append)
    monkeypatch.chdir(tmp_path)
    text = "--idle-worker-s 5 --no-allow-judges --deny-gpu 3 --deny-gpu GPU-4 --gpu-lock-dir locks --allow-remote-code"
    cli_serve.run([*text.split(), "--log-level", "debug", "--config", str(config)], "evalpool serve")
    [settings] = served
    pool = settings.pool
    assert (settings.log_level, pool.idle_worker_s, pool.max_workers_per_gpu) == ("debug", 5.0, 3)
    assert (pool.allow_judges, pool.allow_remote_code, pool.yield_to_foreign) == (False, True, False)
    assert (pool.allow_gpus, pool.deny_gpus, pool.gpu_lock_dir) == (("0",), ("3", "GPU-4"), tmp_path / "locks")


def test_the_readme_lists_settings_that_there_are() -> None:
    table = (ROOT / "README.md").read_text().partition("| setting | default |")[2].partition("\n\n")[0]
    names = [name for row in table.splitlines()[2:] for name in re.findall("`([a-z_]+)`", row.split("|")[1])]
    assert len(names) > 15
    assert set(names) <= FIELD_TYPES.keys()


def test_values_of_model_args() -> None:
    assert cli._pairs(["a=1,b=true", "c=x y,d=null", '{"e": [1, 2]}']) == {
        "a": 1,
        "b": True,
        "c": "x y",
        "d": None,
        "e": [1, 2],
    }
    assert cli._pairs([]) is None
