"""Models behind endpoints in the running service, which asks a real HTTP server."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest
from digits import GENERATION, held_out, write_digits, write_task
from evalpool_server import failing_serve, run_server
from fake_openai import Failure, FakeOpenAI, openai_server
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from PIL import Image
from service import CHOICE, PATIENCE_SECONDS, STORY, Json, Service, until, write_task_files
from tiny_completions import TinyCompletions

from server.client import EvalError

KEY, OTHER_KEY = "sk-chat-0123456789abcdef", "sk-tiny-fedcba9876543210"
DOCUMENTS = 6


@pytest.fixture(scope="module")
def chat() -> Generator[FakeOpenAI]:
    with openai_server(key=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Generator[FakeOpenAI]:
    with openai_server(key=OTHER_KEY, complete=TinyCompletions(tiny_model)) as server:
        yield server


@pytest.fixture(scope="module")
def box(chat: FakeOpenAI, tiny: FakeOpenAI, tmp_path_factory: pytest.TempPathFactory) -> Generator[Service]:
    """One CPU worker, and two endpoints: one whose key is in the environment, and one whose key is in a file."""
    folder = tmp_path_factory.mktemp("box")
    tasks = write_digits(folder / "tasks")
    story = STORY.replace("max_gen_toks: 160", "max_gen_toks: 12")
    write_task_files(tasks, {"choice": CHOICE, "story": story}, DOCUMENTS)
    write_task(tasks, "digits", tasks / "digits.parquet", GENERATION)
    (folder / "key").write_text(f"{OTHER_KEY}\n")
    (folder / "evalpool.toml").write_text(
        f"""
[endpoints.talk]
base_url = "{chat.url}"
model = "gpt-test"
key_env = "TALK_KEY"
num_concurrent = 3
max_retries = 2
retry_pause_s = 0.01

[endpoints.tiny]
base_url = "{tiny.url}"
kind = "completions"
key_file = "key"
logprobs = true
cache = true
retry_pause_s = 0.01
"""
    )
    arguments = ("--config", folder / "evalpool.toml", "--include-path", tasks, "--cpu-workers", 1)
    variables = {"TALK_KEY": KEY}
    with run_server(folder / "data", *arguments, variables=variables) as server, Service(server) as service:
        yield service
        for key in (KEY, OTHER_KEY):
            assert not [path for path in (server.log, *server.data_dir.rglob("*")) if holds(path, key)]


def holds(path: Path, text: str) -> bool:
    return path.is_file() and text.encode() in path.read_bytes()


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    """Endpoints that have seen nothing yet."""
    for name in ("chat", "tiny"):
        if name in request.fixturenames:
            fake: FakeOpenAI = request.getfixturevalue(name)
            fake.bodies.clear()
            fake.headers.clear()
            fake.failures.clear()


def ask(box: Service, model: str, *tasks: str, **options: Any) -> str:
    args = options.pop("model_args", {})
    return box.client.evaluate(model, list(tasks), args, num_gpus=0, **options)["job_id"]


def samples(box: Service, job: Json, task: str) -> list[Json]:
    return sorted(box.client.samples(job["job_id"], task), key=lambda sample: sample["doc_id"])


def test_it_scores_there_what_it_scores_here(box: Service, tiny: FakeOpenAI, tiny_model: Path) -> None:
    here = box.finished(box.submit(tiny_model, "choice", "story", model_args={"dtype": "float32"}))
    args = {"model": "tiny", "tokenizer": str(tiny_model), "num_concurrent": 2}
    there = box.finished(ask(box, "local-completions", "choice", "story", model_args=args, use_cache=False))
    assert there["metrics"] == here["metrics"]
    for one, other in zip(samples(box, here, "story"), samples(box, there, "story"), strict=True):
        assert one["resps"] == other["resps"]
    for one, other in zip(samples(box, here, "choice"), samples(box, there, "choice"), strict=True):
        for (score, greedy), (score_there, greedy_there) in zip(
            one["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert float(score) == pytest.approx(float(score_there), rel=1e-5)
            assert greedy == greedy_there
    assert len(tiny.bodies) == 3 * DOCUMENTS
    assert tiny.most_at_once <= 2
    assert {body["model"] for body in tiny.bodies} == {"tiny"}


def test_scores_are_those_of_lm_evals_own_class(
    box: Service, tiny: FakeOpenAI, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", OTHER_KEY)
    theirs = simple_evaluate(
        model="local-completions",
        model_args={"model": "m", "base_url": f"{tiny.url}/completions", "tokenizer": str(tiny_model)},
        tasks=["choice", "story"],
        task_manager=TaskManager(include_path=str(box.server.data_dir.parent / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    args = {"base_url": f"{tiny.url}/completions", "model": "m", "tokenizer": str(tiny_model)}
    job = box.finished(ask(box, "local-completions", "choice", "story", model_args=args, use_cache=False))
    assert theirs is not None
    assert job["metrics"]["choice"]["acc,none"] == theirs["results"]["choice"]["acc,none"]
    for task in ("choice", "story"):
        for one, other in zip(samples(box, job, task), theirs["samples"][task], strict=True):
            assert [[str(part) for part in resp] for resp in one["resps"][0]] == [
                [str(part) for part in resp] for resp in other["resps"][0]
            ]


def test_answers_come_from_the_cache_where_the_operator_allows_it(
    box: Service, tiny: FakeOpenAI, tiny_model: Path
) -> None:
    args = {"model": "tiny", "tokenizer": str(tiny_model)}
    first = box.finished(ask(box, "local-completions", "choice", model_args=args))
    asked = len(tiny.bodies)
    second = box.finished(ask(box, "local-completions", "choice", model_args=args))
    assert len(tiny.bodies) == asked
    assert second["progress"]["cached"] == 2 * DOCUMENTS
    assert second["metrics"] == first["metrics"]


def test_images_go_along_with_a_conversation(box: Service, chat: FakeOpenAI) -> None:
    sizes: list[tuple[int, int]] = []

    def look(body: Json) -> str:
        [turn] = body["messages"]
        image, text = turn["content"]
        head, _, data = image["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        sizes.append(Image.open(io.BytesIO(base64.b64decode(data))).size)
        assert text == {"type": "text", "text": "Which digit is this?"}
        return "It is 7."

    chat.chat = look
    job = box.finished(ask(box, "openai", "digits", limit=10))
    sevens = sum(digit == 7 for _, digit in held_out(10))
    assert job["metrics"]["digits"]["exact_match,digit"] == pytest.approx(sevens / 10)
    assert sizes == [(32, 32)] * 10
    assert chat.most_at_once <= 3
    body = chat.bodies[0]
    assert (body["model"], body["max_tokens"], body["temperature"], body["stop"]) == (
        "gpt-test",
        4,
        0,
        ["<end_of_utterance>"],
    )
    assert job["model"]["kind"] == "openai"
    assert job["request"]["model_args"] == {}


def test_what_is_refused_for_now_is_asked_again(box: Service, chat: FakeOpenAI) -> None:
    chat.chat = lambda body: "yes"
    chat.failures.extend([Failure(429, headers={"Retry-After": "0"}), Failure(500), Failure(503)])
    job = box.finished(ask(box, "local-chat-completions", "story", model_args={"endpoint": "talk"}))
    assert len(chat.bodies) == DOCUMENTS + 3
    assert job["progress"]["errored"] == 0


def test_a_request_that_fails_is_the_error_of_its_sample(box: Service, chat: FakeOpenAI) -> None:
    def fails(body: Json) -> Failure | None:
        return Failure(400, "the third is not liked") if " 3 " in body["messages"][0]["content"] else None

    chat.fails = fails
    try:
        job = box.finished(ask(box, "openai", "story", max_error_share=0.2))
        assert job["metrics"]["story"]["evalpool_errored"] == 1
        assert "400: the third is not liked" in samples(box, job, "story")[3]["evalpool_error"]
        failed = box.ended(ask(box, "openai", "story"))
        assert failed["status"] == "failed"
        assert "the third is not liked" in failed["error"]
    finally:
        chat.fails = lambda body: None


def test_a_key_that_is_repeated_by_the_endpoint_is_not_shown(box: Service, chat: FakeOpenAI) -> None:
    chat.key = "another"  # so the endpoint refuses ours, and says it
    try:
        failed = box.ended(ask(box, "openai", "story"))
    finally:
        chat.key = KEY
    assert failed["status"] == "failed"
    assert "401: Incorrect API key provided: Bearer [key]" in failed["error"]


def test_redirects_are_not_followed(box: Service, chat: FakeOpenAI) -> None:
    with openai_server() as elsewhere:
        chat.failures.extend([Failure(307, headers={"Location": f"{elsewhere.url}/chat/completions"})] * 3 * DOCUMENTS)
        failed = box.ended(ask(box, "openai", "story"))
        assert "redirects are not followed" in failed["error"]
        assert elsewhere.bodies == []


def test_a_job_is_cancelled_while_the_endpoint_takes_its_time(box: Service, chat: FakeOpenAI) -> None:
    chat.gate.clear()
    while chat.arrived.acquire(blocking=False):
        pass
    try:
        job_id = ask(box, "openai", "story")
        for _ in range(3):  # as many as the operator allows, at once: none of them has an answer yet
            assert chat.arrived.acquire(timeout=PATIENCE_SECONDS)
        box.client.cancel_job(job_id)
        assert box.ended(job_id)["status"] == "cancelled"
        assert chat.bodies == []
    finally:
        chat.gate.set()
    until(lambda: chat.at_once == 0, "the endpoint has let go")


def test_an_endpoint_is_asked_by_one_process_without_a_gpu(box: Service) -> None:
    box.finished(ask(box, "openai", "story"))
    workers = {worker["slots"][0]: worker for worker in box.client.workers()["workers"]}
    assert workers["api:talk"]["description"].startswith("endpoint talk: http://127.0.0.1:")


@pytest.mark.parametrize(
    ("model", "task", "args", "says"),
    [
        ("openai", "story", {"endpoint": "nobody"}, "must be one of the chat endpoints.*talk"),
        ("openai", "story", {"endpoint": "tiny"}, "must be one of the chat endpoints.*talk"),
        ("openai", "story", {"base_url": "https://evil.example/v1"}, "is the address of no chat endpoint"),
        ("openai", "story", {"api_key": "sk-of-the-client"}, "keys are the operator's"),
        ("openai", "story", {"num_concurrent": 99}, "must be at most 3"),
        ("openai", "choice", {}, "log-likelihoods: a chat endpoint gives no log-probabilities"),
        ("local-completions", "story", {}, "the endpoint's name of the model is needed"),
        ("local-completions", "choice", {"model": "tiny"}, "names no model_args.tokenizer"),
        ("local-completions", "digits", {"model": "tiny"}, "shows images"),
    ],
)
def test_what_an_endpoint_is_not_for_is_refused(box: Service, model: str, task: str, args: Json, says: str) -> None:
    with pytest.raises(EvalError, match=says) as caught:
        ask(box, model, task, model_args=args)
    assert "sk-of-the-client" not in str(caught.value)


def test_the_list_of_models_names_endpoints_and_no_keys(box: Service, chat: FakeOpenAI) -> None:
    told = httpx.get(f"{box.server.url}/models", params={"details": True}, timeout=PATIENCE_SECONDS)
    assert KEY not in told.text
    assert {"name": "talk", "kind": "chat", "base_url": chat.url, "model": "gpt-test"} in told.json()["endpoints"]
    entries = {entry["name"]: entry for entry in told.json()["entries"]}
    assert (entries["openai"]["runs_on"], entries["openai"]["reason"]) == ("api", None)


def test_the_key_is_in_no_other_process(box: Service) -> None:
    box.finished(ask(box, "openai", "story"))
    [asking] = [w["pid"] for w in box.client.workers()["workers"] if w["slots"] == ["api:talk"]]
    keepers = {pid for pid in box.server.processes() if f"TALK_KEY={KEY}".encode() in environment(pid)}
    assert keepers == {asking, box.server.process.pid}


def environment(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('base_url = "https://user:secret@host/v1"', "without user, password"),
        ('base_url = "host/v1"', "must be like https://"),
        ('base_url = "https://host/v1/chat/completions"', "must end before /chat/completions"),
        ('base_url = "https://host/v1"\nkey_env = "NOT_SET_ANYWHERE"', "no variable NOT_SET_ANYWHERE"),
        ('base_url = "https://host/v1"\nkey_file = "nowhere"', "cannot be read"),
        ('base_url = "https://host/v1"\nkey = "sk-1"', "unknown field"),
    ],
)
def test_endpoints_that_cannot_be_asked_are_refused_at_start(tmp_path: Path, lines: str, says: str) -> None:
    (tmp_path / "evalpool.toml").write_text(f"[endpoints.some]\n{lines}\n")
    said = failing_serve("--config", tmp_path / "evalpool.toml", "--data-dir", tmp_path / "data", "--port", 0)
    assert re.search(says, said), said
    assert "secret" not in said.replace("password", "")
    assert os.listdir(tmp_path) == ["evalpool.toml"]
