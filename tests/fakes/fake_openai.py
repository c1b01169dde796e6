"""A small OpenAI-compatible server for tests: it computes nothing, or asks a function, and fails when it is told to."""

from __future__ import annotations

import json
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Json = dict[str, Any]


@dataclass
class Failure:
    """What one request gets instead of an answer."""

    status: int
    message: str = "not now"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class FakeOpenAI:
    """What the server does, and what it has seen."""

    chat: Callable[[Json], str] = lambda body: "yes"
    """The answer to a body of /chat/completions."""
    complete: Callable[[Json], Json] = lambda body: {"text": "yes"}
    """The first choice in the answer to a body of /completions."""
    key: str | None = None
    """The bearer token that requests need."""
    failures: deque[Failure] = field(default_factory=deque)
    """What the next requests get."""
    fails: Callable[[Json], Failure | None] = lambda body: None
    """What a request of that body always gets; None: an answer."""
    gate: threading.Event = field(default_factory=threading.Event)
    """Requests wait until it is set; it is at first."""
    bodies: list[Json] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """Released by each request when it has come."""
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.gate.set()

    def answer(self, path: str, headers: dict[str, str], body: Json) -> tuple[int, dict[str, str], Json]:
        """Status, headers and body of the answer."""
        with self.lock:
            self.bodies.append(body)
            self.headers.append(headers)
            failure = self.failures.popleft() if self.failures else self.fails(body)
        if self.key is not None and headers.get("Authorization") != f"Bearer {self.key}":
            said = f"Incorrect API key provided: {headers.get('Authorization')}"
            return 401, {}, {"error": {"message": said}}
        if failure is not None:
            return failure.status, failure.headers, {"error": {"message": failure.message}}
        if path.endswith("/chat/completions"):
            return 200, {}, {"choices": [{"index": 0, "message": {"role": "assistant", "content": self.chat(body)}}]}
        return 200, {}, {"choices": [{"index": 0, **self.complete(body)}]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeOpenAI

    def do_POST(self) -> None:
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with fake.lock:
            fake.at_once += 1
            fake.most_at_once = max(fake.most_at_once, fake.at_once)
        fake.arrived.release()
        try:
            fake.gate.wait()
            status, headers, answer = fake.answer(self.path, dict(self.headers), body)
        finally:  # before the answer: who has it may ask again at once
            with fake.lock:
                fake.at_once -= 1
        try:
            data = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Type": "application/json", "Content-Length": len(data)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):  # who asked has gone
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # who asked has gone
            super().handle_error(request, client_address)


@contextmanager
def openai_server(**behaviour: Any) -> Generator[FakeOpenAI]:
    """The server on a free port of this machine, in threads of this process."""
    fake = FakeOpenAI(**behaviour)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": fake}))
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        fake.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()
