"""A task's `generation_kwargs` as a worker is told them."""

# pyright: basic
from __future__ import annotations

from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from gpu_pool.chunk_messages import GenerationOptions
from gpu_pool.evaluator.failures import OptionsError
from gpu_pool.gen_kwargs import LENGTH_KEYS, WORKER_KEYS

_DEFAULT_IF_NULL = ("max_length", "num_beams", "temperature")
"""Options that transformers' generate takes no None for; of others None is a value: no end token, say."""


def generation_options(gen_kwargs: dict, end_of_text: str | None) -> GenerationOptions:
    """A task's `generation_kwargs` as HFLM's `generate_until` and `_model_generate` read them.

    Without what changes no text: whether generate takes it depends on how the worker computes the model.

    Raises:
        OptionsError: nothing to generate, or what has no meaning here; each fails in lm-eval's HF backend, too.
    """
    given = {key: value for key, value in gen_kwargs.items() if key not in WORKER_KEYS}
    given = {key: value for key, value in given.items() if value is not None or key not in _DEFAULT_IF_NULL}
    _check_options(given)
    kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given))
    until = handle_stop_sequences(kwargs.pop("until", None), eos=end_of_text)
    max_gen_toks = kwargs.pop("max_gen_toks")
    do_sample = bool(kwargs.pop("do_sample"))
    temperature = kwargs.pop("temperature", 0.0)
    if do_sample or temperature != 0.0:
        kwargs["temperature"] = temperature
    return GenerationOptions(until=tuple(until), max_gen_toks=max_gen_toks, do_sample=do_sample, kwargs=kwargs)


def _check_options(given: dict[str, Any]) -> None:
    """Refuse options with no meaning here, and take those out that say nothing."""
    length = next((key for key in LENGTH_KEYS if given.get(key) is not None), None)
    if length and not _is_positive(given[length]):
        raise OptionsError(f"generation_kwargs.{length} must be 1 or more, not {given[length]}")
    count = given.pop("num_return_sequences", None)
    if count not in (None, 1):
        raise OptionsError(
            f"generation_kwargs.num_return_sequences must be 1, not {count}: lm-eval takes one response to a request, "
            f"and its HF backend fails on more; for several give the task `repeats: {count}`, which read a prompt once"
        )
    if given.pop("token_healing", None):
        raise OptionsError("generation_kwargs.token_healing must be false: prompts are continued as they are")


def _is_positive(length: Any) -> bool:
    try:
        return int(length) > 0
    except (TypeError, ValueError):
        return False


def is_deterministic(options: GenerationOptions) -> bool:
    """Whether the same prompt gives the same text every time."""
    return not options.do_sample or options.kwargs.get("temperature") == 0.0
