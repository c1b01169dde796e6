"""The load generator: its arithmetic, and its counting against real servers."""

from __future__ import annotations

import http.server
import math
import threading
from collections.abc import Generator

import pytest
from http_load import LoadError, ceiling, measure, percentile, request_bytes
from hypothesis import given
from hypothesis import strategies as st

BODY = b"x" * 300_000  # arrives in several pieces


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        if self.path == "/hang-up":
            self.close_connection = True
            return
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def do_POST(self) -> None:
        self.server.seen.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(422)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[str | bytes] = []


@pytest.fixture
def server() -> Generator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_percentiles_are_by_nearest_rank() -> None:
    values = [15.0, 20.0, 35.0, 40.0, 50.0]
    assert [percentile(values, percent) for percent in (5, 20, 30, 40, 50, 90, 100)] == [15, 15, 20, 20, 35, 50, 50]
    assert percentile([3.0, 1.0, 2.0], 50) == 2


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0.1, 100))
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(values: list[float], percent: float) -> None:
    found = percentile(values, percent)
    needed = math.ceil(percent / 100 * len(values))
    assert sum(value <= found for value in values) >= needed
    assert sum(value < found for value in values) < needed


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], 0), ([1.0], 101)])
def test_there_is_no_percentile_of_nothing(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, percent)


def test_it_sends_exactly_as_many_requests_as_asked_for(server: Server) -> None:
    request = request_bytes("GET", "/big")
    seen = measure(server.server_port, request, connections=3, most_requests=10, most_seconds=60)
    assert server.seen == ["/big"] * 10
    assert len(seen.latencies) == 10
    assert 0 < max(seen.latencies) <= seen.seconds
    assert seen.client_cpu_seconds > 0


def test_it_stops_when_the_time_is_over(server: Server) -> None:
    seen = measure(server.server_port, request_bytes("GET", "/"), connections=2, most_requests=10**9, most_seconds=0.5)
    assert 0 < len(seen.latencies) == len(server.seen)


def test_bodies_are_sent_and_other_statuses_can_be_expected(server: Server) -> None:
    request = request_bytes("POST", "/evaluate", b'{"model": 1}')
    measure(server.server_port, request, status=422, connections=1, most_requests=2, most_seconds=60)
    assert server.seen == [b'{"model": 1}'] * 2


@pytest.mark.parametrize(("target", "message"), [("/missing", "404"), ("/hang-up", "closed")])
def test_other_answers_are_errors(server: Server, target: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        measure(server.server_port, request_bytes("GET", target), connections=1, most_requests=2, most_seconds=60)


def test_the_ceiling_is_measured_on_a_server_of_its_own() -> None:
    assert len(ceiling(connections=2, most_requests=50, most_seconds=60).latencies) == 50
