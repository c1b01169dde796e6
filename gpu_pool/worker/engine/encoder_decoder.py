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

from gpu_pool.worker.engine.blocks import Tokens


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


def decoded_logits(model: Any, contexts: Sequence[Tokens], continuation: Tokens) -> torch.Tensor:
    """Logits [contexts, len(continuation), vocabulary] that score a continuation after each of these contexts."""
    device = model.get_input_embeddings().weight.device
    ids, mask = pad_contexts(contexts, device)
    decoder_ids = torch.tensor([decoder_inputs(model, continuation)] * len(contexts), device=device)
    return decode(model, encode(model, ids, mask), mask, decoder_ids)
