"""Where a row ends by its stop strings: at the step where lm-eval's HF backend ends it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.utils_hf import stop_sequences_criteria
from transformers import AutoTokenizer

from gpu_pool.worker.engine.stopping import StopFinder

LONG = "Question: what is the capital of France, 0123456789"


@pytest.fixture(scope="module")
def tokenizer(tiny_model) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def lm_eval_ends(tokenizer: Any, until: list[str], tokens: list[int]) -> list[bool]:
    """Whether lm-eval's criteria end a row with its first token, its second…; alone in its batch."""
    criteria = stop_sequences_criteria(tokenizer, until, 0, 1)
    return [any(one(torch.tensor([tokens[:end]]), None) for one in criteria) for end in range(1, len(tokens) + 1)]


def ends(tokenizer: Any, until: list[str], tokens: list[int]) -> list[bool]:
    """The same of ours."""
    finder, found = StopFinder(tokenizer, until), False
    return [found := found or finder.ends(tokens[:end]) for end in range(1, len(tokens) + 1)]


def spelled(tokenizer: Any, text: str) -> list[int]:
    """A token for each character."""
    return [token for character in text for token in tokenizer.encode(character)]


@pytest.mark.parametrize("until", [["Answer"], ["Answer", LONG]])
@pytest.mark.parametrize("text", ["so: Answer, it is", LONG, "of course"])
def test_each_string_is_looked_for_in_as_many_tokens_as_it_has(until, text, tokenizer):
    until = [*until, tokenizer.eos_token]
    for tokens in (spelled(tokenizer, text), tokenizer.encode(text)):
        assert ends(tokenizer, until, tokens) == lm_eval_ends(tokenizer, until, tokens)


def test_what_follows_a_string_written_in_more_tokens_is_kept(tokenizer):
    tokens = spelled(tokenizer, "Answer")
    assert len(tokens) > len(tokenizer.encode("Answer")) + 2
    assert not any(ends(tokenizer, ["Answer", LONG], tokens))


@given(data=st.data())
def test_any_row_ends_as_in_lm_eval(data, tokenizer):
    texts = st.sampled_from(["Answer", "of course", "é", LONG])
    until = [*data.draw(st.lists(texts, min_size=1, max_size=3)), tokenizer.eos_token]
    pieces = data.draw(st.lists(st.tuples(texts, st.booleans()), min_size=1, max_size=4))
    tokens: list[int] = []
    for text, is_spelled in pieces:
        tokens += spelled(tokenizer, text) if is_spelled else tokenizer.encode(text)
    assert ends(tokenizer, until, tokens) == lm_eval_ends(tokenizer, until, tokens)


def test_a_step_decodes_once_where_nothing_is_found(tokenizer, monkeypatch):
    finder, decode, calls = StopFinder(tokenizer, ["Answer", LONG]), tokenizer.decode, []
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: calls.append(len(tokens)) or decode(tokens))
    tokens = spelled(tokenizer, "0123456789" * 20)
    assert not finder.ends(tokens)
    assert calls == [finder.lookback]
