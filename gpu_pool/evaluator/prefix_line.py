"""Which worker asks which units: each walks a stretch of its own along the line of units, then helps another one.

The line is in the order of `trie_order`: units share prefixes with their neighbours, so the cost of one is what it adds
to the one before it: over a stretch, the nodes of its token trie. A place where a worker begins costs more: what is
shared there is computed twice.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from gpu_pool.evaluator.trie_order import in_trie_order
from gpu_pool.token_sequences import TOKEN_BYTES, common_prefix, token_bytes

if TYPE_CHECKING:
    from gpu_pool.evaluator.requests import Unit
    from gpu_pool.evaluator.tokenising import Tokens

TOKENS_LIKE_A_NEW_ONE = 64
"""Tokens of a sequence that cost as much as a new one, shared or not: their keys are read."""
MAX_CHUNK_TOKENS = 1 << 22
"""Most tokens of the sequences of a chunk, shared ones included: what it unfolds to at the worker."""
MOST_REORDERED = 8
"""Units that wait and are put in order anew, for each that comes."""
CHOICES_SHARE = 0.125
"""Of a unit's cost: so much more may follow in its chunk whatever the budget, such as a long document's other choices,
which another chunk might have to compute the document again for."""
HEAVY_COST = 2048
"""Cost of units that are looked after one by one, so that none is begun when all others have ended."""


@dataclass(slots=True, eq=False)
class Step:
    """One unit of a walk."""

    unit: Unit
    shared: int
    """Leading tokens in common with the unit before it in the line."""
    length: int
    """Tokens of prompt and continuation."""
    cost: int
    """Tokens to compute after that one."""
    group: Hashable = None
    """What was put in order together."""


@dataclass(slots=True, eq=False)
class Span:
    """Neighbouring units that wait, and the worker that walks them; None: whoever comes first."""

    walker: Hashable = None
    cost: int = 0
    steps: deque[Step] = field(default_factory=deque[Step])

    def append(self, steps: Iterable[Step]) -> None:
        """Behind what is there."""
        for step in steps:
            self.steps.append(step)
            self.cost += step.cost

    def prepend(self, steps: Sequence[Step]) -> None:
        """Before what is there."""
        self.steps.extendleft(reversed(steps))
        self.cost += sum(step.cost for step in steps)

    def pop_group(self, group: Hashable, most: int) -> list[Step]:
        """Take the last units away, in order: those of a group, and `most` of them."""
        popped: list[Step] = []
        while self.steps and self.steps[-1].group == group and len(popped) < most:
            popped.append(self.steps.pop())
        self.cost -= sum(step.cost for step in popped)
        return popped[::-1]

    def cut(self, budget: float, *, alone: bool = False) -> list[Step]:
        """Take the first unit and, unless it is to be `alone`, others behind it for up to `budget` of cost.

        In the second half of the budget the cut is made where the least is shared: not between a document's choices.
        """
        if alone:
            self.cost -= self.steps[0].cost
            return [self.steps.popleft()]
        budget = max(budget, CHOICES_SHARE * self.steps[0].cost)
        cost, length, end, least_shared = 0, self.steps[0].length, 1, None
        for index, step in enumerate(islice(self.steps, 1, None), 1):
            cost += step.cost
            length += step.length
            if (cost > budget / 2 or length > MAX_CHUNK_TOKENS) and (
                least_shared is None or step.shared <= least_shared
            ):
                end, least_shared = index, step.shared
            if cost > budget or length > MAX_CHUNK_TOKENS:
                break
        else:
            end = len(self.steps)
        taken = [self.steps.popleft() for _ in range(end)]
        self.cost -= sum(step.cost for step in taken)
        return taken

    def pick(self, step: Step) -> Span:
        """Take `step` and those behind it that share most of it away, into a span that nobody walks yet."""
        steps = list(self.steps)
        start = steps.index(step)
        end = start + 1
        while end < len(steps) and 2 * steps[end].shared > step.length:
            end += 1
        picked = Span()
        picked.append(steps[start:end])
        if end < len(steps):
            lost = steps[end].shared - min(other.shared for other in steps[start : end + 1])
            steps[end].shared -= lost
            steps[end].cost += lost
            self.cost += lost
        self.cost -= picked.cost
        self.steps = deque(steps[:start] + steps[end:])
        return picked

    def split(self, index: int) -> Span:
        """Take the units from `index` on away, into a span that nobody walks yet."""
        rest = [self.steps.pop() for _ in range(len(self.steps) - index)]
        new = Span()
        new.append(reversed(rest))
        self.cost -= new.cost
        return new


@dataclass(slots=True, eq=False)
class Chunk:
    """What is sent to a worker at once."""

    span: Span
    """Where it was taken from, at the front."""
    steps: list[Step]
    cost: int

    @property
    def kind(self) -> str:
        """Of all its units."""
        return self.steps[0].unit.kind

    @property
    def units(self) -> list[Unit]:
        """The units, in order."""
        return [step.unit for step in self.steps]

    def keep(self, units: Iterable[Unit]) -> None:
        """Drop all others of its units."""
        kept = set(map(id, units))
        self.steps = [step for step in self.steps if id(step.unit) in kept]
        self.cost = sum(step.cost for step in self.steps)


class Line:
    """All units of one kind: those that wait, in spans, and those that each worker holds."""

    def __init__(self, kind: str, max_gen_toks: int = 0) -> None:
        self.kind = kind
        self.max_gen_toks = max_gen_toks
        self.steals = 0
        """How often a worker took units over from another one's span."""
        self._spans: list[Span] = []
        self._tail: Span | None = None
        """The span that ends where the line ends: what comes next belongs to it."""
        self._end = b""
        """Tokens of the last unit that was added."""
        self._held: dict[Hashable, list[Chunk]] = {}
        self._reached: dict[Hashable, bytes] = {}
        """Tokens of the last unit that each worker was given."""
        self._heavy: set[Step] = set()
        """Of the units that wait."""

    def __len__(self) -> int:
        """Units that wait."""
        return sum(len(span.steps) for span in self._spans)

    @property
    def cost(self) -> int:
        """Of the units that wait."""
        return sum(span.cost for span in self._spans)

    @property
    def held(self) -> int:
        """Cost of what all workers hold."""
        return sum(map(self.held_by, self._held))

    def held_by(self, worker: Hashable) -> int:
        """Cost of what `worker` was given and has not answered."""
        return sum(chunk.cost for chunk in self._held.get(worker, ()))

    def add(self, units: Iterable[Unit], group: Hashable = None) -> None:
        """Go on with these: whoever walks at the line's end will, too.

        Where they are of a `group`, they are put in order, together with those of it that wait at the end: units with
        equal beginnings meet there, whenever they come.
        """
        if self._tail is None:
            self._tail = Span()
            self._spans.append(self._tail)
        tail = self._tail
        if group is not None:
            units = list(units)
            before = tail.pop_group(group, MOST_REORDERED * len(units))
            self._heavy.difference_update(before)
            if before:
                self._end = unit_bytes(tail.steps[-1].unit) if tail.steps else self._reached.get(tail.walker, b"")
            units = in_trie_order([*(step.unit for step in before), *units], self._end)
        steps = [self._step(unit, group) for unit in units]
        tail.append(steps)
        self._heavy.update(step for step in steps if step.cost >= HEAVY_COST)

    def take(
        self, worker: Hashable, budget: float, remaining: float = math.inf, *, alone: bool = False
    ) -> Chunk | None:
        """The next chunk for `worker`, of about `budget`, or of one unit `alone`; None when it would not help to give
        it one.

        `remaining` is each worker's part of all that waits: a unit that costs more than that is asked first.
        """
        span = self._due(worker, remaining) or self._own(worker) or self._claim(worker) or self._steal(worker)
        if span is None:
            return None
        steps = span.cut(budget, alone=alone)
        self._heavy.difference_update(steps)
        chunk = Chunk(span, steps, sum(step.cost for step in steps))
        self._held.setdefault(worker, []).append(chunk)
        self._reached[worker] = unit_bytes(steps[-1].unit)
        return chunk

    def done(self, worker: Hashable, chunk: Chunk) -> None:
        """`worker` holds `chunk` no more: it was answered, or failed."""
        self._held[worker].remove(chunk)

    def put_back(self, worker: Hashable) -> None:
        """`worker` is lost: what it held and what it would have walked waits for others."""
        for chunk in reversed(self._held.pop(worker, [])):
            span = chunk.span
            if span not in self._spans:
                self._spans.append(span)
            span.prepend(chunk.steps)
            self._heavy.update(step for step in chunk.steps if step.cost >= HEAVY_COST)
            span.walker = None
        for span in self._spans:
            if span.walker is worker:
                span.walker = None
        self._reached.pop(worker, None)

    def _step(self, unit: Unit, group: Hashable) -> Step:
        tokens = unit_bytes(unit)
        shared = common_prefix(self._end, tokens)
        self._end = tokens
        length = len(tokens) // TOKEN_BYTES
        cost = max(1, length - shared + length // TOKENS_LIKE_A_NEW_ONE + self.max_gen_toks)
        return Step(unit, shared, length, cost, group)

    def _due(self, worker: Hashable, remaining: float) -> Span | None:
        """The heaviest unit, if all others may have ended when it does."""
        heaviest = max(self._heavy, key=lambda step: step.cost, default=None)
        if heaviest is None or heaviest.cost < remaining:
            return None
        picked = next(span for span in self._spans if heaviest in span.steps).pick(heaviest)
        picked.walker = worker
        self._spans.insert(0, picked)  # before its other one, with which it goes on afterwards
        return picked

    def _own(self, worker: Hashable) -> Span | None:
        return next((span for span in self._spans if span.walker is worker and span.steps), None)

    def _claim(self, worker: Hashable) -> Span | None:
        span = next((span for span in self._spans if span.walker is None and span.steps), None)
        return None if span is None else self._give(span, worker)

    def _give(self, span: Span, worker: Hashable) -> Span:
        """`worker` walks `span` and leaves its own, which is empty."""
        for left in [left for left in self._spans if left.walker is worker]:
            self._spans.remove(left)
            if left is self._tail:
                self._tail = None
        span.walker = worker
        return span

    def _steal(self, worker: Hashable) -> Span | None:
        """The back of the span of whoever has the most to do, if the line ends sooner by more than is repeated."""
        busy = [span for span in self._spans if span.steps]
        for victim in sorted(busy, key=lambda span: -span.cost - self.held_by(span.walker)):
            if place := self._best_split(victim, worker):
                return self._give(self._split(victim, *place), worker)
        return None

    def _split(self, victim: Span, index: int, repeated: int) -> Span:
        span = victim.split(index)
        self._spans.insert(self._spans.index(victim) + 1, span)
        if victim is self._tail:
            self._tail = span
        first = span.steps[0]
        first.shared -= repeated
        first.cost += repeated
        span.cost += repeated
        self.steals += 1
        return span

    def _best_split(self, victim: Span, thief: Hashable) -> tuple[int, int] | None:
        """Where to split (index, tokens computed twice), None when it is not worth it.

        Worth is the cost by which the slower of both ends sooner, less what is computed twice. What the thief knows is
        at least what it shares with the first unit and all units up to the split share with each other.
        """
        ahead, behind = self.held_by(victim.walker), self.held_by(thief) + victim.cost
        end = ahead + victim.cost
        best, best_worth = None, 0
        known = common_prefix(self._reached.get(thief, b""), unit_bytes(victim.steps[0].unit))
        for index, step in enumerate(victim.steps):
            known = known if index == 0 else min(known, step.shared)
            repeated = max(0, step.shared - known)
            worth = end - max(ahead, behind + repeated) - repeated
            if worth > best_worth:
                best, best_worth = (index, repeated), worth
            ahead += step.cost
            behind -= step.cost
        return best


def unit_bytes(unit: Unit) -> bytes:
    """Tokens of prompt and continuation as one sequence."""
    return tokens_bytes(unit.prompt) + tokens_bytes(unit.continuation)


def tokens_bytes(tokens: Tokens) -> bytes:
    """An array of tokens as they travel."""
    return token_bytes(np.asarray(tokens, np.uint32).data)
