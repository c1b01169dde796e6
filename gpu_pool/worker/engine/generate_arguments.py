# pyright: basic
"""What lm-eval's HF backend passes to transformers' generate, and which tokens of a row are its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gpu_pool.chunk_messages import GenerationOptions
from gpu_pool.worker.engine.sampling import seeded_sampling


def effective(name: str, model: Any, options: GenerationOptions) -> Any:
    """An option as generate will see it: the request's, or the checkpoint's default."""
    return options.kwargs.get(name, getattr(model.generation_config, name, None))


def is_given(name: str, model: Any, options: GenerationOptions) -> bool:
    """Whether an option says anything: 0 is a token like any other, but no length and no size."""
    value = effective(name, model, options)
    return value is not None if name.endswith("_token_id") else bool(value)


def beams(model: Any, options: GenerationOptions) -> int:
    """Beams of each prompt; 1 without beam search."""
    return int(effective("num_beams", model, options) or 1)


def generate_kwargs(model: Any, options: GenerationOptions, max_length: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Arguments of one batch whose prompts have these `seeds` (lm-eval's `_model_generate`).

    No temperature means greedy unless `do_sample` says otherwise. Beams that are sampled draw from one generator.
    """
    kwargs: dict[str, Any] = {"temperature": 0.0, "max_length": max_length, **options.kwargs}
    kwargs["do_sample"] = options.do_sample
    if options.do_sample and beams(model, options) == 1:
        kwargs["custom_generate"] = seeded_sampling(seeds)
    elif options.do_sample:
        torch.manual_seed(seeds[0])
    elif kwargs["temperature"] == 0.0:
        del kwargs["temperature"]
    return kwargs


def until_eos(tokens: list[int], model: Any, options: GenerationOptions) -> list[int]:
    """A generated row without the padding that follows its end token."""
    eos = effective("eos_token_id", model, options)
    ends = set(eos) if isinstance(eos, list | tuple) else {eos}
    end = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]
