# pyright: basic
"""Continues prompts by transformers' generate, in padded batches: for models and options that have no other way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import transformers

from gpu_pool.chunk_messages import GenerationChunk, GenerationOptions
from gpu_pool.worker.engine.batching import run_batches
from gpu_pool.worker.engine.company import Company
from gpu_pool.worker.engine.generate_arguments import beams, generate_kwargs, is_given, until_eos
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.padded_rows import PaddedRows
from gpu_pool.worker.engine.padding import pad_left
from gpu_pool.worker.engine.prompts import Prompt
from gpu_pool.worker.engine.rope import forget_earlier_passes, rope_boundary
from gpu_pool.worker.engine.stopping import StopAtStrings, finish_text, stop_strings

_COUNT_PADDING = (
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "bad_words_ids",
    "sequence_bias",
    "forced_bos_token_id",
)
"""Options under which transformers looks at padding as if it were text: then only equal lengths share a batch."""


def generate_rows(
    loaded: LoadedModel, prompts: Sequence[Prompt], chunk: GenerationChunk, should_stop: Callable[[], bool]
) -> dict[int, str]:
    """The text of each prompt, by its index; `should_stop` is asked at every token.

    Raises:
        Cancelled: `should_stop` said so.
        ValueError: options that transformers refuses.
    """
    prompts = sorted(prompts, key=lambda prompt: (-len(prompt.tokens), prompt.tokens))

    def run(batch: list[Prompt]) -> list[tuple[int, str]]:
        forget_earlier_passes(loaded)
        return _generate_batch(loaded, batch, chunk.options, should_stop)

    bounds = PaddedRows.of(loaded, chunk.options, chunk.batch_size)

    def on_shortage(batch: list[Prompt]) -> None:
        bounds.were_too_many(len(batch), len(batch[0].tokens) + chunk.options.max_gen_toks)

    return dict(run_batches(run, prompts, _fits(loaded, chunk.options, bounds), on_shortage))


def _fits(
    loaded: LoadedModel, options: GenerationOptions, bounds: PaddedRows
) -> Callable[[list[Prompt], Prompt], bool]:
    """Whether one more prompt, none longer than the first, may be generated together with the others."""
    company = company_of(loaded, options, loaded.company)
    boundary = rope_boundary(loaded) or loaded.max_length

    def fits(batch: list[Prompt], prompt: Prompt) -> bool:
        width, longest = len(batch[0].tokens), len(batch[0].tokens) + options.max_gen_toks
        if not company.allows(width, len(prompt.tokens)):
            return False
        if longest > boundary and len(prompt.tokens) != width:
            return False
        return bounds.fit(len(batch) + 1, longest)

    return fits


def company_of(loaded: LoadedModel, options: GenerationOptions, company: Company) -> Company:
    """What both the model, by its probe, and the options allow."""
    if beams(loaded.model, options) > 1 and options.do_sample:
        return Company.NONE  # their draws come from one generator for the whole batch
    if any(is_given(name, loaded.model, options) for name in _COUNT_PADDING):
        return Company.NONE if company is Company.NONE else Company.EQUAL_LENGTH
    return company


def _generate_batch(
    loaded: LoadedModel, batch: list[Prompt], options: GenerationOptions, should_stop: Callable[[], bool]
) -> list[tuple[int, str]]:
    """(index, text) of each prompt of one batch."""
    ids, mask = pad_left([prompt.tokens for prompt in batch], loaded.device)
    inputs = {"input_ids": ids, "attention_mask": mask}
    texts = generate_texts(loaded, inputs, [prompt.seed for prompt in batch], options, should_stop)
    return [(prompt.index, text) for prompt, text in zip(batch, texts, strict=True)]


@torch.inference_mode()
def generate_texts(
    loaded: LoadedModel,
    inputs: Mapping[str, torch.Tensor],
    seeds: Sequence[int],
    options: GenerationOptions,
    should_stop: Callable[[], bool],
) -> list[str]:
    """What follows each row of `inputs`: `input_ids` [rows, width], padded on the left, and what else forward takes."""
    rows, width = inputs["input_ids"].shape
    until = stop_strings(options.until, loaded.tokenizer)
    stopping = StopAtStrings(loaded.tokenizer, until, (rows, width), should_stop)
    output = loaded.model.generate(
        **inputs,
        stopping_criteria=transformers.StoppingCriteriaList([stopping]),
        pad_token_id=loaded.tokenizer.pad_token_id,
        use_cache=True,
        **generate_kwargs(loaded.model, options, width + options.max_gen_toks, seeds),
    )
    lengths = stopping.lengths if beams(loaded.model, options) == 1 else [None] * rows  # a beam's end is its own
    texts: list[str] = []
    for tokens, length in zip(output.tolist(), lengths, strict=True):
        kept = until_eos(tokens[width:][:length], loaded.model, options)
        texts.append(finish_text(kept, loaded.tokenizer, until, loaded.think_end_token))
    return texts
