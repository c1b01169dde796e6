# pyright: basic
"""Which sequences may share a batch of the plain way without changing each other's answers: the model is asked."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gpu_pool.worker.engine.blocks import Tokens
from gpu_pool.worker.engine.configs import largest_window
from gpu_pool.worker.engine.padding import pad_left

_PROBE_LENGTH = 6
_NEW_TOKENS = 2
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 0.1
"""Share of the logits' spread by which they may be apart: rounding does less, a polluted state more."""


class Company(enum.Enum):
    """Which sequences a model can compute together without changing each other's answers."""

    ANY_LENGTH = "any length"
    EQUAL_LENGTH = "equal length"  # padding gets into some states and attentions, attention mask or not
    NONE = "none"  # and some mix the rows of a batch up

    def allows(self, width: int, length: int) -> bool:
        """Whether sequences of these lengths may meet."""
        return self is Company.ANY_LENGTH or (self is Company.EQUAL_LENGTH and width == length)


@torch.inference_mode()
def probe_company(model: Any, logits: Callable[[Sequence[Tokens]], torch.Tensor], window: int = 0) -> Company:
    """Ask the model: `logits(sequences)` are some of the first one's [..., vocabulary], computed with the others.

    It is asked of a short sequence and of one beyond a `window` of so many tokens, either beside a longer one.
    """
    size = model.get_input_embeddings().weight.shape[0]

    def tokens(factor: int, length: int) -> Tokens:
        return tuple((factor * index + 3) % size for index in range(length))

    lengths = sorted({_PROBE_LENGTH, window + _PROBE_LENGTH})
    alone = {length: logits([tokens(7, length)]) for length in lengths}

    def are_left_alone_by(others: Mapping[int, Tokens]) -> bool:
        together = ((length, logits([tokens(7, length), others[length]])) for length in lengths)
        return all(are_equal(alone[length], found, model.dtype) for length, found in together)

    if are_left_alone_by(dict.fromkeys(lengths, tokens(11, window + 2 * _PROBE_LENGTH))):
        return Company.ANY_LENGTH
    if are_left_alone_by({length: tokens(5, length) for length in lengths}):
        return Company.EQUAL_LENGTH
    return Company.NONE


def probed_window(config: Any, longest: int, most_tokens: int) -> int:
    """The window that `probe_company` is to go beyond: 0 where batches do not get that wide.

    No sequence is longer than `longest`, and two of them share a forward pass of `most_tokens` with their padding.
    """
    window = largest_window(config)
    return max(0, min(window, longest - 2 * _PROBE_LENGTH - _NEW_TOKENS)) if 2 * window < most_tokens else 0


def are_equal(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether rounding explains how far these logits, both of one shape, of a model of this type are apart."""
    one, other = one.float(), other.float()
    allowed = _TOLERANCE.get(dtype, _HALF_TOLERANCE) * (one.max() - one.min())
    return bool((one - other).abs().max() <= allowed)


def generated_logits(model: Any, sequences: Sequence[Tokens]) -> torch.Tensor:
    """Logits [vocabulary] of the first sequence's second new token: past the prompt, to probe the cache too."""
    ids, mask = pad_left(sequences, model.get_input_embeddings().weight.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        min_new_tokens=_NEW_TOKENS,
        max_new_tokens=_NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.logits[1][0]
