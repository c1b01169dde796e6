# pyright: basic
"""Chunks of prompts with images on their way through the worker: what is asked, and the inputs that it is asked of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gpu_pool.chunk_messages import MediaGenerationChunk, MediaLoglikelihoodChunk
from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.media import MediaError
from gpu_pool.worker.engine.preparation import Pending
from gpu_pool.worker.engine.prompt_inputs import PromptInputs

_WINDOW = 64
_WINDOW_BYTES = 256 << 20
"""Prompts that are looked at together, to put those of equal shapes into batches, and the memory of their inputs."""


@dataclass(frozen=True, eq=False)
class MediaChunk:
    """A chunk with the inputs of its prompts, prepared or being prepared."""

    asked: MediaLoglikelihoodChunk | MediaGenerationChunk
    inputs: list[Pending]

    @property
    def chunk_id(self) -> int:
        """Of what is asked."""
        return self.asked.chunk_id

    def windows(self, errors: dict[int, str], should_stop: Callable[[], bool]) -> Iterator[dict[int, PromptInputs]]:
        """The inputs by their prompts' numbers, some at a time; why others cannot be made goes into `errors`.

        Raises:
            Cancelled: `should_stop`, which is asked before each prompt that may have to be waited for, said so.
        """
        window: dict[int, PromptInputs] = {}
        held = 0
        most = max(_WINDOW, self.asked.batch_size or 0)
        for number, pending in enumerate(self.inputs):
            if should_stop():
                raise Cancelled
            try:
                window[number] = pending.take()
            except MediaError as error:
                errors[number] = str(error)
                continue
            held += window[number].bytes
            if len(window) == most or held > _WINDOW_BYTES:
                yield window
                window, held = {}, 0
        if window:
            yield window
