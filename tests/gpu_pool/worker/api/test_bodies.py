from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from gpu_pool.chunk_messages import GenerationOptions, MediaPrompt
from gpu_pool.evaluator.api_options import api_options
from gpu_pool.evaluator.generation_options import OptionsError
from gpu_pool.records import ApiModel
from gpu_pool.worker.api.bodies import (
    UnreadableAnswer,
    answer_score,
    answer_text,
    chat_body,
    completion_body,
    scoring_body,
)

CHAT = ApiModel(
    endpoint="e", base_url="http://h/v1", kind="chat", model="m", num_concurrent=1, max_retries=0, timeout_s=1.0
)
COMPLETIONS = ApiModel(
    endpoint="e", base_url="http://h/v1", kind="completions", model="m", num_concurrent=1, max_retries=0, timeout_s=1.0
)
GREEDY = GenerationOptions(until=("a", "b", "", "c", "d", "e"), max_gen_toks=7)


def test_a_conversation_with_images_in_their_order() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
    ]
    prompt = MediaPrompt(text=json.dumps(turns), media=("2", "1"))
    body = chat_body(CHAT, prompt, GREEDY, None, "max_completion_tokens", lambda digest: f"data:{digest}")
    shown = [{"type": "image_url", "image_url": {"url": f"data:{digest}"}} for digest in "21"]
    assert body == {
        "model": "m",
        "messages": [turns[0], {"role": "user", "content": [shown[0], {"type": "text", "text": "and"}, shown[1]]}],
        "max_completion_tokens": 7,
        "temperature": 0,
        "stop": ["a", "b", "c", "d"],
    }


def test_sampling_and_its_seed() -> None:
    options = GenerationOptions(do_sample=True, max_gen_toks=3, kwargs={"temperature": 0.5, "top_p": 0.9})
    body = completion_body(COMPLETIONS, [1, 2], options, 11, "max_tokens")
    expected = {"prompt": [1, 2], "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 11}
    assert body == {"model": "m", **expected}


def test_options_that_say_nothing_are_left_out_and_others_refused() -> None:
    greedy = GenerationOptions(kwargs={"num_beams": 1, "top_p": 0.9, "repetition_penalty": 1.0})
    assert api_options(greedy).kwargs == {}
    with pytest.raises(OptionsError, match="num_beams"):
        api_options(GenerationOptions(kwargs={"num_beams": 4}))


def test_a_text_ends_before_any_stop_string_and_begins_after_the_thinking() -> None:
    answer = {"choices": [{"message": {"content": "hm a</think> yes or e no"}}]}
    thinking = msgspec.structs.replace(CHAT, think_end_token="</think>")
    options = GenerationOptions(until=("x", "q", "z", "w", " or e"))
    assert answer_text(answer, thinking, options) == "yes"
    assert answer_text({"choices": [{"message": {"content": None}}]}, CHAT, options) == ""


@pytest.mark.parametrize("answer", [None, {}, {"choices": []}, {"choices": [{"text": 5}]}, {"choices": [{}]}, "text"])
def test_what_is_no_answer(answer: Any) -> None:
    with pytest.raises(UnreadableAnswer):
        answer_text(answer, COMPLETIONS, GREEDY)
    with pytest.raises(UnreadableAnswer, match="echo and logprobs"):
        answer_score(answer, 3, 2)


def test_log_probabilities_of_the_last_tokens() -> None:
    tops = [None, {"a": -0.5}, {"b": -1.0}, {"c": -0.25, "d": -0.125}, {"e": 0.0}]
    logprobs = {"token_logprobs": [None, -0.5, -1.0, -0.25, 0.0], "top_logprobs": tops}
    answer = {"choices": [{"logprobs": logprobs}]}
    assert answer_score(answer, 4, 2) == (-1.25, False)
    assert answer_score(answer, 3, 2) == (-1.5, True)
    with pytest.raises(UnreadableAnswer):
        answer_score(answer, 9, 2)
    assert scoring_body(COMPLETIONS, [4, 5])["echo"] is True
