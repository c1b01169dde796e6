"""What `gen_kwargs` of a request means: lm-eval's "temperature=0,max_gen_toks=64", or an object.

A task's own `generation_kwargs` are read more loosely, as lm-eval reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec

from gpu_pool.errors import InvalidRequest
from gpu_pool.suggestions import close_names

LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""lm-eval's names for the most tokens to generate, the first that is given counts."""
GENERATION_KEYS = (
    *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "eos_token_id", "epsilon_cutoff", "eta_cutoff"),
    *("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "guidance_scale"),
    *("length_penalty", "max_time", "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size", "num_beams"),
    *("remove_invalid_values", "renormalize_logits", "repetition_penalty", "sequence_bias", "suppress_tokens"),
    *("temperature", "top_h", "top_k", "top_p", "typical_p"),
)
"""Options of transformers' GenerationConfig that change the text."""
WORKER_KEYS = frozenset(
    {
        *("pad_token_id", "use_cache", "cache_config", "cache_implementation", "max_cache_len", "prefill_chunk_size"),
        *("low_memory", "compile_config", "disable_compile", "continuous_batching_config"),
        *("return_dict_in_generate", "output_attentions", "output_hidden_states", "output_logits", "output_scores"),
        *("assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight"),
        *("assistant_lookbehind", "target_lookbehind", "is_assistant", "max_matching_ngram_size"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "prompt_lookup_num_tokens", "speculation_type"),
        "use_mtp",
    }
)
"""Those that do not: padding, caches, outputs and speculation are the worker's own affair."""
_OTHER_TASK_KEYS = WORKER_KEYS | {"max_length", "num_return_sequences", "stop_strings", "token_healing"}
"""What a task may say as well."""
_CONVERTED = frozenset({*LENGTH_KEYS, "do_sample"})
"""Of a task."""
_HINTS = {
    "max_length": "how long to generate is `max_gen_toks`; ",
    "num_return_sequences": "a request has one response, several are a task's `repeats`; ",
}
"""What is meant by names that are not known."""
KNOWN_KEYS = ("until", *LENGTH_KEYS, *GENERATION_KEYS)


def parse_gen_kwargs(value: str | dict[str, Any] | None) -> dict[str, Any]:
    """The generation options of a request, with the meaning of lm-eval's `simple_parse_args_string`.

    Raises:
        InvalidRequest: for `gen_kwargs` (unparsable) or `gen_kwargs.<key>` (unknown key or wrong value).
    """
    options = _parse_string(value) if isinstance(value, str) else dict(value or {})
    for key, option in options.items():
        _check_option(key, option)
    return options


def with_request(task: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """A task's options with those of a request, whose length counts whatever the names of either."""
    lengths = {*LENGTH_KEYS, "max_length"} if any(key in request for key in LENGTH_KEYS) else set[str]()
    return {key: option for key, option in task.items() if key not in lengths - request.keys()} | dict(request)


def task_option_problem(options: Any) -> str | None:
    """What is certainly wrong with a task's own `generation_kwargs`; None if nothing is.

    Null leaves an option to its default, lengths and `do_sample` are converted, and an unknown key may be one that
    transformers knows, unless it looks like one that is known here.
    """
    if not isinstance(options, dict):
        return f"generation_kwargs must be a mapping of options, not {options!r}"
    for key, option in cast("dict[str, Any]", options).items():
        if key not in KNOWN_KEYS and key not in _OTHER_TASK_KEYS and (close := close_names(key, KNOWN_KEYS)):
            return f"generation_kwargs.{key} is unknown; close names: {', '.join(close)}"
        if option is None or key in _CONVERTED or key not in _RULES:
            continue
        expected, holds = _RULES[key]
        if not holds(option):
            return f"generation_kwargs.{key} must be {expected}, not {option!r}"
    return None


def _parse_string(text: str) -> dict[str, Any]:
    text = text.strip()
    if text.startswith("{"):
        return _parse_object(text)
    options: dict[str, Any] = {}
    for piece in filter(None, text.split(",")):
        key, equals, literal = piece.partition("=")
        key = key.strip()
        if not equals or not key:
            raise InvalidRequest("gen_kwargs", f'{piece!r} is not key=value, as in "temperature=0,max_gen_toks=64"')
        if literal.lstrip().startswith(("[", "{")):
            raise InvalidRequest(f"gen_kwargs.{key}", "to pass a list, give gen_kwargs as a JSON object")
        options[key] = _parse_literal(literal)
    return options


def _parse_object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise InvalidRequest("gen_kwargs", f"is no JSON object: {error}") from error


def _parse_literal(literal: str) -> Any:
    """As lm-eval's `handle_arg_string`: quoted text, true, false, none, an integer, a float, or else text."""
    literal = literal.strip()
    if len(literal) >= 2 and literal[0] == literal[-1] and literal[0] in "'\"":
        return literal[1:-1]
    named = {"true": True, "false": False, "none": None}
    if literal.lower() in named:
        return named[literal.lower()]
    for number in (int, float):
        try:
            return number(literal)
        except ValueError:
            continue
    return literal


def _check_option(key: str, option: Any) -> None:
    if key not in KNOWN_KEYS:
        problem = f"unknown; {_HINTS.get(key, '')}known are {', '.join(KNOWN_KEYS)}"
        raise InvalidRequest(f"gen_kwargs.{key}", problem, choices=close_names(key, KNOWN_KEYS))
    if key in _RULES:
        expected, holds = _RULES[key]
        if not holds(option):
            raise InvalidRequest(f"gen_kwargs.{key}", f"must be {expected}, not {option!r}")


def _is_int(value: Any, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text_or_texts(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(item, str) for item in cast("list[Any]", value))
    )


_Rule = tuple[str, Callable[[Any], bool]]
"""What an option must be, in words and as a test."""
_POSITIVE_INT: _Rule = ("a positive integer", lambda value: _is_int(value, 1))
_COUNT: _Rule = ("an integer, 0 or more", lambda value: _is_int(value, 0))
_SHARE: _Rule = ("a number above 0, at most 1", lambda value: _is_number(value) and 0 < value <= 1)
_UNIT: _Rule = ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_POSITIVE: _Rule = ("a number above 0", lambda value: _is_number(value) and value > 0)
_NOT_NEGATIVE: _Rule = ("a number, 0 or more", lambda value: _is_number(value) and value >= 0)
_NUMBER: _Rule = ("a number", _is_number)
_BOOL: _Rule = ("true or false", lambda value: isinstance(value, bool))

_RULES: dict[str, _Rule] = {
    "until": ("a string or a list of strings", _is_text_or_texts),
    **dict.fromkeys(LENGTH_KEYS, _POSITIVE_INT),
    "num_beams": _POSITIVE_INT,
    **dict.fromkeys(("top_k", "min_length", "min_new_tokens", "no_repeat_ngram_size"), _COUNT),
    "encoder_no_repeat_ngram_size": _COUNT,
    **dict.fromkeys(("top_p", "typical_p"), _SHARE),
    **dict.fromkeys(("min_p", "top_h", "epsilon_cutoff", "eta_cutoff"), _UNIT),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "max_time"), _POSITIVE),
    "temperature": _NOT_NEGATIVE,
    **dict.fromkeys(("diversity_penalty", "guidance_scale", "length_penalty"), _NUMBER),
    **dict.fromkeys(("do_sample", "remove_invalid_values", "renormalize_logits"), _BOOL),
}
