# pyright: basic
"""Logits of a forward pass some positions at a time: the layers are run once, what follows them for each piece.

What follows is the model's own code, its head with scaling and soft caps, run as it is: the layers only return a part
of the states that they have computed before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.company import are_equal
from gpu_pool.worker.engine.shortage import is_out_of_memory

Forward = Callable[[], torch.Tensor]
"""A forward pass: logits [rows, width, vocabulary]."""


def logits_in_pieces(layers: Any, forward: Forward, positions: range) -> Iterator[torch.Tensor]:
    """Logits [rows, some, vocabulary] of `positions`, at most `positions.step` at a time; the last one ends the row.

    What a model puts before a row's own tokens is not counted. `layers` is what `find_layers` has found.
    """
    run, whole = layers.forward, None

    def states(start: int, end: int, *args: Any, **kwargs: Any) -> ModelOutput:
        nonlocal whole
        if whole is None:
            whole = run(*args, **kwargs)
        hidden = whole.last_hidden_state
        before = hidden.shape[1] - positions.stop
        return type(whole)(**{**whole, "last_hidden_state": hidden[:, before + start : before + end]})

    for start in positions:
        end = min(start + positions.step, positions.stop)
        with _standing_in(layers, partial(states, start, end)):
            logits = forward()
        yield logits


@torch.inference_mode()
def find_layers(model: Any, forward: Forward, width: int) -> Any:
    """The module of `model` whose states are all that its head reads, position by position; None where none is.

    Found by trying `forward`, which computes a row of `width` tokens.
    """
    expected = forward()[:, -width:]
    for layers in (model.get_decoder(), *model.children()):
        try:
            found = torch.cat(list(logits_in_pieces(layers, forward, range(0, width, 2))), dim=1)
        except Cancelled:
            raise
        except Exception as error:  # it returns something else, or what follows needs all of it
            if is_out_of_memory(error):
                raise
            continue
        if found.shape == expected.shape and are_equal(found, expected, model.dtype):
            return layers
    return None


@contextmanager
def _standing_in(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module` be computed by `forward` meanwhile."""
    own = vars(module).get("forward")  # a library's that has wrapped the class's
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
