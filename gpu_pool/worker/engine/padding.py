# pyright: basic
"""Padding sequences to one width, and whether a model's answers survive it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_PROBE_LENGTH, _PROBE_PADDING = 6, 5
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 0.1
"""Share of the logits' spread that padding may change: rounding does less, a state polluted by padding more."""


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


@torch.inference_mode()
def tolerates_left_padding(model: Any) -> bool:
    """Ask the model: some recurrent ones let padding into their state, attention mask or not."""
    embedding = model.get_input_embeddings().weight
    probe = [(7 * index + 3) % len(embedding) for index in range(_PROBE_LENGTH)]
    longer = [(5 * index + 2) % len(embedding) for index in range(_PROBE_LENGTH + _PROBE_PADDING)]
    alone = _second_logits(model, [probe], embedding.device)
    padded = _second_logits(model, [probe, longer], embedding.device)
    tolerance = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE)
    return bool((alone - padded).abs().max() <= tolerance * (alone.max() - alone.min()))


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
