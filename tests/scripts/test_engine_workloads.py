"""The benchmark's requests: of real documents, and of the shapes that their names say."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from engine_shapes import SHAPES, deep_tree, empty_contexts, long_choices, one_long_document, repeated
from engine_workloads import WORKLOADS, Library, Workload, document_of, part_of, spread
from lm_eval.api.instance import Instance


@pytest.fixture(scope="module")
def library(benchmark_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("cache"), max_length=2048)


def contexts(requests: list[Instance]) -> list[Any]:
    return list(dict.fromkeys(request.args[0] for request in requests))


@pytest.mark.parametrize(
    ("total", "count", "chosen"), [(10, 2, [2, 7]), (3, 3, [0, 1, 2]), (2, 5, [0, 1]), (4, 1, [2])]
)
def test_spread(total: int, count: int, chosen: list[int]) -> None:
    assert spread(total, count) == chosen


def test_a_part_has_documents_of_each_task_that_are_as_long_as_all() -> None:
    requests = [
        Instance("loglikelihood", {}, ("x" * length, "y"), choice, metadata=(task, document, 1))
        for task in "ab"
        for document, length in enumerate((6, 104, 1, 106, 2, 100))
        for choice in range(2)
    ]
    assert [(*document_of(r), r.idx) for r in part_of(requests, 2)] == [
        (task, document, choice) for task in "ab" for document in (1, 4) for choice in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("workload", [*WORKLOADS["long"], *WORKLOADS["short"], *SHAPES], ids=lambda w: w.name)
def test_every_workload_has_as_many_documents_as_asked_of_one_kind(workload: Workload, library: Library) -> None:
    requests = workload.build(library, 3)
    tasks = {task for task, _ in map(document_of, requests)}
    assert len(set(map(document_of, requests))) == 3 * len(tasks)
    assert len({request.request_type for request in requests}) == 1


@pytest.mark.slow
def test_long_documents_are_not_their_own_examples(library: Library) -> None:
    [fixed] = [workload for workload in WORKLOADS["long"] if workload.name == "gsm8k 5 fixed shots"]
    asked = [str(request.args[0]).rpartition("Question: ") for request in fixed.build(library, 4)]
    [examples] = {before for before, _, _ in asked}
    assert examples.count("Question: ") == 5
    assert not any(question in examples for _, _, question in asked)


@pytest.mark.slow
def test_each_context_of_the_deep_tree_goes_on_where_the_one_before_ends(library: Library) -> None:
    asked = contexts(deep_tree(library, 10))
    assert len(asked) == 10
    assert all(deeper.startswith(context) for context, deeper in pairwise(asked))


@pytest.mark.slow
def test_one_document_is_long(library: Library) -> None:
    first, *others = contexts(one_long_document(library, 8))
    assert len(first) > 30 * max(map(len, others))


@pytest.mark.slow
def test_long_choices_are_four_passages(library: Library) -> None:
    requests = long_choices(library, 5)
    assert len(requests) == 20
    assert all(600 < len(request.args[1]) <= 851 for request in requests)


@pytest.mark.slow
def test_contexts_are_empty(library: Library) -> None:
    assert contexts(empty_contexts(library, 5)) == [""]


@pytest.mark.slow
def test_documents_repeat(library: Library) -> None:
    assert len(set(map(document_of, repeated(library, 24)))) == 24
    assert len(contexts(repeated(library, 24))) == 3
