"""The server as a process: what it says, what stops it from starting, and how it ends."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import httpx
from evalpool_server import failing_serve

from server.serve import _listen


def test_it_says_where_and_stops_politely(serve: Any):
    server = serve()
    assert f"evalpool is ready; API documentation: {server.url}/docs" in server.log.read_text().splitlines()
    server.stop()  # asserts the exit status, the time and that no process is left


def test_an_open_request_does_not_delay_the_end(serve: Any):
    server = serve()
    answers: list[object] = []

    def ask() -> None:
        try:
            answers.append(httpx.get(f"{server.url}/tasks", timeout=None).status_code)  # waits for the first index
        except httpx.HTTPError as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    server.stop()
    thread.join()
    assert len(answers) == 1


def test_a_data_folder_in_use(serve: Any):
    server = serve()
    assert str(server.data_dir) in failing_serve("--port", 0, "--data-dir", server.data_dir)


def test_an_address_in_use(serve: Any, tmp_path: Path):
    port = httpx.URL(serve().url).port
    assert "in use" in failing_serve("--port", port, "--data-dir", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_wrong_setting(tmp_path: Path):
    config = tmp_path / "evalpool.toml"
    config.write_text("prot = 1\n")
    assert "port" in failing_serve("--config", config)


def test_answers_are_not_held_back_by_nagle():
    """asyncio sets TCP_NODELAY only on sockets that say that they are TCP; without it every answer took 40 ms."""
    with _listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
