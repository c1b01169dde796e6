# pyright: basic
"""Padding sequences to one width, and which models' answers survive it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch

_PROBE_LENGTH = 6
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 0.1
"""Share of the logits' spread that company may change: rounding does less, a polluted state more."""


def pad_right(sequences: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Ids [rows, longest]; what stands behind a sequence is never looked at."""
    width = max(map(len, sequences))
    return torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in sequences], device=device)


def pad_left(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask [rows, longest].

    The filling is each row's own first token: it is masked anyway, and processors that look at which tokens a row
    contains (repetition penalties) then see the same set whatever the row is batched with.
    """
    width = max(map(len, sequences))
    ids = [[*[tokens[0]] * (width - len(tokens)), *tokens] for tokens in sequences]
    mask = [[*[0] * (width - len(tokens)), *[1] * len(tokens)] for tokens in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class Company(enum.Enum):
    """Which prompts a model can continue together without changing each other's answers."""

    ANY_LENGTH = "any length"
    EQUAL_LENGTH = "equal length"  # some recurrent models let padding into their state, attention mask or not
    NONE = "none"  # and some mix the rows of a batch up

    def allows(self, width: int, length: int) -> bool:
        """Whether prompts of these lengths may meet."""
        return self is Company.ANY_LENGTH or (self is Company.EQUAL_LENGTH and width == length)


@torch.inference_mode()
def probe_company(model: Any) -> Company:
    """Ask the model, with three generations of two tokens."""
    embedding = model.get_input_embeddings().weight
    first, second, longer = (
        [(factor * index + 3) % len(embedding) for index in range(length)]
        for factor, length in ((7, _PROBE_LENGTH), (5, _PROBE_LENGTH), (11, 2 * _PROBE_LENGTH))
    )
    alone = _second_logits(model, [first], embedding.device)
    allowed = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE) * (alone.max() - alone.min())
    for company, other in ((Company.ANY_LENGTH, longer), (Company.EQUAL_LENGTH, second)):
        if (alone - _second_logits(model, [first, other], embedding.device)).abs().max() <= allowed:
            return company
    return Company.NONE


def _second_logits(model: Any, sequences: list[list[int]], device: torch.device) -> torch.Tensor:
    """Logits [vocabulary] of the first sequence's second new token: past the prompt, to probe the cache too."""
    ids, mask = pad_left(sequences, device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        min_new_tokens=2,
        max_new_tokens=2,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.logits[1][0].float()
