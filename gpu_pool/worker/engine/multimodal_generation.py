# pyright: basic
"""Continues prompts with images by transformers' generate, as lm-eval's `hf-multimodal` does, in padded batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import transformers

from gpu_pool.chunk_messages import GenerationOptions, MediaGenerationChunk
from gpu_pool.worker.engine.batching import run_batches
from gpu_pool.worker.engine.generate_arguments import beams, generate_kwargs, until_eos
from gpu_pool.worker.engine.media import MediaError
from gpu_pool.worker.engine.media_chunks import MediaChunk
from gpu_pool.worker.engine.plain_generation import company_of
from gpu_pool.worker.engine.prompt_inputs import PromptInputs, collate
from gpu_pool.worker.engine.stopping import StopAtStrings, finish_text, stop_strings

if TYPE_CHECKING:
    from gpu_pool.worker.engine.loaded_model import LoadedModel


@dataclass(frozen=True)
class _Prompt:
    """One row to be generated."""

    number: int
    inputs: PromptInputs
    seed: int


def generate(
    loaded: LoadedModel, chunk: MediaChunk, should_stop: Callable[[], bool]
) -> tuple[dict[int, str], dict[int, str]]:
    """The text of each of the chunk's prompts, or why there is none, by its number.

    `should_stop` is asked at every token.

    Raises:
        Cancelled: `should_stop` said so.
        ValueError: options that transformers refuses.
    """
    asked = chunk.asked
    assert isinstance(asked, MediaGenerationChunk)
    room = loaded.max_length - asked.options.max_gen_toks
    if room <= 0:
        raise ValueError(
            f"max_gen_toks ({asked.options.max_gen_toks}) must be less than the context length ({loaded.max_length})"
        )
    seeds = asked.seeds or (0,) * len(asked.prompts)
    texts: dict[int, str] = {}
    errors: dict[int, str] = {}
    for window in chunk.windows(errors, should_stop):
        prompts: list[_Prompt] = []
        for number, inputs in window.items():
            try:
                prompts.append(_Prompt(number, inputs.last(room), seeds[number]))
            except MediaError as error:
                errors[number] = str(error)
        texts |= _generate_window(loaded, prompts, asked, should_stop)
    return texts, errors


def _generate_window(
    loaded: LoadedModel, prompts: list[_Prompt], asked: MediaGenerationChunk, should_stop: Callable[[], bool]
) -> dict[int, str]:
    kinds = {kind: place for place, kind in enumerate(dict.fromkeys(prompt.inputs.kind for prompt in prompts))}
    prompts.sort(key=lambda prompt: (kinds[prompt.inputs.kind], -len(prompt.inputs)))

    def run(batch: list[_Prompt]) -> list[tuple[int, str]]:
        return _generate_batch(loaded, batch, asked.options, should_stop)

    def on_shortage(batch: list[_Prompt]) -> None:
        loaded.limits.shrink_generated(_held(loaded, asked.options, batch))

    return dict(run_batches(run, prompts, _fits(loaded, asked), on_shortage))


def _held(loaded: LoadedModel, options: GenerationOptions, batch: Sequence[_Prompt]) -> int:
    """Padded tokens of a batch when all its rows, none longer than the first, have grown to their limit."""
    return len(batch) * beams(loaded.model, options) * (len(batch[0].inputs) + options.max_gen_toks)


def _fits(loaded: LoadedModel, asked: MediaGenerationChunk) -> Callable[[list[_Prompt], _Prompt], bool]:
    """Whether one more prompt, none longer than the first of its kind, may be generated together with the others."""
    limits, options = loaded.limits, asked.options
    most_rows = 1 if asked.deterministic else min(asked.batch_size or limits.generated_rows, limits.generated_rows)
    company = company_of(loaded, options, loaded.images.company)

    def fits(batch: list[_Prompt], prompt: _Prompt) -> bool:
        first = batch[0].inputs
        if first.kind != prompt.inputs.kind or not company.allows(len(first), len(prompt.inputs)):
            return False
        return len(batch) < most_rows and _held(loaded, options, [*batch, prompt]) <= limits.generated_tokens

    return fits


@torch.inference_mode()
def _generate_batch(
    loaded: LoadedModel, batch: list[_Prompt], options: GenerationOptions, should_stop: Callable[[], bool]
) -> list[tuple[int, str]]:
    """(number, text) of each prompt of one batch."""
    inputs = collate([prompt.inputs for prompt in batch], loaded.device, loaded.model.dtype)
    rows, width = inputs["input_ids"].shape
    until = stop_strings(options.until, loaded.tokenizer)
    stopping = StopAtStrings(loaded.tokenizer, until, (rows, width), should_stop)
    output = loaded.model.generate(
        **inputs,
        stopping_criteria=transformers.StoppingCriteriaList([stopping]),
        pad_token_id=loaded.tokenizer.pad_token_id,
        use_cache=True,
        **generate_kwargs(loaded.model, options, width + options.max_gen_toks, [prompt.seed for prompt in batch]),
    )
    lengths = stopping.lengths if beams(loaded.model, options) == 1 else [None] * rows  # a beam's end is its own
    texts: list[tuple[int, str]] = []
    for prompt, tokens, length in zip(batch, output.tolist(), lengths, strict=True):
        kept = until_eos(tokens[width:][:length], loaded.model, options)
        texts.append((prompt.number, finish_text(kept, loaded.tokenizer, until, loaded.think_end_token)))
    return texts
