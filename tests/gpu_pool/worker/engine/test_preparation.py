"""Prompts are prepared ahead, but not too far, and by whoever needs them first."""

from __future__ import annotations

import gc
import threading
from collections.abc import Mapping

import pytest
import torch

from gpu_pool.chunk_messages import MediaPrompt
from gpu_pool.worker.engine.media import MediaError
from gpu_pool.worker.engine.preparation import MissingMedia, Preparation
from gpu_pool.worker.engine.prompt_inputs import PromptInputs

TOKENS = 16
BYTES = TOKENS * 8


class Kitchen:
    """Prepares, and notes what and by whom; `prepared` is released for each."""

    def __init__(self) -> None:
        self.made: list[tuple[str, bool]] = []
        self.prepared = threading.Semaphore(0)

    def prepare(self, prompt: MediaPrompt, media: Mapping[str, bytes]) -> PromptInputs:
        self.made.append((prompt.text, threading.current_thread() is threading.main_thread()))
        self.prepared.release()
        if prompt.text == "bad":
            raise MediaError("it is bad")
        return PromptInputs({"input_ids": torch.zeros(1, TOKENS, dtype=torch.long)}, 0, TOKENS)

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self.prepared.acquire(timeout=60)


def prompts(*texts: str) -> list[MediaPrompt]:
    return [MediaPrompt(text=text) for text in texts]


def test_a_thread_prepares_in_order() -> None:
    kitchen = Kitchen()
    pending = Preparation(kitchen.prepare).plan(prompts("a", "b", "c"), {})
    kitchen.wait_for(3)
    assert [len(one.take()) for one in pending] == [TOKENS] * 3
    assert kitchen.made == [("a", False), ("b", False), ("c", False)]


def test_no_further_ahead_than_memory_allows() -> None:
    kitchen = Kitchen()
    pending = Preparation(kitchen.prepare, ahead_bytes=2 * BYTES).plan(prompts("a", "b", "c", "d", "e"), {})
    kitchen.wait_for(2)
    assert len(pending[4].take()) == TOKENS  # nobody waits for the thread: it may be full of what comes later
    assert ("e", True) in kitchen.made
    pending[0].take()
    kitchen.wait_for(2)  # "e" and what there is room for now
    assert {text for text, _ in kitchen.made} == {"a", "b", "c", "e"}


def test_what_nobody_waits_for_is_not_prepared_and_holds_nothing() -> None:
    kitchen = Kitchen()
    preparation = Preparation(kitchen.prepare, ahead_bytes=BYTES)
    dropped = preparation.plan(prompts("a", "b"), {})
    kitchen.wait_for(1)
    del dropped
    gc.collect()
    [wanted] = preparation.plan(prompts("c"), {})
    kitchen.wait_for(1)
    wanted.take()
    assert [text for text, _ in kitchen.made] == ["a", "c"]


def test_errors_are_raised_where_inputs_are_taken() -> None:
    kitchen = Kitchen()
    bad, good = Preparation(kitchen.prepare).plan(prompts("bad", "good"), {})
    kitchen.wait_for(2)
    with pytest.raises(MediaError, match="it is bad"):
        bad.take()
    assert len(good.take()) == TOKENS


def test_files_must_be_there() -> None:
    with pytest.raises(MissingMedia, match="sent before"):
        Preparation(Kitchen().prepare).plan([MediaPrompt(text="a", media=("0" * 64,))], {})
