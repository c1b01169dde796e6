"""What is sent to an OpenAI-compatible endpoint, and what its answers mean. Pure.

Source: lm-eval's `LocalCompletionsAPI` and `LocalChatCompletion` (`lm_eval/models/openai_completions.py` 0.4.13).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpu_pool.chunk_messages import GenerationOptions, MediaPrompt
from gpu_pool.records import ApiModel

MOST_STOPS = 4
"""Stop strings that OpenAI's endpoints take; all of them are looked for in the answer."""

Body = dict[str, Any]


class UnreadableAnswer(Exception):
    """The endpoint's answer is not what OpenAI's API gives."""


def chat_body(
    api: ApiModel,
    prompt: MediaPrompt,
    options: GenerationOptions,
    seed: int | None,
    max_tokens_name: str,
    data_url: Callable[[str], str],
) -> Body:
    """Asks a chat endpoint to answer the conversation that `prompt` is in JSON. `data_url` gives an image by its
    digest."""
    images = iter(prompt.media)
    turns = [{**turn, "content": _content(turn["content"], images, data_url)} for turn in json.loads(prompt.text)]
    return {"model": api.model, "messages": turns, **_generation(options, seed, max_tokens_name)}


def _content(content: Any, images: Any, data_url: Callable[[str], str]) -> Any:
    if isinstance(content, str):
        return content
    return [
        {"type": "image_url", "image_url": {"url": data_url(next(images))}} if part["type"] == "image" else part
        for part in content
    ]


def completion_body(
    api: ApiModel, prompt: str | Sequence[int], options: GenerationOptions, seed: int | None, max_tokens_name: str
) -> Body:
    """Asks a completions endpoint to continue a text, or tokens."""
    return {"model": api.model, "prompt": prompt, **_generation(options, seed, max_tokens_name)}


def scoring_body(api: ApiModel, tokens: Sequence[int]) -> Body:
    """Asks a completions endpoint for the log-probabilities of these tokens."""
    return {"model": api.model, "prompt": tokens, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}


def _generation(options: GenerationOptions, seed: int | None, max_tokens_name: str) -> Body:
    body: Body = {max_tokens_name: options.max_gen_toks, "temperature": 0}
    if options.do_sample:
        body["temperature"] = options.kwargs.get("temperature", 1.0)
    body |= {key: value for key, value in options.kwargs.items() if key != "temperature"}
    if stops := [stop for stop in options.until if stop][:MOST_STOPS]:
        body["stop"] = stops
    if seed is not None:
        body["seed"] = seed
    return body


def answer_text(answer: Any, api: ApiModel, options: GenerationOptions) -> str:
    """The text of an answer: after the thinking, before the first stop string.

    Raises:
        UnreadableAnswer: there is none.
    """
    try:
        [choice, *_] = answer["choices"]
        text = choice["message"]["content"] if api.kind == "chat" else choice["text"]
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableAnswer(f"the endpoint's answer has no choices as OpenAI's has: {_begin(answer)}") from error
    if text is None:  # the length was used up by thinking
        text = ""
    if not isinstance(text, str):
        raise UnreadableAnswer(f"the endpoint's answer is no text: {_begin(answer)}")
    if api.think_end_token:
        text = text.split(api.think_end_token)[-1].lstrip()
    for stop in options.until:
        if stop:
            text = text.split(stop)[0]
    return text


def answer_score(answer: Any, length: int, scored: int) -> tuple[float, bool]:
    """Of a prompt of `length` tokens the log-probability of the last `scored`, and whether each was the likeliest.

    Raises:
        UnreadableAnswer: the endpoint does not say.
    """
    try:
        logprobs = answer["choices"][0]["logprobs"]
        mine: Sequence[float] = logprobs["token_logprobs"][length - scored : length]
        best: Sequence[Mapping[str, float]] = logprobs["top_logprobs"][length - scored : length]
        if len(mine) != scored or len(best) != scored:
            raise ValueError(f"{len(logprobs['token_logprobs'])} tokens for {length}")
        return float(sum(mine)), all(one >= max(top.values()) for one, top in zip(mine, best, strict=True))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        problem = "the endpoint does not give the log-probabilities of a prompt (echo and logprobs)"
        raise UnreadableAnswer(f"{problem}: {_begin(answer)}") from error


def png_url(png: bytes) -> str:
    """An image as messages have it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _begin(answer: Any) -> str:
    return json.dumps(answer, default=str)[:200]
