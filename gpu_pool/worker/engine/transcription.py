# pyright: basic
"""Writes down what is said, by a speech model's own generate: Whisper's, with the tokens of language and task that it
begins with.

Sounds of at most the model's 30 seconds are of one shape and share batches; a longer one is written down alone, along
its timestamps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from gpu_pool.chunk_messages import GenerationOptions, MediaGenerationChunk
from gpu_pool.worker.engine.batching import run_batches
from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.company import Company
from gpu_pool.worker.engine.media_chunks import MediaChunk
from gpu_pool.worker.engine.padded_rows import PaddedRows
from gpu_pool.worker.engine.prompt_inputs import PromptInputs, collate
from gpu_pool.worker.engine.stopping import finish_text, stop_strings

if TYPE_CHECKING:
    from gpu_pool.worker.engine.loaded_model import LoadedModel

_FRAMES_OF_A_POSITION = 2
"""Whisper's encoder halves its input."""
_BEGINNING = 8
"""Tokens that a text begins with at most: of start, language, task and timestamps."""


@dataclass(frozen=True)
class _Sound:
    number: int
    inputs: PromptInputs


class _Cancelling(transformers.StoppingCriteria):
    """Ends everything once nobody waits for it."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Never done.

        Raises:
            Cancelled: nobody waits for these rows any more.
        """
        if self._should_stop():
            raise Cancelled
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def transcribe(
    loaded: LoadedModel, chunk: MediaChunk, should_stop: Callable[[], bool]
) -> tuple[dict[int, str], dict[int, str]]:
    """The text of each of the chunk's sounds, or why there is none, by number; `should_stop` is asked at every token.

    Raises:
        Cancelled: `should_stop` said so.
        ValueError: options that the model's generate does not take.
    """
    asked = chunk.asked
    assert isinstance(asked, MediaGenerationChunk)
    if asked.options.do_sample:
        raise ValueError("a speech model writes the most likely text: do_sample must be false")
    texts: dict[int, str] = {}
    errors: dict[int, str] = {}
    bounds = PaddedRows.of(loaded, asked.options, 1 if asked.deterministic else asked.batch_size)
    longest = loaded.model.config.max_target_positions  # of a text; sounds take none of this memory

    def run(batch: list[_Sound]) -> list[tuple[int, str]]:
        written = transcribe_batch(loaded, [sound.inputs for sound in batch], asked.options, should_stop)
        return [(sound.number, text) for sound, text in zip(batch, written, strict=True)]

    def on_shortage(batch: list[_Sound]) -> None:
        bounds.were_too_many(len(batch), longest)

    for window in chunk.windows(errors, should_stop):
        sounds = [_Sound(number, inputs) for number, inputs in window.items()]
        sounds.sort(key=lambda sound: _frames(sound.inputs))
        texts |= dict(run_batches(run, sounds, _fits(loaded, bounds), on_shortage))
    return texts, errors


def _frames(inputs: PromptInputs) -> int:
    return inputs.tensors["input_features"].shape[-1]


def _is_short(loaded: LoadedModel, inputs: PromptInputs) -> bool:
    """Whether the encoder hears all of it at once."""
    return _frames(inputs) <= _FRAMES_OF_A_POSITION * loaded.model.config.max_source_positions


def _fits(loaded: LoadedModel, bounds: PaddedRows) -> Callable[[list[_Sound], _Sound], bool]:
    """Whether one more sound may be written down together with the others."""
    alone = loaded.media.company is Company.NONE

    def fits(batch: list[_Sound], sound: _Sound) -> bool:
        if alone or not _is_short(loaded, sound.inputs) or batch[0].inputs.kind != sound.inputs.kind:
            return False
        return bounds.fit(len(batch) + 1, loaded.model.config.max_target_positions)

    return fits


@torch.inference_mode()
def transcribe_batch(
    loaded: LoadedModel,
    sounds: Sequence[PromptInputs],
    options: GenerationOptions,
    should_stop: Callable[[], bool],
) -> list[str]:
    """The text of each of these sounds, which are of one kind."""
    inputs = collate(sounds, loaded.device, loaded.model.dtype)
    kwargs = {"num_beams": 1, **loaded.speech, **options.kwargs}
    if not _is_short(loaded, sounds[0]):
        kwargs["return_timestamps"] = True
    room = loaded.model.config.max_target_positions - _BEGINNING
    output = loaded.model.generate(
        **inputs,
        stopping_criteria=transformers.StoppingCriteriaList([_Cancelling(should_stop)]),
        max_new_tokens=min(options.max_gen_toks, room),
        **kwargs,
    )
    until = stop_strings(options.until, loaded.tokenizer)
    return [finish_text(tokens, loaded.tokenizer, until, None) for tokens in output.tolist()]
