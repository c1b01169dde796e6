"""Generation options as an OpenAI-compatible endpoint takes them."""

from __future__ import annotations

from typing import Any

import msgspec

from gpu_pool.chunk_messages import GenerationOptions
from gpu_pool.evaluator.failures import OptionsError

_SENT = frozenset(
    {"frequency_penalty", "min_p", "presence_penalty", "repetition_penalty", "temperature", "top_k", "top_p"}
)
"""`min_p`, `repetition_penalty` and `top_k` are vLLM's and SGLang's; other endpoints say that they do not know them."""
_OF_SAMPLING = frozenset({"min_p", "temperature", "top_k", "top_p"})
_NEUTRAL: dict[str, Any] = {"early_stopping": False, "length_penalty": 1.0, "num_beams": 1, "repetition_penalty": 1.0}
"""Values that say nothing."""


def api_options(options: GenerationOptions) -> GenerationOptions:
    """The options without those that change nothing.

    Raises:
        OptionsError: an endpoint cannot do what one says.
    """
    kept: dict[str, Any] = {}
    for key, value in options.kwargs.items():
        if key in _NEUTRAL and value == _NEUTRAL[key]:
            continue
        if key in _OF_SAMPLING and not options.do_sample:
            continue
        if key not in _SENT:
            raise OptionsError(f"generation_kwargs.{key} is nothing that OpenAI-compatible endpoints know")
        kept[key] = value
    return msgspec.structs.replace(options, kwargs=kept)
