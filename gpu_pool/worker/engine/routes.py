# pyright: basic
"""Which way a model is computed: along the token tree, or plainly. By its config first, then by comparing the two."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from gpu_pool.worker.engine.announcing import announce_if_long
from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.rope import rope_boundary, stays_changed
from gpu_pool.worker.engine.self_check import check_sequences, compare_trees, unchecked_window
from gpu_pool.worker.engine.shortage import is_out_of_memory

if TYPE_CHECKING:
    from gpu_pool.worker.engine.loaded_model import LoadedModel

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


class Route(enum.StrEnum):
    """How the engine calls a model."""

    TREE = "tree"  # shared beginnings computed once, packed batches, continuous batching
    PLAIN = "plain"  # padded batches of whole sequences, generation by transformers


class Boundary(NamedTuple):
    """The longest sequences that go along the token tree, and why no longer ones do."""

    length: int
    reason: str


def tree_boundary(loaded: LoadedModel) -> Boundary | None:
    """None: sequences of any length do.

    What is beyond a boundary of the rotary embedding must not share a forward pass with shorter sequences.
    """
    found: list[Boundary] = []
    if (length := rope_boundary(loaded)) is not None:
        found.append(Boundary(length, "they go beyond the length from which on its rotary embedding changes"))
    if (window := unchecked_window(loaded)) is not None:
        found.append(Boundary(window, f"they go beyond its window of {window} tokens: to check that would take long"))
    return min(found, default=None)


def choose_route(loaded: LoadedModel) -> tuple[Route, str]:
    """The way that this model is computed, and why."""
    if reason := next(_obstacles(loaded), None):
        return Route.PLAIN, reason
    longest = max(map(len, check_sequences(loaded)))
    announce_if_long(longest, f"checking the tree route on sequences of up to {longest} tokens")
    try:
        found = compare_trees(loaded)
    except Cancelled:
        raise
    except Exception as error:  # a checkpoint's own code raises whatever it likes
        if is_out_of_memory(error):
            few = f"the self-check's sequences of up to {longest} tokens, one by one"
            return Route.PLAIN, f"no memory for {few}: {error}"
        return Route.PLAIN, f"the self-check failed: {type(error).__name__}: {error}"
    if not found.company <= found.most:
        changes = f"what a sequence is padded with changes its logits by {found.company:.2g}"
        return Route.PLAIN, f"the self-check found that {changes} (rounding: at most {found.most:.2g})"
    if not found.difference <= found.allowed:
        differ = f"logits that differ by {found.difference:.2g} (allowed: {found.allowed:.2g})"
        return Route.PLAIN, f"the self-check found {differ}"
    return Route.TREE, f"self-check: logits differ by {found.difference:.1g} (allowed: {found.allowed:.1g})"


def _obstacles(loaded: LoadedModel) -> Iterator[str]:
    """What the tree route is not written for."""
    model, config = loaded.base_model, loaded.text_config
    if not getattr(model, "_supports_attention_backend", False):
        yield f"{type(model).__name__} does not call transformers' attention interface"
    if not loaded.narrows_logits:
        yield "its forward cannot leave out logits"
    if getattr(model, "is_loaded_in_8bit", False):
        yield "products of 8-bit weights depend on all that is in the batch"
    others = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if others:
        yield f"it has layers of other kinds: {', '.join(sorted(map(str, others)))}"
    if getattr(model, "_is_stateful", False):
        yield "it keeps a state instead of keys and values"
    if (boundary := rope_boundary(loaded)) is not None and stays_changed(loaded):
        yield f"its rotary embedding changes with sequences beyond {boundary} tokens, and stays changed"
    adapters = (getattr(loaded.model, "peft_config", None) or {}).values()
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters):
        yield "its adapter begins to work in the middle of a sequence"
    if len(set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))) > 1:
        yield "it is spread over several devices"
