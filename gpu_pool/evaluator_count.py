"""How many evaluators there are: one for each job that may run, and a few that have started before jobs ask for them.

A job that has lost its workers and gets no others keeps its evaluator, and with it what it has in memory. It computes
nothing: while it waits, another job may run in its stead, so that GPUs that are gone stop none of the jobs that could
do without them.
"""

from __future__ import annotations

from gpu_pool.ledger import MEMORY_SECONDS, Ledger
from gpu_pool.moves import Moves
from gpu_pool.records import EvaluatorState

SPARE_EVALUATORS = 8
"""Evaluators that are started before jobs ask for them (no more than one for each slot, and one more)."""
SHARING_EVALUATORS = 4
"""Further evaluators for each GPU: their jobs share its replica, which computes for some while others prepare."""


class EvaluatorCount:
    """Starts evaluators, and ends those that are too many."""

    def __init__(self, ledger: Ledger, moves: Moves, asked: int | None, that_fit: int | None) -> None:
        """`asked` is how many jobs may run at once. None: one for each slot, one more, and SHARING_EVALUATORS for each
        GPU, those as far as the machine's memory goes: for `that_fit` evaluators (None: for all).
        """
        self._ledger = ledger
        self._moves = moves
        self._asked = asked
        self._that_fit = that_fit

    def keep(self) -> None:
        """Have as many as there should be now. One that is too many ends as soon as it has no job."""
        ledger = self._ledger
        alone = len(ledger.slots) + 1 if self._asked is None else self._asked
        limit = self._limit(alone) + self._jobs_at_a_loss()
        wanted = min(limit, max(min(alone, SPARE_EVALUATORS), len(ledger.running) + len(ledger.waiting)))
        while len(ledger.evaluators) < wanted:
            self._moves.start_evaluator()
        for evaluator_id in ledger.evaluators_that_are(EvaluatorState.READY)[: max(0, len(ledger.evaluators) - limit)]:
            self._moves.end_evaluator(evaluator_id)

    def _limit(self, alone: int) -> int:
        """How many there may be when all slots have jobs."""
        if self._asked is not None:
            return self._asked
        most = alone + SHARING_EVALUATORS * sum(1 for slot in self._ledger.slots.values() if slot.device == "cuda")
        return most if self._that_fit is None else max(alone, min(most, self._that_fit))

    def _jobs_at_a_loss(self) -> int:
        """Running jobs that have long had no worker, and not because another job asked for the last one."""
        since = self._ledger.now - MEMORY_SECONDS
        return sum(
            1
            for run in self._ledger.running.values()
            if not run.workers and not run.paused_for and run.interrupted is not None and run.interrupted < since
        )
