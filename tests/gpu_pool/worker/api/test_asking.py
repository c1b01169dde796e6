"""Requests to a real HTTP server, which fails when it is told to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fake_openai import Failure, FakeOpenAI, openai_server

from gpu_pool.endpoints import Endpoint
from gpu_pool.worker.api import asking
from gpu_pool.worker.api.asking import Asker, AskingFailed, NoKey, read_key

KEY = "sk-0123456789abcdef"
BODY = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def server() -> Generator[FakeOpenAI]:
    with openai_server(key=KEY) as fake:
        yield fake


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    return path


def endpoint(server: FakeOpenAI, key_file: Path, **options: Any) -> Endpoint:
    return Endpoint(**{"base_url": server.url, "key_file": key_file, "retry_pause_s": 0.001, **options})


async def ask(asked: Endpoint, *, max_retries: int = 2, timeout_s: float = 60.0) -> Any:
    asker = Asker(asked)
    try:
        return await asker.ask(BODY, timeout_s, max_retries)
    finally:
        await asker.close()


async def refused(asked: Endpoint, **options: Any) -> str:
    with pytest.raises(AskingFailed) as caught:
        await ask(asked, **options)
    assert KEY not in str(caught.value)
    return str(caught.value)


async def test_failures_for_now_are_tried_again(server: FakeOpenAI, key_file: Path) -> None:
    server.failures.extend([Failure(503), Failure(429)])
    answer = await ask(endpoint(server, key_file))
    assert answer["choices"][0]["message"]["content"] == "yes"
    assert len(server.bodies) == 3
    server.failures.extend([Failure(503)] * 3)
    assert "503: not now (tried 3 times)" in await refused(endpoint(server, key_file))
    assert len(server.bodies) == 6


@pytest.mark.parametrize("status", [400, 404, 422, 307])
async def test_others_are_not(server: FakeOpenAI, key_file: Path, status: int) -> None:
    server.failures.append(Failure(status, headers={"Location": "/v1/elsewhere"}))
    assert f"answers {status}" in await refused(endpoint(server, key_file))
    assert len(server.bodies) == 1


async def test_pauses_grow_and_the_endpoint_may_wish_for_longer_ones() -> None:
    asker = Asker(Endpoint(base_url="http://host/v1", retry_pause_s=2.0))
    assert 1.0 <= asker.pause(0, 0.0) <= 2.0
    assert 4.0 <= asker.pause(2, 0.0) <= 8.0
    assert 30.0 <= asker.pause(99, 0.0) <= 60.0
    assert asker.pause(0, 90.0) == 90.0
    await asker.close()


async def test_the_endpoint_is_left_alone_for_as_long_as_it_asks(server: FakeOpenAI, key_file: Path) -> None:
    server.failures.append(Failure(429, headers={"Retry-After": "0.3"}))
    began = time.monotonic()
    await ask(endpoint(server, key_file))
    assert time.monotonic() - began >= 0.3
    server.failures.append(Failure(429, headers={"Retry-After": "86400"}))
    assert "asks to wait for 86400 s" in await refused(endpoint(server, key_file))


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0.0),
        ("2.5", 2.5),
        ("-1", 0.0),
        ("Tue, 01 Dec 2026 00:00:30 GMT", 30.0),
        ("Mon, 30 Nov 2026 00:00:00 GMT", 0.0),
        ("soon", 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float) -> None:
    assert asking._wish(header, lambda: datetime(2026, 12, 1, tzinfo=UTC)) == seconds


async def test_a_refused_key_is_not_repeated(server: FakeOpenAI, key_file: Path) -> None:
    server.key = "another"
    assert "401: Incorrect API key provided: Bearer [key]" in await refused(endpoint(server, key_file))


async def test_an_answer_that_repeats_the_key_loses_it(server: FakeOpenAI, key_file: Path) -> None:
    server.chat = lambda body: f"you sent {KEY}"
    answer = await ask(endpoint(server, key_file))
    assert answer["choices"][0]["message"]["content"] == "you sent [key]"


async def test_an_error_with_status_200_loses_the_key(server: FakeOpenAI, key_file: Path) -> None:
    server.failures.append(Failure(200, f"invalid key {KEY}"))
    assert await ask(endpoint(server, key_file)) == {"error": {"message": "invalid key [key]"}}


async def test_the_key_is_found_however_json_writes_it(server: FakeOpenAI, key_file: Path) -> None:
    server.key = 'sk-"quoted"\\and/slashed'
    key_file.write_text(server.key)
    server.chat = lambda body: f"you sent {server.key}"
    assert (await ask(endpoint(server, key_file)))["choices"][0]["message"]["content"] == "you sent [key]"


async def test_a_word_that_stands_for_no_key_stays_in_answers(server: FakeOpenAI, key_file: Path) -> None:
    server.key = "EMPTY"
    key_file.write_text(server.key)
    server.chat = lambda body: "the box is EMPTY"
    assert (await ask(endpoint(server, key_file)))["choices"][0]["message"]["content"] == "the box is EMPTY"


async def test_the_key_is_read_anew_each_time(server: FakeOpenAI, key_file: Path) -> None:
    await ask(endpoint(server, key_file))
    server.key = "sk-the-next-one"
    key_file.write_text(server.key)
    await ask(endpoint(server, key_file))
    assert [headers["Authorization"] for headers in server.headers] == [f"Bearer {KEY}", f"Bearer {server.key}"]
    key_file.unlink()
    assert "cannot be read" in await refused(endpoint(server, key_file))


@pytest.mark.parametrize("key", ["", " \n", "sk-1\nsk-2", "schlüssel"])
def test_what_is_no_key(tmp_path: Path, key: str) -> None:
    (tmp_path / "key").write_text(key)
    with pytest.raises(NoKey) as caught:
        read_key(Endpoint(base_url="http://host/v1", key_file=tmp_path / "key"))
    assert not key.strip() or key.strip() not in str(caught.value)


async def test_an_endpoint_that_does_not_answer(server: FakeOpenAI, key_file: Path) -> None:
    server.gate.clear()
    said = await refused(endpoint(server, key_file), timeout_s=0.05, max_retries=1)
    assert "did not answer within 0.05 s (tried 2 times)" in said
    gone = Endpoint(base_url="http://127.0.0.1:9/v1", retry_pause_s=0.001)
    assert "could not be asked" in await refused(gone, max_retries=0)


async def test_no_more_at_once_than_the_operator_allows(server: FakeOpenAI, key_file: Path) -> None:
    asker = Asker(endpoint(server, key_file, num_concurrent=3))
    await asyncio.gather(*(asker.ask(BODY, 60.0, 0) for _ in range(20)))
    await asker.close()
    assert len(server.bodies) == 20
    assert server.most_at_once <= 3
