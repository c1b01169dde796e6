# pyright: basic
"""Continues prompts with an encoder-decoder model, as lm-eval's HF backend does with `backend="seq2seq"` one at a time.

Its batches are padded on the left, which moves positions, and share the longest prompt's limit; ours change no answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from gpu_pool.chunk_messages import GenerationChunk, GenerationOptions
from gpu_pool.worker.engine.batching import run_batches
from gpu_pool.worker.engine.company import Company
from gpu_pool.worker.engine.encoder_decoder import Tokens, encode, pad_contexts, select
from gpu_pool.worker.engine.generate_arguments import beams, generate_kwargs, is_given, until_eos
from gpu_pool.worker.engine.padded_rows import PaddedRows
from gpu_pool.worker.engine.stopping import StopAtStrings, finish_text, stop_strings

if TYPE_CHECKING:
    from gpu_pool.worker.engine.loaded_model import LoadedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One text to be generated. `limit` is the most tokens of its decoder row, the start token included."""

    index: int
    tokens: Tokens
    seed: int
    limit: int


class _RowLimits(transformers.StoppingCriteria):
    """Ends each row at its own length: lm-eval's limit grows with the prompt's."""

    def __init__(self, limits: Sequence[int], device: torch.device) -> None:
        self._limits = torch.tensor(limits, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether each of `input_ids` [rows * beams, length] is done."""
        return (input_ids.shape[1] >= self._limits).repeat_interleave(len(input_ids) // len(self._limits))


def continue_prompts(
    loaded: LoadedModel, sequences: Sequence[Tokens], chunk: GenerationChunk, should_stop: Callable[[], bool]
) -> dict[int, str]:
    """The text after each of the chunk's prompts, unpacked as `sequences`; `should_stop` is asked at every token.

    Raises:
        Cancelled: `should_stop` said so.
        ValueError: options that transformers refuses.
    """
    prompts = _plan_prompts(loaded, sequences, chunk)
    bounds = PaddedRows.of(loaded, chunk.options, chunk.batch_size)

    def run(batch: list[Prompt]) -> list[tuple[int, str]]:
        return _generate_batch(loaded, batch, chunk.options, should_stop)

    def on_shortage(batch: list[Prompt]) -> None:
        bounds.were_too_many(len(batch), len(batch[0].tokens) + batch[0].limit)

    return dict(run_batches(run, prompts, _prompts_fit(loaded, chunk.options, bounds), on_shortage))


def _plan_prompts(loaded: LoadedModel, sequences: Sequence[Tokens], chunk: GenerationChunk) -> list[Prompt]:
    """Rows, longest first, cut on the left to what the encoder takes.

    lm-eval asks for `max_length = prompt + max_gen_toks` as if the prompt were part of the decoder's row.
    """
    room, options = loaded.max_length, chunk.options
    if cut := sum(len(tokens) > room for tokens in sequences):
        logger.warning("%d prompts are cut on the left to their last %d tokens", cut, room)
    seeds = chunk.seeds or (0,) * len(sequences)
    prompts: list[Prompt] = []
    for index, (tokens, seed) in enumerate(zip(sequences, seeds, strict=True)):
        kept = tokens[-room:] or (loaded.prefix_token_id,)
        limit = int(options.kwargs.get("max_length") or len(kept) + options.max_gen_toks)
        prompts.append(Prompt(index=index, tokens=kept, seed=seed, limit=limit))
    return sorted(prompts, key=lambda prompt: (-len(prompt.tokens), prompt.tokens))


def _prompts_fit(
    loaded: LoadedModel, options: GenerationOptions, bounds: PaddedRows
) -> Callable[[list[Prompt], Prompt], bool]:
    """Whether one more prompt, none longer than the first, may be generated together with the others."""
    company = loaded.company
    if beams(loaded.model, options) > 1 and options.do_sample:
        company = Company.NONE  # their draws come from one generator for the whole batch
    elif company is Company.ANY_LENGTH and _depends_on_length(loaded, options):
        company = Company.EQUAL_LENGTH

    def fits(batch: list[Prompt], prompt: Prompt) -> bool:
        width = len(batch[0].tokens)
        return company.allows(width, len(prompt.tokens)) and bounds.fit(len(batch) + 1, width + batch[0].limit)

    return fits


def _depends_on_length(loaded: LoadedModel, options: GenerationOptions) -> bool:
    """Whether a prompt's length decides more than where its row ends at the latest.

    Beams end together, an end token is forced at the limit, n-grams of the prompt would be those of its padding, and
    lm-eval looks for stop strings only behind as many tokens as the prompt has: that shows where thinking is cut off.
    """
    names = ("forced_eos_token_id", "encoder_no_repeat_ngram_size")
    depends = any(is_given(name, loaded.model, options) for name in names)
    return depends or beams(loaded.model, options) > 1 or loaded.think_end_token is not None


@torch.inference_mode()
def _generate_batch(
    loaded: LoadedModel, batch: list[Prompt], options: GenerationOptions, should_stop: Callable[[], bool]
) -> list[tuple[int, str]]:
    """(index, text) of each prompt of one batch."""
    distinct = list(dict.fromkeys(prompt.tokens for prompt in batch))
    places = torch.tensor([distinct.index(prompt.tokens) for prompt in batch], device=loaded.device)
    ids, mask = pad_contexts(distinct, loaded.device)
    encoded = encode(loaded.model, ids, mask)
    until = stop_strings(options.until, loaded.tokenizer)
    first = len(batch[0].tokens) if _depends_on_length(loaded, options) else 1  # 0 is the decoder start token
    stopping = StopAtStrings(loaded.tokenizer, until, (len(batch), first), should_stop)
    limits = _RowLimits([prompt.limit for prompt in batch], loaded.device)
    output = loaded.model.generate(
        input_ids=ids[places],
        attention_mask=mask[places],
        encoder_outputs=select(encoded, places),
        stopping_criteria=transformers.StoppingCriteriaList([stopping, limits]),
        pad_token_id=loaded.tokenizer.pad_token_id,
        use_cache=True,
        **generate_kwargs(loaded.model, options, max(p.limit for p in batch), [p.seed for p in batch]),
    )
    texts: list[tuple[int, str]] = []
    for prompt, tokens, length in zip(batch, output.tolist(), stopping.lengths, strict=True):
        end = prompt.limit
        if length is not None and beams(loaded.model, options) == 1:  # a beam's end is its own
            end = min(end, first + length)
        kept = tokens[:1] + until_eos(tokens[1:end], loaded.model, options)
        texts.append((prompt.index, finish_text(kept, loaded.tokenizer, until, loaded.think_end_token)))
    return texts
