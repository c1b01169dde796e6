"""A load generator that costs less than any server it measures: keep-alive connections on bare asyncio protocols.

Each connection sends the next request as soon as the last one is answered (a closed loop), until a number of requests
or seconds is reached. Answers are counted, not parsed: a status and a Content-Length are all that is read of them.
`ceiling` measures the generator itself, against a server that does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import multiprocessing
import re
import socket
import time
from collections.abc import Generator, Sequence

GRACE_SECONDS = 30.0
"""How long requests that are under way at the end of the time may still take."""

_STATUS = slice(9, 12)  # of b"HTTP/1.1 200 OK"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_TRIVIAL_ANSWER = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 20\r\n\r\n{"status":"healthy"}'


class LoadError(Exception):
    """A server answered otherwise than expected, or not at all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one run of the generator saw."""

    seconds: float
    """Wall time from the first request to the last answer."""
    latencies: list[float]
    """Seconds from sending a request to the last byte of its answer, in order of completion."""
    client_cpu_seconds: float


def request_bytes(method: str, target: str, body: bytes | None = None) -> bytes:
    """A whole HTTP/1.1 request; a body is JSON."""
    head = f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: application/json\r\n"
    if body is None:
        return f"{head}\r\n".encode()
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of `values` that at least `percent` of 100 of them do not exceed (the nearest-rank definition).

    Raises ValueError without values or with a percentage outside (0, 100].
    """
    if not values or not 0 < percent <= 100:
        raise ValueError(f"no {percent}th percentile of {len(values)} values")
    return sorted(values)[math.ceil(percent / 100 * len(values)) - 1]


def measure(
    port: int, request: bytes, *, status: int = 200, connections: int, most_requests: int, most_seconds: float
) -> Measurement:
    """Send `request` to 127.0.0.1:`port` again and again. Raises LoadError."""
    return asyncio.run(_measure(port, _Work(request, str(status).encode(), most_requests, most_seconds), connections))


def ceiling(*, connections: int, most_requests: int, most_seconds: float) -> Measurement:
    """What the generator sees of a server in another process that answers every request with the same few bytes."""
    with _trivial_server() as port:
        request = request_bytes("GET", "/health")
        seen = Measurement(seconds=0.0, latencies=[], client_cpu_seconds=0.0)
        for requests in (connections, most_requests):  # the first lets both sides warm up
            seen = measure(port, request, connections=connections, most_requests=requests, most_seconds=most_seconds)
        return seen


class _Work:
    """What the connections of one run share: what to send, how much of it is left, what came of it."""

    def __init__(self, request: bytes, status: bytes, most_requests: int, most_seconds: float) -> None:
        self.request = request
        self.status = status
        self.left = most_requests
        self.most_seconds = most_seconds
        self.deadline = math.inf
        self.latencies: list[float] = []

    def take(self) -> bool:
        """Whether one more request is to be sent; it is counted."""
        if self.left <= 0 or time.perf_counter() >= self.deadline:
            return False
        self.left -= 1
        return True


class _Connection(asyncio.Protocol):
    """One request at a time; `ended` is done when there is nothing left to send, or failed."""

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._head = b""
        self._missing = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self) -> None:
        """The next request, or the end."""
        if self._work.take():
            self._sent = time.perf_counter()
            self._transport.write(self._work.request)
        else:
            self.ended.set_result(None)
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        if not self._missing:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _LENGTH.search(self._head, 0, end)
            if self._head[_STATUS] != self._work.status or length is None:
                self._fail(f"expected status {self._work.status.decode()} and a length, got: {self._head[:500]!r}")
                return
            self._missing = end + 4 + int(length[1])
            data, self._head = self._head, b""
        self._missing -= len(data)
        if not self._missing:
            self._work.latencies.append(time.perf_counter() - self._sent)
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the server closed a connection: {exc}")

    def _fail(self, why: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(LoadError(why))
            self._transport.abort()


async def _measure(port: int, work: _Work, connections: int) -> Measurement:
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: _Connection(work), "127.0.0.1", port) for _ in range(connections)]
    cpu, started = time.process_time(), time.perf_counter()
    work.deadline = started + work.most_seconds
    for _, connection in made:
        connection.send()
    try:
        async with asyncio.timeout(work.most_seconds + GRACE_SECONDS):
            await asyncio.gather(*(connection.ended for _, connection in made))
    except TimeoutError:
        raise LoadError(f"no answer within {GRACE_SECONDS:.0f} s") from None
    finally:
        for transport, _ in made:
            transport.abort()
    return Measurement(
        seconds=time.perf_counter() - started,
        latencies=work.latencies,
        client_cpu_seconds=time.process_time() - cpu,
    )


@contextlib.contextmanager
def _trivial_server() -> Generator[int]:
    """Its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = multiprocessing.get_context("spawn").Process(target=_serve_trivially, args=(listener,), daemon=True)
        process.start()
    try:
        yield port
    finally:
        process.terminate()
        process.join()


def _serve_trivially(listener: socket.socket) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(_TrivialAnswers, sock=listener)
        await server.serve_forever()

    asyncio.run(serve())


class _TrivialAnswers(asyncio.Protocol):
    """One answer to whatever arrives: requests of this generator come whole."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(_TRIVIAL_ANSWER)
