"""Chunks that wait to be computed, taken from each evaluator in turn. The worker's threads meet only here."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from gpu_pool.chunk_messages import FromWorkerData, GenerationChunk, LoglikelihoodChunk, MediaFile
from gpu_pool.worker.engine.media_chunks import MediaChunk

Chunk = LoglikelihoodChunk | GenerationChunk | MediaChunk


class Client:
    """One evaluator's connection, as the queue sees it.

    `send` returns when the message has left this process, as far as the evaluator reads: whatever happens next, it
    arrives. It may be called from any thread but the data channel's own; `hang_up` from any.
    """

    def __init__(self, job_id: str, send: Callable[[FromWorkerData], None], hang_up: Callable[[], None]) -> None:
        self.job_id = job_id
        self.send = send
        self.hang_up = hang_up
        self.waiting: deque[Chunk] = deque()
        self.media: dict[str, bytes | MediaFile] = {}
        """Files that it has sent and may ask about, by digest; only for the data channel's own thread."""
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
            self._running = self._turns[0]
            return self._running, self._take_turn()

    def take_alike(self, client: Client, chunk: GenerationChunk) -> GenerationChunk | None:
        """The next chunk, if it is of `client`, whose `chunk` is being computed, and may be computed together with it.

        `finish` follows once for all of them. Only for the computing thread.
        """
        with self._changed:
            if not self._turns or self._turns[0] is not client:
                return None
            following = client.waiting[0]
            if not isinstance(following, GenerationChunk) or not _are_alike(chunk, following):
                return None
            self._take_turn()
            return following

    def finish(self) -> None:
        """The chunks taken last are not computed any more."""
        with self._changed:
            self._running = None
        self._report_drops()

    def _take_turn(self) -> Chunk:
        """The next chunk of the client whose turn it is, who then lets all others go first."""
        client = self._turns.popleft()
        chunk = client.waiting.popleft()
        if client.waiting:
            self._turns.append(client)
        return chunk

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


def _are_alike(first: GenerationChunk, second: GenerationChunk) -> bool:
    together = first.options, first.batch_size, first.deterministic
    return together == (second.options, second.batch_size, second.deterministic)
