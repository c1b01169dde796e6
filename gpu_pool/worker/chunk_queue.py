"""Chunks that wait to be computed, taken from each evaluator in turn. The worker's threads meet only here."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from gpu_pool.messages import FromWorkerData, GenerationChunk, LoglikelihoodChunk

Chunk = LoglikelihoodChunk | GenerationChunk


class Client:
    """One evaluator's connection, as the queue sees it. `send` and `hang_up` may be called from any thread."""

    def __init__(self, job_id: str, send: Callable[[FromWorkerData], None], hang_up: Callable[[], None]) -> None:
        self.job_id = job_id
        self.send = send
        self.hang_up = hang_up
        self.waiting: deque[Chunk] = deque()
        self.gone = False
        """Nobody waits for its answers any more: a running chunk of it ends at its next step."""


class ChunkQueue:
    """Takes chunks from the I/O threads and hands them, one at a time, to the one computing thread."""

    def __init__(self, report_dropped: Callable[[str], None]) -> None:
        """`report_dropped(job_id)` is called, from any thread, once nothing of a dropped job is left or computed."""
        self._report_dropped = report_dropped
        self._changed = threading.Condition()
        self._clients: set[Client] = set()
        self._turns: deque[Client] = deque()  # clients with waiting chunks, whose turn is first at the left
        self._running: Client | None = None
        self._drops_pending: set[str] = set()

    def join(self, client: Client) -> None:
        """A client connected."""
        with self._changed:
            self._clients.add(client)

    def put(self, client: Client, chunk: Chunk) -> None:
        """`client` asks for `chunk`; ignored when it was dropped meanwhile."""
        with self._changed:
            if client.gone:
                return
            client.waiting.append(chunk)
            if client not in self._turns:
                self._turns.append(client)
            self._changed.notify()

    def leave(self, client: Client) -> None:
        """A client's connection closed: forget its chunks, the running one included."""
        with self._changed:
            self._forget(client)

    def drop(self, job_id: str) -> None:
        """Forget a job's chunks and hang up on its clients; reported at once, or when its running step has ended."""
        with self._changed:
            for client in [client for client in self._clients if client.job_id == job_id]:
                self._forget(client)
                client.hang_up()
            self._drops_pending.add(job_id)
        self._report_drops()

    def take(self) -> tuple[Client, Chunk]:
        """The next chunk, waiting for one; `finish` must follow. Only for the computing thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._turns)
            client = self._turns.popleft()
            chunk = client.waiting.popleft()
            if client.waiting:
                self._turns.append(client)
            self._running = client
            return client, chunk

    def finish(self) -> None:
        """The chunk taken last is not computed any more."""
        with self._changed:
            self._running = None
        self._report_drops()

    def _forget(self, client: Client) -> None:
        client.gone = True
        client.waiting.clear()
        self._clients.discard(client)
        if client in self._turns:
            self._turns.remove(client)

    def _report_drops(self) -> None:
        with self._changed:
            running = self._running.job_id if self._running else None
            ended = {job_id for job_id in self._drops_pending if job_id != running}
            self._drops_pending -= ended
        for job_id in ended:
            self._report_dropped(job_id)
