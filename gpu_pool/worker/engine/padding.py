# pyright: basic
"""Padding sequences to one width."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pad_right(sequences: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Ids [rows, longest], filled on the right: no causal model looks at what stands behind a sequence."""
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
