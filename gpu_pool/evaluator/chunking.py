"""How much work goes into one chunk: units that wait, measured in tokens, and each worker's own pace."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_pool.evaluator.requests import Unit

FIRST_COST = 2048
MIN_COST, MAX_COST = 256, 1 << 20
TARGET_SECONDS = 1.0
MAX_GROWTH = 4  # a tiny chunk says little about a large one
MIN_PROMPTS = 16  # decoding one prompt takes about as long as decoding a few


class Pace:
    """How much work of each kind makes a second on one worker."""

    def __init__(self, batch_size: int | None) -> None:
        self._budgets: dict[str, float] = {}
        self._prompts = batch_size or MIN_PROMPTS

    def budget(self, first: Unit) -> float:
        """Cost of the next chunk, which begins with `first`."""
        budget = self._budgets.get(first.kind, FIRST_COST)
        return budget if first.options is None else max(budget, self._prompts * first.cost)

    def measured(self, kind: str, cost: int, seconds: float) -> None:
        """A chunk of `cost` took `seconds` of the worker's time."""
        before = self._budgets.get(kind, FIRST_COST)
        wanted = cost / max(seconds, 1e-6) * TARGET_SECONDS
        self._budgets[kind] = min(max(wanted, before / MAX_GROWTH, MIN_COST), before * MAX_GROWTH, MAX_COST)


class UnitQueue:
    """Units of one kind that wait for a worker, and their cost."""

    def __init__(self) -> None:
        self.cost = 0
        self._units: deque[Unit] = deque()

    def __len__(self) -> int:
        return len(self._units)

    @property
    def first(self) -> Unit:
        """The unit that is asked next."""
        return self._units[0]

    def add(self, units: Sequence[Unit]) -> None:
        """Queue units behind the others."""
        self._units.extend(units)
        self.cost += total_cost(units)

    def put_back(self, units: Sequence[Unit]) -> None:
        """Queue units before the others."""
        self._units.extendleft(reversed(units))
        self.cost += total_cost(units)

    def cut(self, budget: float) -> list[Unit]:
        """The next units: at least one, at most `budget` of cost, but a prompt's continuations stay together."""
        chunk = [self._units.popleft()]
        left = budget - chunk[0].cost
        while self._units:
            unit = self._units[0]
            left -= unit.cost
            if left < 0 and unit.prompt != chunk[-1].prompt:
                break
            chunk.append(self._units.popleft())
        self.cost -= total_cost(chunk)
        return chunk


def total_cost(units: Sequence[Unit]) -> int:
    """Tokens of all of them."""
    return sum(unit.cost for unit in units)
