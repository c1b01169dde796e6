"""Units to workers and answers back: which worker is asked what next, and what becomes of what a lost worker had.

That goes to the others; without any worker the units wait. Requests on which workers die, or that cannot be computed,
are found out (`suspects`) and end in an error of their own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING

from gpu_pool.chunk_messages import MediaFile, Welcome
from gpu_pool.evaluator.chunking import Paces, Work, worthwhile_cost
from gpu_pool.evaluator.prefix_line import Chunk, Line
from gpu_pool.evaluator.suspects import Suspect, Suspects
from gpu_pool.evaluator.worker_link import IN_FLIGHT, Link
from gpu_pool.records import ApiModel, EngineRoute

if TYPE_CHECKING:
    from gpu_pool.evaluator.requests import Unit
    from gpu_pool.evaluator.shared_answers import SharedAnswers

CAUSE_SECONDS = 5.0
"""How long the server may take to say how a worker ended whose connection is gone."""

_log = logging.getLogger(__name__)


class Dispatcher:
    """The units of one job that are not answered yet, and the workers that answer them."""

    def __init__(
        self,
        job_id: str,
        batch_size: int | None,
        on_answers: Callable[[str, Sequence[Unit]], None],
        on_errors: Callable[[Sequence[Unit]], None],
        on_failure: Callable[[str], None],
        on_silence: Callable[[str], None] = lambda _: None,
        paces: Paces | None = None,
        read_media: Callable[[str], bytes | MediaFile] = lambda _: b"",
        *,
        deterministic: bool = False,
        api: ApiModel | None = None,
        on_route: Callable[[EngineRoute], None] = lambda _: None,
        on_unreachable: Callable[[str, str], None] = lambda _, __: None,
    ) -> None:
        """The functions are called from the workers' threads: `on_answers(worker_id, units)`; `on_errors(units)`, which
        have an error in the place of an answer; `on_failure(error)` when the job cannot go on; `on_silence(worker_id)`
        while a worker owes answers and says nothing; `on_route(route)` when a worker has said how it computes;
        `on_unreachable(worker_id, error)` when the connection to one failed, whose end is not known.

        Requests to an endpoint (`api`) go one by one, as many at once as it may be asked.

        `paces` are what earlier jobs found out about the workers; `read_media` gives a file that prompts show, or where
        it is, by its digest.
        """
        self.job_id = job_id
        self.batch_size = batch_size
        self.deterministic = deterministic
        self.api = api
        self.most_in_flight = IN_FLIGHT if api is None else api.num_concurrent
        self.on_answers = on_answers
        self.on_failure = on_failure
        self.on_silence = on_silence
        self.on_unreachable = on_unreachable
        self._on_route = on_route
        self._on_errors = on_errors
        self.paces = paces or Paces()
        self.read_media = read_media
        self.welcome: Welcome | None = None
        """What the latest worker said of the loaded model."""
        self.plainly: list[str] = []
        """Why workers that go along the token tree computed some requests the plain way."""
        self._lines: dict[str, Line] = {}
        self._suspects = Suspects()
        self._links: dict[str, Link] = {}
        self._changed = threading.Condition()
        self._closed = False
        self.shared: SharedAnswers | None = None
        """What other jobs compute is not asked here; None: whatever others do."""

    def submit(self, units: Sequence[Unit], group: str | None = None) -> None:
        """Queue units; those of a kind go on where those before them ended.

        Those of a `group` are put in order with what waits of it; others are in the order of `trie_order` already.
        """
        with self._changed:
            for kind, some in _by_kind(self._suspects.recall(units)).items():
                options = some[0].options
                line = self._lines.setdefault(kind, Line(kind, options.max_gen_toks if options else 0))
                line.add(some, group)
            self._changed.notify_all()

    def attach(self, worker_id: str, address: str) -> None:
        """Use this worker from now on. Raises OSError when there are no descriptors left for its connection."""
        with self._changed:
            if self._closed:
                return
            link = self._links[worker_id] = Link(self, worker_id, address)
        link.start()

    def detach(
        self,
        worker_id: str,
        *,
        at_once: bool = True,
        cause: str | None = None,
        from_outside: bool = False,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Stop using this worker: at once, and others get what it had; or once it has answered what it was asked.

        `cause` says how it ended, if it did, and `from_outside` whether somebody killed it. `then` is called when it is
        used no more, perhaps from another thread.
        """
        with self._changed:
            link = self._links.get(worker_id)
            if link is not None:
                link.cause, link.from_outside = cause or link.cause, from_outside or link.from_outside
                link.leaving = True
                link.then = then or link.then
                self._changed.notify_all()
        if link is None:
            if then:
                then()
        elif at_once:
            self._hang_up(link)

    def close(self) -> None:
        """Let go of all workers and units."""
        with self._changed:
            self._closed = True
            self._lines.clear()
            links = list(self._links.values())
        for link in links:
            self._hang_up(link)

    def take(self, link: Link) -> Chunk | Suspect | None:
        """The next chunk for `link`. None: nothing before the next answer or, with nothing in flight, never again."""
        while chunk := self._wait_for_chunk(link):
            if self.shared is None:
                return chunk
            if ours := self.shared.reserve(chunk.units):
                chunk.keep(ours)
                return chunk
            self.done(link, chunk)
        return None

    def _wait_for_chunk(self, link: Link) -> Chunk | Suspect | None:
        with self._changed:
            while not (self._closed or link.hung_up or link.leaving):
                chunk = self._next_chunk(link)
                if chunk or link.in_flight:
                    return chunk
                self._changed.wait()
            return None

    def done(self, link: Link, chunk: Chunk | Suspect) -> None:
        """`link` holds `chunk` no more."""
        with self._changed:
            if isinstance(chunk, Chunk) and not self._closed:
                self._lines[chunk.kind].done(link, chunk)

    def failed(self, link: Link, chunk: Chunk | Suspect, error: str) -> None:
        """A worker lives and cannot compute `chunk`, which it does not hold any more."""
        suspect = chunk if isinstance(chunk, Suspect) else Suspect(chunk.units)
        _log.warning("Worker %s failed on %d requests: %s", link.worker_id, len(suspect.units), error)
        with self._changed:
            cause = self._suspects.failed(suspect)
            self._changed.notify_all()
        if cause is not None:
            self.end_in_error(cause, error)

    def left(self, link: Link) -> None:
        """A worker is gone: what it did not answer is asked next. (It may have been attached again meanwhile.)"""
        died_in = {chunk_id for chunk_id in link.in_flight if link.has_died and chunk_id in link.begun}
        if self.shared is not None:
            self.shared.give_up(self._free(link, died_in))
        died_at = time.monotonic()
        with self._changed:
            if any(len(link.in_flight[chunk_id].units) == 1 for chunk_id in died_in):
                self._changed.wait_for(lambda: link.cause or self._closed, CAUSE_SECONDS)
            causes = self._take_back(link, died_in, died_at)
            self._changed.notify_all()
            if self._links.get(link.worker_id) is link:
                del self._links[link.worker_id]
        ended = f"its worker process ended: {link.cause or 'it closed the connection'}"
        for unit in causes:
            self.end_in_error(unit, ended)
        if link.then:
            link.then()

    def _free(self, link: Link, died_in: Set[int]) -> list[Unit]:
        """What other jobs may compute now that this worker is gone.

        Suspects stay ours while we have another worker to ask, or others would lose theirs to find out the same.
        """
        with self._changed:
            link.gone = True
            keeps_suspects = not self._closed and not all(other.gone for other in self._links.values())
            free = [] if keeps_suspects else self._suspects.waiting
        for chunk_id, chunk in link.in_flight.items():
            if not keeps_suspects or (chunk_id not in died_in and not isinstance(chunk, Suspect)):
                free += chunk.units
        return free

    def _take_back(self, link: Link, died_in: Set[int], died_at: float) -> list[Unit]:
        """Put what a worker held where it is asked next; returns the units that are known to be the cause."""
        causes: list[Unit] = []
        if self._closed:
            return causes
        for chunk_id, chunk in reversed(link.in_flight.items()):  # the first one will be asked first
            if chunk_id in died_in:
                _log.warning("Worker %s died while it computed %d requests", link.worker_id, len(chunk.units))
                self.done(link, chunk)
                suspect = chunk if isinstance(chunk, Suspect) else Suspect(chunk.units)
                after_s = died_at - link.begun[chunk_id]
                cause = self._suspects.died(suspect, from_outside=link.from_outside, after_s=after_s)
                causes += [] if cause is None else [cause]
            elif isinstance(chunk, Suspect):
                self._suspects.put_back(chunk)
        link.in_flight.clear()
        for line in self._lines.values():
            line.put_back(link)
        return causes

    def welcomed(self, welcome: Welcome) -> None:
        """A worker has said what it has loaded."""
        self.welcome = welcome
        self._on_route(EngineRoute(route=welcome.route, reason=welcome.route_reason))

    def computed_plainly(self, why: str) -> None:
        """A worker has not gone along the tree with something: of no consequence but for the time that it takes."""
        with self._changed:
            if why not in self.plainly:
                self.plainly.append(why)
                _log.warning("Workers compute some requests the plain way: %s", why)

    def end_in_error(self, unit: Unit, error: str) -> None:
        """There will be no answer to this unit, whoever is asked."""
        if self.shared is not None:
            self.shared.give_up([unit])
        unit.error = error
        self._on_errors([unit])

    def _hang_up(self, link: Link) -> None:
        link.hang_up()
        with self._changed:
            self._changed.notify_all()

    def _next_chunk(self, link: Link) -> Chunk | Suspect | None:
        """In the order of submission, so that tasks complete in their order, but with several workers long generation
        first: how long it takes is known least, and scoring is cut as finely as their common end needs.

        Before all else suspects, each alone on its worker: whatever dies with one is suspected, too."""
        if self._suspects or any(isinstance(chunk, Suspect) for chunk in link.in_flight.values()):
            return None if link.in_flight else self._suspects.take()
        workers = len({link, *self._links.values()})
        lines = list(self._lines.values())
        if workers > 1:
            lines.sort(key=lambda line: -line.max_gen_toks)
        work = Work(
            waiting=sum(line.cost for line in lines),
            held=sum(line.held for line in lines),
            held_here=sum(line.held_by(link) for line in lines),
            workers=workers,
        )
        for line in lines:
            if count := len(line):
                worthwhile = worthwhile_cost(line.cost, count, self.batch_size) if line.max_gen_toks else 0
                budget = link.pace.budget(line.kind, worthwhile, work)
                alone = self.api is not None
                if budget and (chunk := line.take(link, budget, work.remaining, alone=alone)):
                    return chunk
        return None


def _by_kind(units: Sequence[Unit]) -> dict[str, list[Unit]]:
    kinds: dict[str, list[Unit]] = {}
    for unit in units:
        kinds.setdefault(unit.kind, []).append(unit)
    return kinds
