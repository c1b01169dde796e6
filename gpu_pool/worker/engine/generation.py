# pyright: basic
"""Continues prompts as lm-eval's HF backend does, with answers that do not depend on what else is in the batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from gpu_pool.messages import GenerationChunk, GenerationOptions
from gpu_pool.worker.engine.batching import greedy_batches, run_halving
from gpu_pool.worker.engine.loading import LoadedModel
from gpu_pool.worker.engine.padding import Company, pad_left
from gpu_pool.worker.engine.sampling import seeded_sampling
from gpu_pool.worker.engine.stopping import StopAtStrings, finish_text, stop_strings

logger = logging.getLogger(__name__)

_COUNT_PADDING = (
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
)
"""Options under which transformers looks at padding as if it were text: then only equal lengths share a batch."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row to be generated."""

    index: int
    tokens: tuple[int, ...]
    seed: int


def generate(loaded: LoadedModel, chunk: GenerationChunk, should_stop: Callable[[], bool]) -> tuple[str, ...]:
    """Texts in request order; `should_stop` is asked at every token.

    Raises:
        Cancelled: `should_stop` said so.
        ValueError: a request that cannot be continued, or options that transformers refuses.
    """
    loaded.check_tokens(chunk.prompts)
    prompts = _plan_prompts(loaded, chunk)
    texts: dict[int, str] = {}

    def run(batch: list[Prompt]) -> list[tuple[int, str]]:
        return _generate_batch(loaded, batch, chunk.options, should_stop)

    for batch in greedy_batches(prompts, _fits(loaded, chunk)):
        texts.update(run_halving(run, batch))
    return tuple(texts[index] for index in range(len(prompts)))


def _plan_prompts(loaded: LoadedModel, chunk: GenerationChunk) -> list[Prompt]:
    """Rows, longest first, cut on the left so that the new tokens fit; an empty prompt starts from the prefix token."""
    room = loaded.max_length - chunk.options.max_gen_toks
    if room <= 0:
        raise ValueError(
            f"max_gen_toks ({chunk.options.max_gen_toks}) must be less than the context length ({loaded.max_length})"
        )
    if cut := sum(len(tokens) > room for tokens in chunk.prompts):
        logger.warning("%d prompts are cut on the left to their last %d tokens", cut, room)
    seeds = chunk.seeds or (0,) * len(chunk.prompts)
    prompts = [
        Prompt(index=index, tokens=tokens[-room:] or (loaded.prefix_token_id,), seed=seed)
        for index, (tokens, seed) in enumerate(zip(chunk.prompts, seeds, strict=True))
    ]
    return sorted(prompts, key=lambda prompt: (-len(prompt.tokens), prompt.tokens))


def _fits(loaded: LoadedModel, chunk: GenerationChunk) -> Callable[[list[Prompt], Prompt], bool]:
    """Whether one more prompt, none longer than the first, may be generated together with the others."""
    limits, options = loaded.limits, chunk.options
    most_rows = chunk.batch_size or limits.generated_rows
    company = _company(loaded, options)

    def fits(batch: list[Prompt], prompt: Prompt) -> bool:
        count, width = len(batch) + 1, len(batch[0].tokens)
        if company is Company.NONE or (company is Company.EQUAL_LENGTH and len(prompt.tokens) != width):
            return False
        if count > most_rows:
            return False
        held = count * _beams(options) * (width + options.max_gen_toks)
        return bool(chunk.batch_size) or held <= limits.generated_tokens

    return fits


def _company(loaded: LoadedModel, options: GenerationOptions) -> Company:
    """What both the model and the options allow."""
    if _beams(options) > 1 and options.do_sample:
        return Company.NONE  # their draws come from one generator for the whole batch
    defaults = loaded.model.generation_config
    if any(options.kwargs.get(name, getattr(defaults, name, None)) for name in _COUNT_PADDING):
        return Company.NONE if loaded.company is Company.NONE else Company.EQUAL_LENGTH
    return loaded.company


def _beams(options: GenerationOptions) -> int:
    return int(options.kwargs.get("num_beams") or 1)


@torch.inference_mode()
def _generate_batch(
    loaded: LoadedModel, batch: list[Prompt], options: GenerationOptions, should_stop: Callable[[], bool]
) -> list[tuple[int, str]]:
    """(index, text) of each prompt of one batch."""
    ids, mask = pad_left([prompt.tokens for prompt in batch], loaded.device)
    rows, width = ids.shape
    until = stop_strings(options.until, loaded.tokenizer)
    stopping = StopAtStrings(loaded.tokenizer, until, (rows, width), should_stop)
    kwargs = _generate_kwargs(options, width)
    if kwargs.get("do_sample"):
        kwargs |= _sampling_kwargs(options, batch)
    output = loaded.model.generate(
        input_ids=ids,
        attention_mask=mask,
        stopping_criteria=transformers.StoppingCriteriaList([stopping]),
        pad_token_id=loaded.tokenizer.pad_token_id,
        use_cache=True,
        **kwargs,
    )
    lengths = stopping.lengths if _beams(options) == 1 else [None] * rows  # a beam's end is its own
    eos = _eos_ids(loaded.model, kwargs)
    return [
        (
            prompt.index,
            finish_text(_until_eos(tokens[width:][:length], eos), loaded.tokenizer, until, loaded.think_end_token),
        )
        for prompt, tokens, length in zip(batch, output.tolist(), lengths, strict=True)
    ]


def _generate_kwargs(options: GenerationOptions, width: int) -> dict[str, Any]:
    """What lm-eval's HF backend passes to generate: no temperature means greedy unless `do_sample` says otherwise."""
    kwargs: dict[str, Any] = {"temperature": 0.0, "max_length": width + options.max_gen_toks, **options.kwargs}
    kwargs["do_sample"] = options.do_sample
    if not options.do_sample and kwargs["temperature"] == 0.0:
        del kwargs["temperature"]
    return kwargs


def _sampling_kwargs(options: GenerationOptions, batch: list[Prompt]) -> dict[str, Any]:
    if _beams(options) > 1:
        torch.manual_seed(batch[0].seed)
        return {}
    return {"custom_generate": seeded_sampling([prompt.seed for prompt in batch])}


def _eos_ids(model: Any, kwargs: dict[str, Any]) -> set[int]:
    """The tokens at which generate ends a row."""
    eos = kwargs.get("eos_token_id", model.generation_config.eos_token_id)
    return set(eos) if isinstance(eos, list | tuple) else {eos} - {None}


def _until_eos(tokens: list[int], eos: set[int]) -> list[int]:
    """A row without the padding that follows its end."""
    end = next((index for index, token in enumerate(tokens) if token in eos), len(tokens))
    return tokens[: end + 1]
