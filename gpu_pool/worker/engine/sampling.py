# pyright: basic
"""Sampling whose draws belong to a prompt, not to the batch that it happens to be in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers


class SeededNoise(transformers.LogitsProcessor):
    """Adds Gumbel noise from each row's own generator: the most likely token is then a draw from the softmax."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocabulary] with noise."""
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


def seeded_sampling(seeds: Sequence[int]) -> Callable[..., torch.Tensor]:
    """A decoding loop for generate's `custom_generate`: transformers' own, drawing through `SeededNoise`.

    generate applies its temperature, top-k and so on after the processors that a caller passes; a decoding loop is the
    documented place that comes later.
    """

    def decode(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: transformers.LogitsProcessorList,
        stopping_criteria: transformers.StoppingCriteriaList,
        generation_config: transformers.GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        logits_processor.append(SeededNoise(seeds, input_ids.device))
        generation_config.do_sample = False  # take the most likely token: the noise has drawn it
        return type(model)._sample(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **model_kwargs,
        )

    return decode
