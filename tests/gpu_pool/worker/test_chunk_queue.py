import pytest
from chunks import generating, scoring

from gpu_pool.chunk_messages import FromWorkerData, LoglikelihoodChunk
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
    return scoring([((1,), (2,))], chunk_id)


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


def test_chunks_that_are_alike_are_taken_together(queue):
    client = join(queue, "a").client
    chunks = [generating([(5,)], number, max_gen_toks=4) for number in (1, 2, 3)]
    for one in (*chunks, generating([(5,)], 4, max_gen_toks=5)):
        queue.put(client, one)
    assert queue.take() == (client, chunks[0])
    assert [queue.take_alike(client, chunks[0]) for _ in range(3)] == [*chunks[1:], None]
    queue.finish()
    assert queue.take()[1].chunk_id == 4
    assert queue.take_alike(client, chunks[0]) is None


@pytest.mark.parametrize("fields", [{"batch_size": 2}, {"deterministic": True}, {"until": ("x",)}])
def test_other_chunks_are_not_taken_together(fields, queue):
    client = join(queue, "a").client
    first = generating([(5,)], 1)
    for other in (first, generating([(5,)], 2, **fields)):
        queue.put(client, other)
    queue.take()
    assert queue.take_alike(client, first) is None


def test_nobody_is_passed_over_for_a_chunk_that_is_alike(queue):
    client = join(queue, "a").client
    chunks = [generating([(5,)], number) for number in (1, 2, 3)]
    for one in chunks:
        queue.put(client, one)
    queue.take()
    join(queue, "b", 11)
    assert queue.take_alike(client, chunks[0]) == chunks[1]  # its turn came before that of b
    assert queue.take_alike(client, chunks[0]) is None
    queue.finish()
    assert drain(queue, 2) == [11, 3]


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
