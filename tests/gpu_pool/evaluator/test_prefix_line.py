from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable, Sequence
from itertools import chain, count, pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_pool.chunk_messages import GenerationOptions
from gpu_pool.evaluator import prefix_line
from gpu_pool.evaluator.chunking import MIN_COST, Pace, Work
from gpu_pool.evaluator.harness_lm_eval import portions
from gpu_pool.evaluator.prefix_line import Chunk, Line, unit_bytes
from gpu_pool.evaluator.requests import Unit
from gpu_pool.token_sequences import TokenSequences, common_prefix

EVERYTHING = 1e9


def make_line(sequences: Sequence[Sequence[int]], kind: str = "loglikelihood") -> tuple[Line, list[Unit]]:
    line = Line(kind)
    units = make_units(sequences)
    line.add(units)
    return line, units


def make_units(sequences: Sequence[Sequence[int]]) -> list[Unit]:
    ids = [np.array(sequence, np.uint32) for sequence in sequences]
    return [Unit(prompt=tokens[:-1], continuation=tokens[-1:]) for tokens in ids]


def few_shot(groups: int, documents: int, prefix: int = 600, question: int = 80) -> list[list[int]]:
    """Five-shot multiple choice: a prefix a group, a question a document, four choices of one token."""
    fresh = count(1)
    return [
        [*prefix_tokens, *question_tokens, choice]
        for _ in range(groups)
        for prefix_tokens in [[next(fresh) for _ in range(prefix)]]
        for _ in range(documents)
        for question_tokens in [[next(fresh) for _ in range(question)]]
        for choice in range(4)
    ]


def take(line: Line, worker: str, budget: float = EVERYTHING, remaining: float = EVERYTHING) -> Chunk:
    chunk = line.take(worker, budget, remaining)
    assert chunk is not None
    return chunk


def test_cost_is_what_a_unit_adds_to_its_neighbour() -> None:
    line, _ = make_line([[1, 2, 3, 4], [1, 2, 5, 6, 7], [1, 2, 5, 6, 8], [9]])
    assert line.cost == 4 + 3 + 1 + 1


def test_tuples_and_arrays_cost_the_same() -> None:
    sequences = few_shot(2, 3)
    line = Line("loglikelihood")
    ids = [np.array(sequence, dtype=np.uint32) for sequence in sequences]
    line.add(Unit(prompt=tokens[:-1], continuation=tokens[-1:]) for tokens in ids)  # pyright: ignore[reportArgumentType]
    assert line.cost == make_line(sequences)[0].cost


def test_long_shared_contexts_are_not_free() -> None:
    line, _ = make_line([[*range(6400), choice] for choice in range(10)])
    assert line.cost == 6401 + 9 + 10 * 100


def test_generation_costs_what_may_be_generated() -> None:
    line = Line("generation", 50)
    line.add([Unit(prompt=(1, 2, 3), options=GenerationOptions(max_gen_toks=50), seed=seed) for seed in range(2)])
    assert line.cost == 53 + 50


def test_a_chunk_ends_between_documents() -> None:
    line, units = make_line(few_shot(1, 10))
    assert take(line, "a", 200).units == units[:8]
    assert take(line, "a", 100).units == units[8:12]


def test_a_chunk_ends_between_groups() -> None:
    line, units = make_line(few_shot(2, 5))
    assert take(line, "a", 700).units == units[:20]


def test_a_chunk_holds_a_unit_however_long() -> None:
    line, units = make_line([list(range(1000)), list(range(2000, 2200))])
    assert take(line, "a", 0).units == units[:1]


def test_a_long_document_stays_with_its_choices() -> None:
    """Each costs something: all that is looked back at. Another chunk might cost all of it."""
    short = [[[document, 9, choice] for choice in range(4)] for document in range(4)]
    long = [[*range(100, 30_100), choice] for choice in range(4)]
    line, units = make_line([*chain(*short[:2]), *long, *chain(*short[2:])])
    assert take(line, "a", MIN_COST).units == units[:8]
    assert take(line, "a", MIN_COST).units[:4] == units[8:12]


def test_units_can_be_had_alone_even_the_choices_of_a_document() -> None:
    line, units = make_line(few_shot(1, 2))
    while chunk := line.take("here", EVERYTHING, alone=True):
        assert len(chunk.units) == 1
        units.remove(chunk.units[0])
        line.done("here", chunk)
    assert units == []
    assert line.cost == 0


def test_a_chunk_does_not_unfold_to_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_line, "MAX_CHUNK_TOKENS", 5000)
    line, units = make_line([[*range(1000), choice] for choice in range(10)])
    assert [take(line, "a").units for _ in range(3)] == [units[:4], units[4:8], units[8:]]


def test_later_units_continue_the_walk() -> None:
    line, _ = make_line([[1, 2, 3], [1, 2, 4]])
    take(line, "a")
    take_none(line, "b")
    more = make_units([[1, 2, 5], [1, 2, 6]])
    line.add(more)
    assert line.cost == 2
    take_none(line, "b")
    assert take(line, "a").units == more


def in_portions(sequences: Sequence[Sequence[int]], sizes: Iterable[int], share: float) -> float:
    """Tokens that one worker computes, over the distinct ones, where it gets `share` of each portion's cost before the
    next portion comes, and keeps nothing but what it has computed last."""
    line, computed, start = Line("loglikelihood"), 0, 0
    key_reads = sum(len(sequence) // prefix_line.TOKENS_LIKE_A_NEW_ONE for sequence in sequences)

    def compute(cost: float) -> int:
        done = 0
        while done < cost and (chunk := line.take("worker", MIN_COST)):
            line.done("worker", chunk)
            done += chunk.cost
        return done

    for size in sizes:
        line.add(make_units(sequences[start : start + size]), group="task")
        computed += compute(share * line.cost)
        start += size
        if start >= len(sequences):
            break
    computed += compute(EVERYTHING) - key_reads
    return computed / (len(TokenSequences.pack(sorted(sequences)).tokens) // 4)


@pytest.mark.parametrize(
    "sequences",
    [few_shot(2000, 2, 30, 10), few_shot(20, 100, 200, 20), few_shot(1, 2000, 100, 3)],
    ids=["thousands of prefixes", "long prefixes", "one prefix"],
)
def test_equal_beginnings_meet_though_they_come_in_other_portions(sequences) -> None:
    """Documents with a beginning in common are anywhere in the task. Preparation is faster than the computation."""
    documents = [sequences[start : start + 4] for start in range(0, len(sequences), 4)]
    Random(0).shuffle(documents)
    sizes = (4 * size for size in portions(is_first=True))
    assert in_portions(list(chain.from_iterable(documents)), sizes, share=0.02) <= 1.05


def test_what_comes_later_goes_on_from_what_was_taken_last() -> None:
    line = Line("loglikelihood")
    first, second, third = few_shot(3, 8, 50, 5)[::32], *(few_shot(3, 8, 50, 5)[start::32] for start in (4, 8))
    line.add(make_units(first), group="task")
    taken = take(line, "a", 1).units
    line.add(make_units([*second, *third]), group="task")
    prefix = unit_bytes(taken[-1])[: 4 * 50]
    following = take(line, "a", 1000).units
    assert [unit_bytes(unit).startswith(prefix) for unit in following[:3]] == [True, True, False]
    assert len(line) == 0


def test_groups_stay_apart() -> None:
    """Tasks are answered in their order."""
    line = Line("loglikelihood")
    for group, sequences in (("a", [[5, 1], [7, 1]]), ("b", [[6, 1], [4, 1]]), ("b", [[5, 2], [4, 2]])):
        line.add(make_units(sequences), group=group)
    found = [int(unit.prompt[0]) for unit in take(line, "w").units]
    assert found == [7, 5, 5, 4, 4, 6], "b goes on where a ends; its 4 meet"


def test_what_a_worker_took_over_is_left_to_it() -> None:
    line = Line("loglikelihood")
    line.add(make_units([[i, 1] for i in range(100)]), group="task")
    take(line, "a", 0)
    stolen = take(line, "b", 0).units
    line.add(make_units([[i, 2] for i in range(100)]), group="task")
    found = {unit for worker in ("a", "b") for unit in take(line, worker).units}
    assert len(found) + len(stolen) + 1 == 200


def take_none(line: Line, worker: str) -> None:
    assert line.take(worker, EVERYTHING) is None


def test_a_second_worker_takes_the_back_half() -> None:
    line, units = make_line([[i, i] for i in range(100)])
    first = take(line, "a", 0).units
    second = take(line, "b", EVERYTHING).units
    assert first + take(line, "a", EVERYTHING).units + second == units
    assert abs(len(second) - 50) <= 1


def test_the_place_to_split_is_between_groups() -> None:
    line, units = make_line(few_shot(2, 5))
    take(line, "a", 0)
    assert take(line, "b", 0).units[0] == units[20]


def test_a_small_job_is_not_shared_out_when_its_prefix_would_be_computed_twice() -> None:
    line, _ = make_line(few_shot(1, 8))
    take(line, "a", 100)
    take_none(line, "b")
    line, _ = make_line(few_shot(1, 100))
    take(line, "a", 100)
    assert take(line, "b")


def test_a_small_job_without_common_prefixes_is_shared_out() -> None:
    line, _ = make_line([[i] * 50 for i in range(8)])
    take(line, "a", 100)
    assert len(take(line, "b").units) >= 3


def test_a_worker_that_knows_the_prefix_takes_little_too() -> None:
    line, _ = make_line(few_shot(1, 40))
    take(line, "a", 100)
    while line.cost > 600:
        line.done("a", take(line, "a", 100))
        line.done("b", take(line, "b", 100))
    line.done("a", take(line, "a", 0))
    take(line, "a", 0)
    assert take(line, "b")


def test_what_a_lost_worker_had_is_one_stretch_again() -> None:
    line, units = make_line([[i, i] for i in range(100)])
    for _ in range(2):
        take(line, "a", 20)
    line.put_back("a")
    assert take(line, "b").units == units


def test_a_unit_that_takes_longer_than_all_others_is_asked_first() -> None:
    line, units = make_line([[1, 1], [1, 2], [1, *range(3000), 1], [1, *range(3000), 2], [1, 3], [2, 3]])
    cost = line.cost
    assert take(line, "a", 100, remaining=5000).units == units[:2]
    assert take(line, "a", 100, remaining=2000).units == units[2:4]
    line.put_back("a")
    assert line.cost == cost
    assert take(line, "b", 100, remaining=2000).units == units[2:4]
    assert take(line, "b", 100, remaining=2000).units == [*units[:2], *units[4:]]


Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "take", "take", "take", "done", "lose"]), st.integers(0, 2), st.integers(0, 40)),
    max_size=60,
)


@given(STEPS, st.integers(1, 3), st.randoms(use_true_random=False))
def test_every_unit_is_handed_out_until_it_is_answered_and_only_once(steps, workers, random) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_line, "HEAVY_COST", 6)
        hand_out(steps, workers, random)


def hand_out(steps: list[Step], workers: int, random: Random) -> None:
    line, fresh = Line("loglikelihood"), count()
    added: list[Unit] = []
    held: dict[int, list[Chunk]] = {worker: [] for worker in range(3)}
    answered: list[Unit] = []

    def finish(worker: int) -> None:
        chunk = held[worker].pop(0)
        line.done(worker, chunk)
        answered.extend(chunk.units)

    for what, worker, amount in [*steps, *[("take", w, 40) for w in range(3)]]:
        worker %= workers
        match what:
            case "add":
                some = make_units(
                    sorted([random.randrange(3) for _ in range(8)] + [next(fresh)] for _ in range(amount))
                )
                added += some
                line.add(some)
            case "take" if len(held[worker]) < 2 and (chunk := line.take(worker, amount, remaining=5 * amount)):
                held[worker].append(chunk)
            case "done" if held[worker]:
                finish(worker)
            case "lose":
                line.put_back(worker)
                held[worker] = []
            case _:
                pass
        out = [unit for chunks in held.values() for chunk in chunks for unit in chunk.units] + answered
        assert len(set(out)) == len(out)
        assert len(out) + len(line) == len(added)
        assert line.cost >= len(line)
    for worker in [0, 1, 2] * (len(added) + 1):  # each asks again and again, as its thread does
        while held[worker]:
            finish(worker)
        if chunk := line.take(worker, EVERYTHING):
            held[worker].append(chunk)
    assert len(line) == 0
    assert set(answered) == set(added)


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=10), min_size=1, max_size=80),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), max_size=80),
)
def test_walks_break_only_where_a_worker_took_over(sequences, takes) -> None:
    line, units = make_line(sorted(sequences))
    place = {unit: index for index, unit in enumerate(units)}
    walked: dict[int, list[int]] = {0: [], 1: [], 2: []}
    running: dict[int, Chunk] = {}
    for worker, budget in [*takes, *[(worker, 10) for worker in range(3)] * len(units)]:
        if worker in running:
            line.done(worker, running.pop(worker))
        if chunk := line.take(worker, budget):
            running[worker] = chunk
            walked[worker] += [place[unit] for unit in chunk.units]
    assert sorted(chain(*walked.values())) == list(range(len(units)))
    breaks = sum(b != a + 1 for walk in walked.values() for a, b in pairwise(walk))
    assert breaks <= line.steals


RATE = 800.0
"""Tokens a second of a simulated worker: a small model on one core."""
CHUNK_SECONDS = 0.01


class SimulatedWorker:
    """Asks as a worker's thread does, two chunks at a time, and computes what it has not computed before."""

    def __init__(self, line: Line, workers: int) -> None:
        self.line, self.workers = line, workers
        self.pace = Pace()
        self.chunks: list[Chunk] = []
        self.known: list[bytes] = []  # sorted: neighbours share the most
        self.computed = 0

    def ask(self) -> None:
        while len(self.chunks) < 2:
            work = Work(self.line.cost, self.line.held, self.line.held_by(self), self.workers)
            budget = self.pace.budget(self.line.kind, 0, work)
            if not budget or (chunk := self.line.take(self, budget, work.remaining)) is None:
                break
            self.chunks.append(chunk)

    def compute_first(self) -> float:
        """Seconds that the first chunk takes."""
        before = self.computed
        for unit in self.chunks[0].units:
            self._compute(unit)
        self.seconds = CHUNK_SECONDS + (self.computed - before) / RATE
        return self.seconds

    def finish_first(self) -> None:
        chunk = self.chunks.pop(0)
        self.line.done(self, chunk)
        self.pace.measured(self.line.kind, chunk.cost, self.seconds)

    def _compute(self, unit: Unit) -> None:
        sequence = unit_bytes(unit)
        place = bisect.bisect(self.known, sequence)
        shared = (common_prefix(sequence, other) for other in self.known[max(0, place - 1) : place + 1])
        self.computed += len(sequence) // 4 - max(shared, default=0)
        self.known.insert(place, sequence)


def simulate(sequences: Sequence[Sequence[int]], workers: int) -> tuple[list[float], int]:
    """Seconds after which each worker has nothing more to do, and the tokens computed by all."""
    line, _ = make_line(sequences)
    crew = [SimulatedWorker(line, workers) for _ in range(workers)]
    for worker in crew:
        worker.ask()
    running = [(worker.compute_first(), index) for index, worker in enumerate(crew) if worker.chunks]
    heapq.heapify(running)
    ends = [0.0] * workers
    while running:
        now, index = heapq.heappop(running)
        worker = crew[index]
        ends[index] = now
        worker.finish_first()
        worker.ask()
        if worker.chunks:
            heapq.heappush(running, (now + worker.compute_first(), index))
    assert len(line) == 0
    return ends, sum(worker.computed for worker in crew)


WORKLOADS = {
    "few-shot, many prefixes": (few_shot(20, 20), 20, 600),
    "few-shot, one prefix": (few_shot(1, 300), 1, 600),
    "zero-shot": (few_shot(300, 1, prefix=1), 0, 0),
    "the longest last": ([*([index] * 20 for index in range(400)), [400] * 8000], 0, 0),
    "long and short": (sorted([[index] * (3000 if index % 50 == 0 else 20) for index in range(400)]), 0, 0),
}


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize(("sequences", "prefixes", "length"), WORKLOADS.values(), ids=WORKLOADS)
def test_workers_end_together_and_compute_little_twice(sequences, prefixes, length, workers) -> None:
    """`prefixes` of `length` tokens are shared by many: ends may differ by one of them and a small chunk."""
    ends, computed = simulate(sequences, workers)
    distinct = len(TokenSequences.pack(sequences).tokens) // 4
    repeated = (workers - 1) * prefixes * length
    longest = max(map(len, sequences))
    assert computed <= distinct + repeated
    assert max(ends) <= 1.03 * (max((distinct + repeated) / workers, longest) + MIN_COST) / RATE
    if longest < distinct / workers:
        assert max(ends) - min(ends) <= (length + MIN_COST) / RATE + CHUNK_SECONDS
