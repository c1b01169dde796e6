# pyright: basic
"""The two halves of an encoder-decoder model: contexts in, states out; states and a decoder's row in, logits out.

Padding stands on the right, behind an attention mask, where it moves no position.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from gpu_pool.worker.engine.padding import Company

Tokens = tuple[int, ...]

_PROBE_LENGTH = 6
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.1
"""Share of the logits' spread that company may change, in fp32 and below: rounding does less."""


def pad_contexts(sequences: Sequence[Tokens], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask [rows, longest], filled on the right.

    The filling is each row's own first token: processors that look at which tokens a prompt contains then see the same
    set whatever it is batched with.
    """
    width = max(map(len, sequences))
    ids = [[*tokens, *[tokens[0]] * (width - len(tokens))] for tokens in sequences]
    mask = [[*[1] * len(tokens), *[0] * (width - len(tokens))] for tokens in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def encode(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> ModelOutput:
    """What the encoder makes of right-padded `ids`: `last_hidden_state` is [rows, width, size]."""
    return model.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)


def select(encoded: Any, places: torch.Tensor) -> ModelOutput:
    """Rows `places` of what the encoder made, of the same type, because some decoders look for their own fields."""
    states = encoded.last_hidden_state
    return type(encoded)(last_hidden_state=states[places.to(states.device)])


def decode(model: Any, encoded: ModelOutput, mask: torch.Tensor, decoder_ids: torch.Tensor) -> torch.Tensor:
    """Logits [rows, decoder width, vocabulary]; right padding of `decoder_ids` is never looked at."""
    options = {"encoder_outputs": encoded, "attention_mask": mask, "use_cache": False}
    return model(decoder_input_ids=decoder_ids, **options).logits


def decoder_inputs(model: Any, continuation: Tokens) -> Tokens:
    """What the model's own forward makes of `labels`: shifted right by one, behind a token that each model chooses."""
    labels = torch.tensor([continuation])
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
    else:  # the function that its forward calls
        shift = sys.modules[type(model.get_encoder()).__module__].shift_tokens_right
        shifted = shift(labels, model.config.pad_token_id, model.config.decoder_start_token_id)
    return tuple(shifted[0].tolist())


@torch.inference_mode()
def probe_encoder_company(model: Any) -> Company:
    """Which contexts may be encoded together without changing each other's answers: ask the model."""
    embedding = model.get_input_embeddings().weight
    first, second, longer = (
        tuple((factor * index + 3) % len(embedding) for index in range(length))
        for factor, length in ((7, _PROBE_LENGTH), (5, _PROBE_LENGTH), (11, 2 * _PROBE_LENGTH))
    )

    def logits(*contexts: Tokens) -> torch.Tensor:
        """Of the first context's decoder row [2, vocabulary]."""
        ids, mask = pad_contexts(contexts, embedding.device)
        decoder_ids = torch.tensor([decoder_inputs(model, (3, 4))] * len(contexts), device=embedding.device)
        return decode(model, encode(model, ids, mask), mask, decoder_ids)[0].float()

    alone = logits(first)
    share = _TOLERANCE if model.dtype in (torch.float32, torch.float64) else _HALF_TOLERANCE
    allowed = share * (alone.max() - alone.min())
    for company, other in ((Company.ANY_LENGTH, longer), (Company.EQUAL_LENGTH, second)):
        if (alone - logits(first, other)).abs().max() <= allowed:
            return company
    return Company.NONE
