"""What a job shares with others through the response cache: answers that are there, and those being computed.

A request is claimed when it is about to be sent to a worker, not before: two jobs with the same requests go through
them side by side, each computing what the other one does not, and neither waits for what nobody is at.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gpu_pool.cache import Answer, CachedModel, ResponseCache
from gpu_pool.evaluator.trie_order import in_trie_order

if TYPE_CHECKING:
    from gpu_pool.evaluator.requests import Unit

LOOK_SECONDS = 0.2
"""How often to look for answers that another job computes: a small part of what a chunk takes."""
PATIENCE_SECONDS = 300.0
"""How long to wait for a living process that has claimed a request: it may hang. Then it is computed twice."""

_log = logging.getLogger(__name__)


class SharedAnswers:
    """One job's part; safe to use from several threads. `close` it when the job ends, however."""

    def __init__(
        self,
        cache: ResponseCache,
        model: CachedModel,
        on_answers: Callable[[Sequence[Unit]], None],
        ask: Callable[[Sequence[Unit]], None],
        on_failure: Callable[[str], None],
    ) -> None:
        """From threads of others and its own, `on_answers(units)` is called with units that another job answered,
        `ask(units)` with units to be asked again, because whoever had claimed them has given them up, and
        `on_failure(error)` when the job cannot go on."""
        self._cache = cache
        self._model = model
        self._on_answers = on_answers
        self._ask = ask
        self._on_failure = on_failure
        self._hits = 0
        self._changed = threading.Condition()
        self._elsewhere: dict[bytes, tuple[Unit, float]] = {}
        """What others compute, and until when (monotonic) they are waited for."""
        self._overdue: set[bytes] = set()
        """What was waited for in vain: it is computed here, whoever claims it."""
        self._closed = False
        self._watcher: threading.Thread | None = None

    def known(self, units: Sequence[Unit]) -> list[Unit]:
        """The units that the cache answers, with their answers."""
        answers = self._cache.lookup([unit.key for unit in units if unit.key])
        return self._take(units, answers)

    def reserve(self, units: Sequence[Unit]) -> list[Unit]:
        """The units that the caller is to compute now; the others have an answer by now, or will."""
        reservation = self._cache.reserve([unit.key for unit in units if unit.key])
        if answered := self._take(units, reservation.answers):
            self._on_answers(answered)
        awaited = reservation.elsewhere - self._overdue
        elsewhere = [unit for unit in units if unit.key in awaited]
        if elsewhere:
            self._wait_for(elsewhere)
        gone = {*map(id, answered), *map(id, elsewhere)}
        return [unit for unit in units if id(unit) not in gone]

    def keep(self, units: Sequence[Unit]) -> None:
        """Store the answers of these; others may have them from now on."""
        answers = {unit.key: unit.answer for unit in units if unit.key and unit.answer is not None}
        if answers:
            self._cache.store(answers, self._model)

    def give_up(self, units: Sequence[Unit]) -> None:
        """These were reserved and will not be computed here: others may."""
        keys = [unit.key for unit in units if unit.key]
        if keys:
            self._cache.release(keys)

    def close(self) -> None:
        """The job ends: it waits for nothing and claims nothing any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._watcher is not None:
            self._watcher.join()
        self._cache.leave(self._model, self._hits)

    def _take(self, units: Sequence[Unit], answers: dict[bytes, Answer]) -> list[Unit]:
        answered = [unit for unit in units if unit.key in answers]
        for unit in answered:
            assert unit.key is not None
            unit.answer = answers[unit.key]
        with self._changed:
            self._hits += len(answered)
        return answered

    def _wait_for(self, units: Sequence[Unit]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        with self._changed:
            self._elsewhere.update((unit.key, (unit, deadline)) for unit in units if unit.key)
            if self._watcher is None and not self._closed:
                self._watcher = threading.Thread(target=self._watch, name="shared-answers", daemon=True)
                self._watcher.start()
            self._changed.notify_all()

    def _watch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._elsewhere or self._closed)
                if self._changed.wait_for(lambda: self._closed, LOOK_SECONDS):
                    return
            try:
                self._look()
            except Exception as error:  # a job must end, not wait for a thread that died
                _log.exception("Answers of other jobs cannot be waited for")
                self._on_failure(f"Answers of other jobs cannot be waited for: {error!r}")
                return

    def _look(self) -> None:
        """Pick up what has been answered, and take over what nobody is at any more."""
        self._cache.store({}, self._model)  # what could not be written before: others may wait for it, as we for theirs
        with self._changed:
            waiting = dict(self._elsewhere)
        free = self._cache.unclaimed(list(waiting))  # before the answers: they come first, then the claims go
        answers = self._cache.lookup(list(waiting))
        now = time.monotonic()
        late = {key for key, (_, deadline) in waiting.items() if deadline < now} - answers.keys()
        if late:
            _log.warning("Waited for %d answers of another job in vain; computing them", len(late))
        again = (free | late) - answers.keys()
        with self._changed:
            for key in (*answers, *again):
                self._elsewhere.pop(key, None)
            self._overdue |= late
        if answered := self._take([unit for unit, _ in waiting.values()], answers):
            self._on_answers(answered)
        if again:
            self._ask(in_trie_order(waiting[key][0] for key in again))
