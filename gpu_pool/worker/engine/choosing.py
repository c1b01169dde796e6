# pyright: basic
"""Which token comes next in each row: the most likely one, or a draw that belongs to its prompt alone.

transformers' own processors change the logits before. Those that look at a position's logits alone serve all rows at
once. Where one of them looks at the tokens before it, too, every row has processors of its own, which see the prompt
and what has been written so far as generate would show them to it: the row by itself, without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import transformers
from transformers.generation import logits_process as processing
from transformers.generation.configuration_utils import GenerationMode

from gpu_pool.chunk_messages import GenerationOptions
from gpu_pool.worker.engine.blocks import Tokens
from gpu_pool.worker.engine.sampling import SeededNoise

_BY_POSITION = (
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
    processing.SuppressTokensLogitsProcessor,
)
"""What looks at a position's logits alone."""
_BY_ROW = (
    processing.RepetitionPenaltyLogitsProcessor,
    processing.EncoderRepetitionPenaltyLogitsProcessor,
    processing.NoRepeatNGramLogitsProcessor,
    processing.EncoderNoRepeatNGramLogitsProcessor,
    processing.SequenceBiasLogitsProcessor,
    processing.NoBadWordsLogitsProcessor,
    processing.MinLengthLogitsProcessor,
    processing.MinNewTokensLengthLogitsProcessor,
    processing.ForcedBOSTokenLogitsProcessor,
    processing.ForcedEOSTokenLogitsProcessor,
    processing.ExponentialDecayLengthPenalty,
    processing.SuppressTokensAtBeginLogitsProcessor,
)
"""What looks at the tokens before it as well, and at nothing else."""

Processors = transformers.LogitsProcessorList


class CannotChoose(Exception):
    """Why only transformers' generate chooses as the options want it."""


class ChosenRow:
    """A row that is continued, as far as choosing its next token goes."""

    def __init__(
        self, noise: SeededNoise | None, processors: Processors | None, prompt: Tokens, room: int, device: torch.device
    ) -> None:
        """`processors` of its own, if it has some: then its tokens are remembered, `room` of them after the prompt."""
        self._noise = noise
        self._processors = processors
        self._length = len(prompt)
        self._ids = torch.zeros(1, len(prompt) + room if processors else 0, dtype=torch.long, device=device)
        if processors:
            self._ids[0, : len(prompt)] = torch.tensor(prompt)

    def process(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [1, vocabulary] by which the next token is the most likely one."""
        if self._processors:
            scores = self._processors(cast(Any, self._ids[:, : self._length]), cast(Any, scores))
        return scores if self._noise is None else self._noise(self._ids, scores)

    def add(self, token: int) -> None:
        """It goes on with this one."""
        if self._processors:
            self._ids[0, self._length] = token
        self._length += 1


class Chooser:
    """How the options of a chunk choose tokens."""

    def __init__(
        self,
        processors_for: Callable[[Tokens], Processors],
        max_gen_toks: int,
        do_sample: bool,
        eos: frozenset[int],
        device: torch.device,
    ) -> None:
        """`processors_for` are those of a row with this prompt."""
        self._processors_for = processors_for
        self._common: Processors | None = processors_for((0,))
        if any(isinstance(processor, _BY_ROW) for processor in self._common):
            self._common = None
        self._max_gen_toks = max_gen_toks
        self._do_sample = do_sample
        self._device = device
        self.eos = eos
        """Tokens that end a row."""

    def start(self, prompt: Tokens, seed: int) -> ChosenRow:
        """A row that continues `prompt`, from its first token on."""
        noise = SeededNoise([seed], self._device) if self._do_sample else None
        processors = self._processors_for(prompt) if self._common is None else None
        return ChosenRow(noise, processors, prompt, self._max_gen_toks, self._device)

    def choose(self, logits: torch.Tensor, rows: Sequence[ChosenRow]) -> list[int]:
        """The next token of each of `rows`, by their `logits` [rows, vocabulary]."""
        scores = logits.float()
        if self._common:
            scores = self._common(cast(Any, torch.empty(len(rows), 0, dtype=torch.long)), cast(Any, scores))
        if self._do_sample or self._common is None:
            scores = torch.cat([row.process(own[None]) for row, own in zip(rows, scores, strict=True)])
        tokens = scores.argmax(-1).tolist()
        for row, token in zip(rows, tokens, strict=True):
            row.add(token)
        return tokens


def make_chooser(model: Any, options: GenerationOptions) -> Chooser:
    """How transformers' generate would choose with these options.

    Raises:
        CannotChoose: it looks at more than the row itself.
        ValueError: options that transformers refuses.
    """
    kwargs: dict[str, Any] = {"temperature": 0.0, **options.kwargs}
    if not options.do_sample and kwargs["temperature"] == 0.0:
        del kwargs["temperature"]
    config, unknown = model._prepare_generation_config(None, do_sample=options.do_sample, **kwargs)
    if obstacle := next(_obstacles(config, unknown, options), None):
        raise CannotChoose(obstacle)
    device = model.get_input_embeddings().weight.device
    model._prepare_special_tokens(config, True, device=device)

    def processors_for(prompt: Tokens) -> Processors:
        config.max_length = len(prompt) + options.max_gen_toks
        ids = torch.tensor([prompt], device=device)
        return model._get_logits_processor(
            config, input_ids_seq_length=len(prompt), encoder_input_ids=ids, device=str(device)
        )

    others = [processor for processor in processors_for((0,)) if not isinstance(processor, _BY_POSITION + _BY_ROW)]
    if others:
        raise CannotChoose(f"its options need {', '.join(type(processor).__name__ for processor in others)}")
    eos = config.eos_token_id
    ends = frozenset(eos) if isinstance(eos, list | tuple) else frozenset({eos} - {None})
    return Chooser(processors_for, options.max_gen_toks, options.do_sample, ends, device)


def _obstacles(config: Any, unknown: Sequence[str], options: GenerationOptions) -> Iterator[str]:
    """What is not done token by token, or not for each row alone."""
    if unknown:
        yield f"its options are not all of generate's own: {', '.join(unknown)}"
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        yield f"its options mean {mode.value.replace('_', ' ')}"
    if options.kwargs.get("max_length"):
        yield "max_length is among its options"
    for name in ("max_new_tokens", "stop_strings", "max_time"):
        if getattr(config, name):
            yield f"{name} is among its options"
    if (config.num_return_sequences or 1) > 1:
        yield "num_return_sequences is among its options"
