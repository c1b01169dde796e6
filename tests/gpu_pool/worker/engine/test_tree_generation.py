"""Continuous batching along the token tree: what is read, who shares, and what is left when it ends early."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chunks import generating, scoring
from engine_probes import (
    assert_kept_for_the_cache_alone,
    fresh,
    never,
    out_of_memory_beyond,
    plainly,
    tensor_bytes,
    watched,
)
from prompts import PROMPTS, SAMPLING, SEEDS

from gpu_pool.worker.computing import compute
from gpu_pool.worker.engine import attention, tree_generation
from gpu_pool.worker.engine.blocks import Block
from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.generation import generate, generate_chunks
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.packed import kept_bytes, run_step
from gpu_pool.worker.engine.slots import Slots
from gpu_pool.worker.engine.token_tree import plan

Tokens = tuple[int, ...]


def texts(loaded: LoadedModel, prompts: list[Tokens] = PROMPTS, **fields: Any) -> tuple[str, ...]:
    return generate(loaded, generating(prompts, **({"max_gen_toks": 10} | fields)), never)


@pytest.fixture
def loaded(checkpoint, load):
    """A model without anything kept from other tests."""
    return fresh(load(checkpoint("llama")))


@pytest.fixture(scope="module")
def expected(checkpoint, load):
    """Greedy answers, the plain way."""
    return texts(plainly(load(checkpoint("llama"))))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, None])
def test_more_prompts_than_slots(batch_size, loaded, expected):
    with watched(loaded) as passes:
        assert texts(loaded, batch_size=batch_size) == expected
    assert not passes.plain
    assert max(passes.continued) <= (batch_size or len(PROMPTS))
    assert_kept_for_the_cache_alone(loaded)


def test_each_distinct_token_is_read_once(loaded):
    nodes = {prompt[: end + 1] for prompt in PROMPTS for end in range(len(prompt))}
    with watched(loaded) as passes:
        texts(loaded, PROMPTS * 2)
    assert sum(passes.read) == len(nodes)


def steps(loaded: LoadedModel, prompts: list[Tokens], **fields: Any) -> int:
    """Passes that continue rows."""
    with watched(loaded) as passes:
        texts(fresh(loaded), prompts, max_gen_toks=40, **fields)
    return len(passes.continued)


@pytest.mark.parametrize("length", [8, 130])
def test_freed_slots_are_filled(length, loaded):
    """Rows that end early make room soon: there are fewer steps than if each batch waited for its longest row."""
    prompts = [(*prompt[-5:], *range(3, length)) for prompt in PROMPTS]
    whole = texts(loaded, prompts, max_gen_toks=40)
    places = {stop: sorted(text.find(stop) % 40 for text in whole) for stop in set("".join(whole))}
    stop = max(places, key=lambda stop: places[stop][-4] - places[stop][3])
    alone = [steps(loaded, [prompt], until=(stop,)) for prompt in prompts]
    assert min(alone) < 10
    assert max(alone) == 39
    in_batches = sum(max(alone[start : start + 4]) for start in range(0, len(alone), 4))
    assert steps(loaded, prompts, until=(stop,), batch_size=4) <= min(sum(alone) / 4 + 39, in_batches - 1)


def test_equal_prompts_are_read_once_and_sampled_apart(loaded):
    prompt = max(PROMPTS, key=len)
    with watched(loaded) as passes:
        answers = texts(loaded, [prompt] * 12, seeds=tuple(range(12)), batch_size=5, **SAMPLING)
    assert passes.read == [len(prompt)]
    assert max(passes.continued) == 5
    assert len(set(answers)) > 6
    for seed in (0, 7):
        assert texts(fresh(loaded), [prompt], seeds=(seed,), **SAMPLING) == (answers[seed],)
    assert_kept_for_the_cache_alone(loaded)


@pytest.mark.parametrize("scored_tokens", [16, 4096])
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_samples_belong_to_their_prompts(batch_size, scored_tokens, loaded):
    """Not to company, order, slots, passes, or what is kept from before."""
    whole = texts(loaded, seeds=SEEDS, **SAMPLING)
    assert whole == texts(plainly(loaded), seeds=SEEDS, **SAMPLING)
    small = fresh(loaded, scored_tokens=scored_tokens)
    backwards = texts(small, PROMPTS[::-1], seeds=SEEDS[::-1], batch_size=batch_size, **SAMPLING)
    assert backwards[::-1] == whole
    some = [3, 17, 4, 4, 11]
    picked = texts(small, [PROMPTS[index] for index in some], seeds=tuple(some), batch_size=batch_size, **SAMPLING)
    assert picked == tuple(whole[index] for index in some)
    assert whole != texts(small, seeds=SEEDS[::-1], **SAMPLING)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mistral", "deepseek_v3"])
def test_windows_caps_and_sinks(name, checkpoint, load):
    """Rows that grow far beyond the window of what they share."""
    loaded = fresh(load(checkpoint(name)))
    ours = texts(loaded, batch_size=4, max_gen_toks=40)
    assert ours == texts(plainly(loaded), max_gen_toks=40)


def test_single_token_answers(loaded):
    assert texts(loaded, max_gen_toks=1) == texts(plainly(loaded), max_gen_toks=1)


@pytest.mark.parametrize("asked", [0, 1, 5, 12, 30])
def test_cancelled_in_the_middle(asked, loaded, expected):
    """Nothing stays that was not there before, and what was there is still of use."""
    beginning = (*PROMPTS[0][:50], 5)
    texts(loaded, [beginning])
    before = loaded.prefix_cache.bytes
    answers = iter([False] * asked)
    with pytest.raises(Cancelled):
        generate(loaded, generating(PROMPTS, batch_size=3, max_gen_toks=10), lambda: next(answers, True))
    assert loaded.prefix_cache.bytes == before
    assert_kept_for_the_cache_alone(loaded)
    with watched(loaded) as passes:
        assert texts(loaded) == expected
    with watched(loaded) as cold:
        assert texts(fresh(loaded)) == expected
    assert sum(cold.read) - sum(passes.read) == 50


@pytest.mark.parametrize(("read", "continued"), [(60, 10**9), (10**9, 3), (60, 1)])
def test_out_of_memory_halves(read, continued, loaded, expected):
    small = fresh(loaded, scored_tokens=50)  # blocks that can be read alone
    whole = fresh(loaded)
    with out_of_memory_beyond(loaded, read=read, continued=continued):
        assert texts(small) == expected
        if read >= 100:
            assert texts(whole) == expected
    assert_kept_for_the_cache_alone(small)
    with out_of_memory_beyond(loaded, continued=0), pytest.raises(torch.OutOfMemoryError):
        texts(whole)
    assert_kept_for_the_cache_alone(whole)


def test_a_shortage_in_the_tail_is_one_of_all_that_the_slots_hold(loaded):
    """Memory runs out once, when nearly all rows have ended."""
    endless = texts(loaded, max_gen_toks=40)
    stop = max(sorted(set("".join(endless))), key=lambda stop: len({text.find(stop) for text in endless}))
    whole = texts(loaded, until=(stop,), max_gen_toks=40)
    loaded = fresh(loaded)
    rows: list[int] = []

    def fail_once(module: Any, args: Any, kwargs: Any) -> None:
        count = kwargs["input_ids"].numel()
        if isinstance(attention._plan, Slots):
            rows.append(count)
            if count <= 2 and min(rows[:-1]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

    hook = loaded.model.register_forward_pre_hook(fail_once, with_kwargs=True)
    try:
        assert texts(loaded, until=(stop,), max_gen_toks=40) == whole
    finally:
        hook.remove()
    assert max(rows) > len(PROMPTS) // 2
    assert loaded.generated_rows(max(map(len, PROMPTS)) + 40) >= max(rows) // 2


def test_a_shortage_while_the_slots_grow_is_remembered(loaded, expected, monkeypatch):
    failures: list[int] = []
    pad = torch.nn.functional.pad

    def pad_eight_rows_at_most(tensor: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        if (rows := tensor.shape[0] + widths[-1]) > 8:
            failures.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pad(tensor, widths)

    monkeypatch.setattr(torch.nn.functional, "pad", pad_eight_rows_at_most)
    assert texts(loaded) == expected
    assert failures == [16]
    assert_kept_for_the_cache_alone(loaded)


def test_a_block_that_is_too_much_is_laid_out_anew(loaded):
    """A prompt longer than memory allows in one pass."""
    prompt = tuple(3 + index % 250 for index in range(200))
    whole = texts(fresh(loaded), [prompt])
    with out_of_memory_beyond(loaded, read=140):
        assert texts(loaded, [prompt]) == whole


def test_a_shortage_of_all_memory_teaches_nothing(loaded):
    before = dataclasses.replace(loaded.limits)
    document = tuple(3 + index % 250 for index in range(200))
    with out_of_memory_beyond(loaded, read=0, continued=0):
        for chunk in (generating([*PROMPTS, document], max_gen_toks=10), scoring([(document[:9], document[9:])])):
            with pytest.raises(torch.OutOfMemoryError):
                list(compute(loaded, chunk, never, lambda: None))
    assert loaded.limits == before


def test_everything_is_let_go(loaded):
    """But what the prefix cache holds: by reference counts alone, without collecting garbage."""
    texts(fresh(loaded))
    before = tensor_bytes()
    for fields in ({}, {"batch_size": 3}, {"seeds": SEEDS, **SAMPLING}):
        copy = fresh(loaded)
        texts(copy, **fields)
        assert copy.prefix_cache.bytes > 0
        assert tensor_bytes() - before == copy.prefix_cache.bytes
        copy.prefix_cache.clear()
        assert tensor_bytes() == before


def test_long_prompts_among_short_ones_stay_where_they_were_read(loaded):
    prompts = [*PROMPTS, *((index, *range(3, 103)) for index in (250, 251)), *((index, 5) for index in range(20))]
    assert texts(loaded, prompts) == texts(plainly(loaded), prompts)
    assert_kept_for_the_cache_alone(loaded)


LONG = [(first, *(5 + (7 * first + 3) * index % 240 for index in range(150))) for first in (3, 4, 250, 251)]
SHORT = [(20 + index, 5, 9) for index in range(24)]


@pytest.fixture
def peak(monkeypatch) -> Callable[[], list[int]]:
    """Makes a list of the memory of all keys and values that generation holds at each step from then on."""
    blocks: list[Block] = []
    slots: list[Slots] = []

    def planning(*args: Any, **kwargs: Any) -> Any:
        layout = plan(*args, **kwargs)
        blocks.extend(layout.blocks)
        return layout

    def making(*args: Any) -> Slots:
        slots.append(Slots(*args))
        return slots[-1]

    def stepping(*args: Any) -> Any:
        logits = run_step(*args)
        held.append(slots[-1].bytes + sum(map(kept_bytes, blocks)))
        return logits

    def watch() -> list[int]:
        blocks.clear()
        held.clear()
        return held

    held: list[int] = []
    for name, stand_in in (("plan", planning), ("Slots", making), ("run_step", stepping)):
        monkeypatch.setattr(tree_generation, name, stand_in)
    return watch


@pytest.mark.parametrize(("tokens", "scored_tokens"), [(1, 64), (250, 1024), (500, 64), (500, 1024), (2000, 1024)])
def test_prompts_in_blocks_and_slots_stay_within_their_memory(tokens, scored_tokens, loaded, peak):
    """Of so many `tokens`; a prompt that needs more is continued alone."""
    prompts = [*SHORT, *LONG]
    held = peak()
    assert (expected := texts(fresh(loaded), prompts))
    assert max(held) > 4 * 150 * loaded.token_bytes
    small = fresh(loaded, scored_tokens=scored_tokens, held_bytes=tokens * loaded.token_bytes, prefix_bytes=0)
    held = peak()
    assert texts(small, prompts) == expected
    least = max(map(len, prompts)) + 10 + len(SHORT[0])
    assert max(held) <= max(tokens, least) * loaded.token_bytes
    assert_kept_for_the_cache_alone(small)


def test_rows_stay_within_their_memory_when_longer_ones_join(loaded, peak):
    """Slots have room for the longest row."""
    budget = (128 + 3 + 24 * 13) * loaded.token_bytes
    small = fresh(loaded, held_bytes=budget, prefix_bytes=0)
    middling = [prompt[:30] for prompt in LONG]
    chunks = iter([generating(middling, max_gen_toks=10, chunk_id=2)])
    held = peak()
    ended = generate_chunks(small, generating(SHORT, max_gen_toks=10), never, lambda: next(chunks, None))
    answers = {texts.chunk_id: texts.texts for texts in ended}
    assert max(held) <= budget
    assert answers == {1: texts(fresh(loaded), SHORT), 2: texts(fresh(loaded), middling)}
