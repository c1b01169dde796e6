# pyright: basic
"""Continues prompts with media by transformers' generate, as lm-eval's `hf-multimodal` does, in padded batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_pool.chunk_messages import GenerationOptions, MediaGenerationChunk
from gpu_pool.worker.engine.batching import run_batches
from gpu_pool.worker.engine.media import MediaError
from gpu_pool.worker.engine.media_chunks import MediaChunk
from gpu_pool.worker.engine.padded_rows import PaddedRows
from gpu_pool.worker.engine.plain_generation import company_of, generate_texts
from gpu_pool.worker.engine.prompt_inputs import PromptInputs, collate
from gpu_pool.worker.engine.transcription import transcribe

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
    if loaded.transcribes:
        return transcribe(loaded, chunk, should_stop)
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

    bounds = PaddedRows.of(loaded, asked.options, 1 if asked.deterministic else asked.batch_size)

    def run(batch: list[_Prompt]) -> list[tuple[int, str]]:
        return _generate_batch(loaded, batch, asked.options, should_stop)

    def on_shortage(batch: list[_Prompt]) -> None:
        bounds.were_too_many(len(batch), len(batch[0].inputs) + asked.options.max_gen_toks)

    return dict(run_batches(run, prompts, _fits(loaded, asked.options, bounds), on_shortage))


def _fits(
    loaded: LoadedModel, options: GenerationOptions, bounds: PaddedRows
) -> Callable[[list[_Prompt], _Prompt], bool]:
    """Whether one more prompt, none longer than the first of its kind, may be generated together with the others."""
    company = company_of(loaded, options, loaded.media.company)

    def fits(batch: list[_Prompt], prompt: _Prompt) -> bool:
        first = batch[0].inputs
        if first.kind != prompt.inputs.kind or not company.allows(len(first), len(prompt.inputs)):
            return False
        return bounds.fit(len(batch) + 1, len(first) + options.max_gen_toks)

    return fits


def _generate_batch(
    loaded: LoadedModel, batch: list[_Prompt], options: GenerationOptions, should_stop: Callable[[], bool]
) -> list[tuple[int, str]]:
    """(number, text) of each prompt of one batch."""
    inputs = collate([prompt.inputs for prompt in batch], loaded.device, loaded.model.dtype)
    texts = generate_texts(loaded, inputs, [prompt.seed for prompt in batch], options, should_stop)
    return [(prompt.number, text) for prompt, text in zip(batch, texts, strict=True)]
