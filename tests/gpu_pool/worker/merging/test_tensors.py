"""Shards must lie in their tensor, and be all of it once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from gpu_pool.worker.merging.tensors import Box, MergeError, check_cover

WHOLE = (4, 6)


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (4, 6))],
        [((0, 0), (2, 6)), ((2, 0), (2, 6))],
        [((0, 0), (2, 3)), ((0, 3), (2, 3)), ((2, 0), (2, 3)), ((2, 3), (2, 3))],
        [((0, 0), (4, 6)), ((4, 0), (0, 6))],  # of a rank that has nothing
        [((0, 0), (4, 6)), ((0, 0), (4, 6))],  # of replicas
    ],
)
def test_all_of_it(boxes: Sequence[Box]) -> None:
    check_cover("w", WHOLE, boxes)


@pytest.mark.parametrize(
    ("boxes", "problem"),
    [
        ([], "hold 0 elements"),
        ([((0, 0), (2, 6))], "hold 12 elements"),
        ([((0, 0), (2, 6)), ((1, 0), (2, 6))], "hold 24 elements, some twice"),
        ([((0, 0), (3, 3)), ((0, 3), (3, 3)), ((2, 0), (1, 6))], "some twice"),
        ([((0, 0), (2, 6)), ((3, 0), (2, 6))], "does not lie in"),
        ([((-1, 0), (4, 6))], "does not lie in"),
        ([((0,), (24,))], "does not lie in"),
    ],
)
def test_not_all_of_it(boxes: Sequence[Box], problem: str) -> None:
    with pytest.raises(MergeError, match=problem):
        check_cover("w", WHOLE, boxes)


def test_a_number() -> None:
    check_cover("w", (), [((), ()), ((), ())])
