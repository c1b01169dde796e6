import pytest

from gpu_pool.messages import FromWorkerData, LoglikelihoodChunk
from gpu_pool.worker.chunk_queue import ChunkQueue, Client


class Connection:
    """One evaluator's client, and what happened to it."""

    def __init__(self, job_id: str) -> None:
        self.sent: list[FromWorkerData] = []
        self.hung_up = False
        self.client = Client(job_id, self.sent.append, self._hang_up)

    def _hang_up(self) -> None:
        self.hung_up = True


def chunk(chunk_id: int) -> LoglikelihoodChunk:
    return LoglikelihoodChunk(chunk_id=chunk_id, requests=(((1,), (2,)),))


@pytest.fixture
def dropped() -> list[str]:
    return []


@pytest.fixture
def queue(dropped) -> ChunkQueue:
    return ChunkQueue(dropped.append)


def join(queue: ChunkQueue, job_id: str, *chunk_ids: int) -> Connection:
    connection = Connection(job_id)
    queue.join(connection.client)
    for chunk_id in chunk_ids:
        queue.put(connection.client, chunk(chunk_id))
    return connection


def drain(queue: ChunkQueue, count: int) -> list[int]:
    taken = []
    for _ in range(count):
        taken.append(queue.take()[1].chunk_id)
        queue.finish()
    return taken


def test_clients_take_turns(queue):
    join(queue, "a", 1, 2, 3)
    join(queue, "b", 11)
    join(queue, "c", 21, 22)
    assert drain(queue, 6) == [1, 11, 21, 2, 22, 3]


def test_chunks_of_a_client_that_left_are_forgotten(queue):
    gone = join(queue, "a", 1, 2)
    join(queue, "a", 11)
    queue.leave(gone.client)
    queue.put(gone.client, chunk(3))
    assert gone.client.gone
    assert drain(queue, 1) == [11]


def test_a_running_chunk_learns_that_its_client_left(queue):
    connection = join(queue, "a", 1)
    client, _ = queue.take()
    queue.leave(connection.client)
    assert client.gone


def test_dropping_an_unknown_job_is_reported_at_once(queue, dropped):
    queue.drop("nobody")
    assert dropped == ["nobody"]


def test_dropping_a_waiting_job_is_reported_at_once(queue, dropped):
    join(queue, "a", 1)
    waiting = join(queue, "b", 2)
    queue.take()
    queue.drop("b")
    assert dropped == ["b"]
    assert waiting.hung_up


def test_dropping_a_running_job_is_reported_when_its_step_has_ended(queue, dropped):
    running, other = join(queue, "a", 1, 2), join(queue, "b", 11)
    client, _ = queue.take()
    queue.drop("a")
    assert client.gone
    assert running.hung_up
    assert dropped == []
    queue.finish()
    assert dropped == ["a"]
    assert not other.hung_up
    assert drain(queue, 1) == [11]


def test_a_dropped_job_may_come_back(queue, dropped):
    join(queue, "a", 1)
    queue.drop("a")
    join(queue, "a", 2)
    assert drain(queue, 1) == [2]
    assert dropped == ["a"]
