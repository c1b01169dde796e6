# pyright: basic
"""Which token comes next: the most likely one, or a draw that belongs to its prompt alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import transformers
from transformers.generation import logits_process as processing
from transformers.generation.configuration_utils import GenerationMode

from gpu_pool.chunk_messages import GenerationOptions
from gpu_pool.worker.engine.sampling import SeededNoise

_ROW_WISE = (
    processing.TemperatureLogitsWarper,
    processing.TopHLogitsWarper,
    processing.TopKLogitsWarper,
    processing.TopPLogitsWarper,
    processing.MinPLogitsWarper,
    processing.TypicalLogitsWarper,
    processing.EpsilonLogitsWarper,
    processing.EtaLogitsWarper,
    processing.InfNanRemoveLogitsProcessor,
    processing.LogitNormalization,
)
"""What looks at a position's logits alone, not at the tokens before it."""


class Chooser:
    """How the options of a chunk choose tokens."""

    def __init__(self, processors: transformers.LogitsProcessorList, do_sample: bool, eos: frozenset[int]) -> None:
        self._processors = processors
        self._do_sample = do_sample
        self.eos = eos
        """Tokens that end a row."""

    def noise(self, seed: int, device: torch.device) -> SeededNoise | None:
        """What draws for one row, from its first token on; None where nothing is drawn."""
        return SeededNoise([seed], device) if self._do_sample else None

    def choose(self, logits: torch.Tensor, noises: Sequence[SeededNoise | None]) -> list[int]:
        """The next token of each row of `logits` [rows, vocabulary]."""
        if not self._do_sample:
            return logits.float().argmax(-1).tolist()
        nothing: Any = torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)
        scores = self._processors(nothing, cast(Any, logits.float()))
        for row, noise in zip(scores, noises, strict=True):
            if noise is not None:
                row.copy_(noise(nothing, row[None])[0])
        return scores.argmax(-1).tolist()


def make_chooser(model: Any, options: GenerationOptions) -> Chooser | None:
    """How transformers' generate would choose with these options, where it looks at each position alone; else None.

    Raises:
        ValueError: options that transformers refuses.
    """
    kwargs: dict[str, Any] = {"temperature": 0.0, **options.kwargs}
    if not options.do_sample and kwargs["temperature"] == 0.0:
        del kwargs["temperature"]
    config, unknown = model._prepare_generation_config(None, do_sample=options.do_sample, **kwargs)
    if unknown or config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return None
    if options.kwargs.get("max_length") or config.max_new_tokens or config.stop_strings or config.max_time:
        return None
    if (config.num_return_sequences or 1) > 1:
        return None
    device = model.get_input_embeddings().weight.device
    prompt = torch.zeros(1, 1, dtype=torch.long, device=device)  # some processors are left out where there is none
    model._prepare_special_tokens(config, True, device=device)
    processors = model._get_logits_processor(
        config, input_ids_seq_length=1, encoder_input_ids=prompt, device=str(device)
    )
    if not all(isinstance(processor, _ROW_WISE) for processor in processors):
        return None
    eos = config.eos_token_id
    ends = frozenset(eos) if isinstance(eos, list | tuple) else frozenset({eos} - {None})
    return Chooser(processors, options.do_sample, ends)
