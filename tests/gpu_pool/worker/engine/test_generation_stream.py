"""Chunks that join the one being continued: who may, who answers when, and what one that cannot does to the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chunks import generating
from engine_probes import assert_kept_for_the_cache_alone, fresh, never, out_of_memory_beyond
from prompts import PROMPTS, SAMPLING, SEEDS

from gpu_pool.chunk_messages import GenerationChunk
from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.generation import generate, generate_chunks
from gpu_pool.worker.engine.loaded_model import LoadedModel

GREEDY = {"max_gen_toks": 10}


@pytest.fixture
def loaded(checkpoint, load):
    return fresh(load(checkpoint("llama")))


def chunks_of(size: int, **fields: Any) -> list[GenerationChunk]:
    """All prompts, `size` to a chunk."""
    return [
        generating(
            PROMPTS[start : start + size],
            start,
            seeds=SEEDS[start : start + size],
            **(GREEDY | {"batch_size": 4} | fields),
        )
        for start in range(0, len(PROMPTS), size)
    ]


def one_by_one(chunks: list[GenerationChunk]) -> Callable[[], GenerationChunk | None]:
    waiting = iter(chunks)
    return lambda: next(waiting, None)


def answers(loaded: LoadedModel, chunks: list[GenerationChunk]) -> Iterator[tuple[int, tuple[str, ...]]]:
    ended = generate_chunks(loaded, chunks[0], never, one_by_one(chunks[1:]))
    return ((texts.chunk_id, texts.texts) for texts in ended)


@pytest.mark.parametrize("fields", [{}, SAMPLING], ids=["greedy", "sampled"])
def test_texts_are_those_of_each_chunk_alone(fields, loaded):
    chunks = chunks_of(3, **fields)
    assert dict(answers(loaded, chunks)) == {chunk.chunk_id: generate(loaded, chunk, never) for chunk in chunks}
    assert_kept_for_the_cache_alone(loaded)


def test_slots_are_refilled_from_the_next_chunk(loaded, checkpoint, load, monkeypatch):
    """Five prompts in four slots: the fifth is not continued alone when others are there to join it."""
    rows: list[int] = []
    forward = type(loaded.model).forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(loaded.model), "forward", counting)
    chunks = chunks_of(5)
    together = len(list(answers(loaded, chunks)))
    steps, rows[:] = len(rows), []
    for chunk in chunks:
        generate(loaded, chunk, never)
    assert together == len(chunks)
    assert steps < len(rows)


def test_a_chunk_is_answered_before_the_next_one_is_asked_for_again(loaded):
    """What waits for an answer before it sends more gets it while others are continued."""
    chunks = chunks_of(2)
    ended: list[int] = []
    asked_after: list[int] = []
    waiting = iter(chunks[1:])

    def take() -> GenerationChunk | None:
        asked_after.append(len(ended))
        return next(waiting, None)

    for texts in generate_chunks(loaded, chunks[0], never, take):
        ended.append(texts.chunk_id)
    assert sorted(ended) == [chunk.chunk_id for chunk in chunks]
    assert max(asked_after) >= len(chunks) - 2


def test_a_chunk_that_cannot_be_continued_fails_after_the_others(loaded):
    chunks = chunks_of(3)[:3]
    broken = generating([(5, 10**6)], 99, batch_size=4, **GREEDY)
    ended: list[int] = []
    stream = answers(loaded, [chunks[0], chunks[1], broken, chunks[2]])
    with pytest.raises(ValueError, match="token ids"):
        ended.extend(chunk_id for chunk_id, _ in stream)
    assert sorted(ended) == [chunks[0].chunk_id, chunks[1].chunk_id]
    assert_kept_for_the_cache_alone(loaded)


def test_a_model_of_the_plain_way_takes_one_chunk_at_a_time(checkpoint, load):
    loaded = load(checkpoint("mamba"))
    chunks = chunks_of(3)[:2]
    assert [chunk_id for chunk_id, _ in answers(loaded, chunks)] == [chunks[0].chunk_id]


def test_deterministic_chunks_are_computed_one_at_a_time(loaded):
    chunks = chunks_of(3, deterministic=True)[:2]
    assert [chunk_id for chunk_id, _ in answers(loaded, chunks)] == [chunks[0].chunk_id]


def test_out_of_memory_takes_nothing_back(loaded):
    """Chunks that have joined go on with fewer rows; none is answered twice."""
    chunks = chunks_of(6, batch_size=None)
    expected = {chunk.chunk_id: generate(loaded, chunk, never) for chunk in chunks}
    with out_of_memory_beyond(loaded, continued=8):
        found = list(answers(loaded, chunks))
    assert len(found) == len(chunks)
    assert dict(found) == expected


def test_all_stop_when_nobody_waits_any_more(loaded):
    steps = iter([False] * 6)
    with pytest.raises(Cancelled):
        list(generate_chunks(loaded, chunks_of(3)[0], lambda: next(steps, True), one_by_one(chunks_of(3)[1:])))
    assert_kept_for_the_cache_alone(loaded)


def test_whoever_stops_listening_leaves_nothing_held(loaded):
    stream = answers(loaded, chunks_of(2))
    next(stream)
    stream.close()
    assert_kept_for_the_cache_alone(loaded)
