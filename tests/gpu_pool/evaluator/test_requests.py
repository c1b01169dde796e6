from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gpu_pool.evaluator.generation_options import OptionsError, generation_options
from gpu_pool.evaluator.prompts import PromptEncoder
from gpu_pool.evaluator.requests import RequestBuilder, Unit, rolling_windows
from gpu_pool.records import ModelSpec

PREFIX = 7
ids = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def unit(prompt: list[int], continuation: list[int]) -> Unit:
    return Unit(prompt=np.array(prompt, np.uint32), continuation=np.array(continuation, np.uint32))


@given(tokens=ids, max_length=st.integers(1, 45))
def test_rolling_windows_are_lm_evals(tokens: list[int], max_length: int) -> None:
    windows = get_rolling_token_windows(tokens, prefix_token=PREFIX, max_seq_len=max_length, context_len=1)
    found = rolling_windows(np.array(tokens, np.uint32), PREFIX, max_length)
    assert [(context.tolist(), more.tolist()) for context, more in found] == list(map(make_disjoint_window, windows))


@given(units=st.lists(st.tuples(ids, ids)))
def test_units_sort_as_what_the_model_reads(units: list[tuple[list[int], list[int]]]) -> None:
    found = sorted((unit(*tokens) for tokens in units), key=lambda unit: unit.order)
    sequences = [
        (unit.prompt.tolist() + unit.continuation[:-1].tolist(), unit.continuation[-1:].tolist()) for unit in found
    ]
    assert sequences == sorted((prompt + continuation[:-1], continuation[-1:]) for prompt, continuation in units)


def test_what_the_model_cannot_see_is_no_part_of_a_unit(
    tiny_model: Path, spec_of: Callable[[Path], ModelSpec], caplog: pytest.LogCaptureFixture
) -> None:
    """It is neither computed nor counted, and makes no other question. One of a job's contexts is told of."""
    spec = spec_of(tiny_model)
    encoder = PromptEncoder(msgspec.structs.replace(spec.args, max_length=32))
    builder = RequestBuilder(spec, encoder, seed=0)
    asked = [("x" * 200 + "y" * 100, " Paris"), ("z" * 300 + "y" * 100, " Paris"), ("what is the", " Paris")]
    built = builder.build([Instance("loglikelihood", {}, pair, 0) for pair in asked])
    [[first]], [[second]], [[short]] = (repeats for _, repeats in built.responses)
    assert first is second
    assert first.cost == 32 + 1
    assert short.cost < 32
    [told] = [record.getMessage() for record in caplog.records if record.name.startswith("gpu_pool.")]
    assert told.startswith("Combined length of context (")
    assert "exceeds the model's maximum length (32). Truncating " in told


def test_an_answered_unit_forgets_its_tokens() -> None:
    answered = unit([1, 2], [3])
    assert answered.cost == 3
    answered.forget_tokens()
    assert answered.cost == 0


TASK = {"until": ["\n"], "max_gen_toks": 9, "temperature": 0.7, "top_p": 0.9, "eos_token_id": None}


def test_generation_options() -> None:
    options = generation_options(TASK, "<end>")
    assert (options.until, options.max_gen_toks, options.do_sample) == (("\n", "<end>"), 9, True)
    assert options.kwargs == {"temperature": 0.7, "top_p": 0.9, "eos_token_id": None}


@pytest.mark.parametrize(
    "more",
    [
        *({"pad_token_id": 5}, {"use_cache": False}, {"return_dict_in_generate": True}, {"output_scores": True}),
        *({"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}, {"num_return_sequences": 1}),
        *({"num_return_sequences": None}, {"num_beams": None}, {"max_length": None}, {"token_healing": False}),
    ],
    ids=str,
)
def test_what_changes_no_text_is_the_workers_own(more: dict[str, Any]) -> None:
    """transformers' generate, or what is done with its answer, would fail of these; the token tree knows none."""
    assert generation_options(TASK | more, "<end>") == generation_options(TASK, "<end>")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_gen_toks": 0}, r"generation_kwargs\.max_gen_toks must be 1 or more, not 0"),
        ({"max_gen_toks": None, "max_new_tokens": -5}, r"generation_kwargs\.max_new_tokens must be 1 or more, not -5"),
        ({"num_return_sequences": 2}, r"generation_kwargs\.num_return_sequences .*`repeats: 2`"),
        ({"num_return_sequences": 2, "num_beams": 2}, r"generation_kwargs\.num_return_sequences .*`repeats: 2`"),
        ({"token_healing": True}, r"generation_kwargs\.token_healing"),
    ],
)
def test_options_that_cannot_be_honoured(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(OptionsError, match=problem):
        generation_options(TASK | options, "<end>")
