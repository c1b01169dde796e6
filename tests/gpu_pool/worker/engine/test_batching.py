"""Work in batches: by what fits, and in smaller ones where memory does not suffice."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpu_pool.worker.engine.batching import is_worthwhile, run_batches
from gpu_pool.worker.engine.limits import Limits

LIMITS = Limits(
    scored_tokens=1000,
    worthwhile_tokens=100,
    generated_tokens=0,
    generated_rows=0,
    held_bytes=0,
    logits_bytes=0,
    prefix_bytes=0,
)


@given(st.lists(st.integers(1, 9)), st.integers(1, 20), st.integers(9, 20))
def test_all_items_in_batches_that_fit_and_that_memory_takes(items, most, memory):
    batches: list[list[int]] = []

    def run(batch: list[int]) -> list[int]:
        if sum(batch) > memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        batches.append(batch)
        return [-item for item in batch]

    assert list(run_batches(run, items, lambda batch, item: sum(batch) + item <= most)) == [-item for item in items]
    assert [item for batch in batches for item in batch] == items
    assert all(len(batch) == 1 or sum(batch) <= min(most, memory) for batch in batches)
    if memory >= most:  # each took what fitted
        assert all(sum(batch) + after[0] > most for batch, after in itertools.pairwise(batches))


def test_what_was_too_much_bounds_the_batches_that_follow():
    most, failures = 8, []

    def run(batch: list[int]) -> list[int]:
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch

    def on_shortage(batch: list[int]) -> None:
        nonlocal most
        failures.append(len(batch))
        most = len(batch) // 2

    assert list(run_batches(run, range(40), lambda batch, _: len(batch) < most, on_shortage)) == list(range(40))
    assert failures == [8, 4, 4]  # the whole, and its halves


def test_an_item_that_is_too_much_alone():
    def run(batch: list[int]) -> list[int]:
        if 7 in batch:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch

    done: list[int] = []
    too_much: list[list[int]] = []
    with pytest.raises(torch.OutOfMemoryError):
        done.extend(run_batches(run, [1, 2, 7, 8], lambda batch, item: True, too_much.append))
    assert 7 not in done
    assert too_much == [[1, 2, 7, 8], [7, 8]], "one alone says nothing of batches"


@pytest.mark.parametrize(
    ("count", "width", "length", "batch_size", "expected"),
    [
        (3, 50, 50, None, True),
        (3, 50, 50, 4, True),
        (3, 50, 50, 3, False),
        (19, 50, 50, None, True),
        (20, 50, 50, None, False),  # 21 * 50 tokens
        (2, 50, 40, None, True),
        (2, 50, 39, None, False),  # 100 tokens do without a row that is padded by more than a fifth
        (1, 50, 1, None, True),
    ],
)
def test_worthwhile(count, width, length, batch_size, expected):
    assert is_worthwhile(LIMITS, count, width, length, batch_size) is expected
    if expected and batch_size is None:
        narrow = dataclasses.replace(LIMITS, scored_tokens=(count + 1) * width - 1)
        assert not is_worthwhile(narrow, count, width, length, batch_size)
