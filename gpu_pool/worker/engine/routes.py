# pyright: basic
"""Which way a model is computed: along the token tree, or plainly. By its config first, then by comparing the two."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gpu_pool.worker.engine.attention import CannotAttend
from gpu_pool.worker.engine.batching import run_halving
from gpu_pool.worker.engine.packed import finish, hold, packed_attention_in, release, run_blocks, run_step
from gpu_pool.worker.engine.padding import pad_right
from gpu_pool.worker.engine.slots import Slots
from gpu_pool.worker.engine.token_tree import Block, lay_out

if TYPE_CHECKING:
    from gpu_pool.worker.engine.loaded_model import LoadedModel

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
_CHANGING_ROPE = {"dynamic", "longrope"}
"""Rotary embeddings whose frequencies depend on the longest sequence of a forward pass."""
_SHORTEST_CHECK = 48
_BRANCH = 12
_NOISE_FACTOR = 8
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Share of the logits' spread by which rounding may change them where less noise was seen."""


class Route(enum.StrEnum):
    """How the engine calls a model."""

    TREE = "tree"  # shared beginnings computed once, packed batches, continuous batching
    PLAIN = "plain"  # padded batches of whole sequences, generation by transformers


def choose_route(loaded: LoadedModel) -> tuple[Route, str]:
    """The way that this model is computed, and why."""
    if reason := next(_obstacles(loaded), None):
        return Route.PLAIN, reason
    try:
        difference, allowed = _compare(loaded)
    except torch.OutOfMemoryError as error:
        longest = max(map(len, _check_sequences(loaded)))
        return Route.PLAIN, f"no memory for the self-check's sequences of up to {longest} tokens, one by one: {error}"
    except (CannotAttend, RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        return Route.PLAIN, f"the self-check failed: {type(error).__name__}: {error}"
    if not difference <= allowed:
        return Route.PLAIN, f"the self-check found logits that differ by {difference:.2g} (allowed: {allowed:.2g})"
    return Route.TREE, f"self-check: logits differ by {difference:.1g} (allowed: {allowed:.1g})"


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
    if (boundary := rope_boundary(loaded)) is not None and any(map(_remembers, _rope_settings(config))):
        yield f"its rotary embedding changes with sequences beyond {boundary} tokens, and stays changed"
    adapters = (getattr(loaded.model, "peft_config", None) or {}).values()
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters):
        yield "its adapter begins to work in the middle of a sequence"
    if len(set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))) > 1:
        yield "it is spread over several devices"


def rope_boundary(loaded: LoadedModel) -> int | None:
    """The length beyond which a batch's longest sequence decides how positions are embedded; None if none can be so."""
    config = loaded.text_config
    for scaling in _rope_settings(config):
        if scaling.get("rope_type", scaling.get("type")) in _CHANGING_ROPE:
            original = scaling.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", 0)
            boundary = int(original or config.max_position_embeddings)
            return boundary if loaded.max_length > boundary else None
    return None


def _remembers(scaling: dict[str, Any]) -> bool:
    """Whether frequencies depend on sequences of earlier forward passes too."""
    return scaling.get("rope_type", scaling.get("type")) == "dynamic"


def _rope_settings(config: Any) -> Iterator[dict[str, Any]]:
    for name in ("rope_parameters", "rope_scaling"):
        settings = getattr(config, name, None)
        if isinstance(settings, dict):
            nested = [value for value in settings.values() if isinstance(value, dict)]
            yield from nested or [settings]


def _reach(loaded: LoadedModel) -> int:
    """How long a sequence must be to go beyond every window, as far as the model goes.

    Beyond a length at which rotary frequencies change nothing goes along the tree; where they do not, none is needed.
    """
    bounds = [getattr(loaded.text_config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = max((int(bound) for bound in bounds if isinstance(bound, int | float)), default=0)
    most = (rope_boundary(loaded) or loaded.max_length) - _BRANCH  # longer ones go the plain way
    return max(min(max(_SHORTEST_CHECK, longest + _SHORTEST_CHECK), most), 2)


@torch.inference_mode()
def _compare(loaded: LoadedModel) -> tuple[float, float]:
    """(largest difference between the logits of both ways, what rounding explains) on a small tree.

    Raises:
        torch.OutOfMemoryError: a single sequence or block needs more memory than there is.
    """
    sequences = _check_sequences(loaded)
    first = [len(tokens) - _BRANCH for tokens in sequences]
    expected = [_plain_logits(loaded, [tokens], start)[0] for tokens, start in zip(sequences, first, strict=True)]
    found = _tree_logits(loaded, sequences, first)
    difference = max(_apart(loaded, *pair) for pair in zip(found, expected, strict=True))
    spread = max(float(logits.max() - logits.min()) for logits in expected)
    return difference, max(_NOISE_FACTOR * _noise(loaded, sequences), _TOLERANCE[loaded.model.dtype] * spread)


def _apart(loaded: LoadedModel, one: torch.Tensor, other: torch.Tensor) -> float:
    """How far a sequence's logits [tokens, vocabulary] are apart.

    In half precision as the median over its tokens: rounding sends single tokens of a mixture to other experts, which
    says nothing about the rest.
    """
    distance = torch.where(one == other, 0.0, (one - other).abs()).nan_to_num(nan=math.inf)  # equal infinities are 0
    by_token = distance.amax(-1)
    return float(by_token.max() if loaded.model.dtype.itemsize > 2 else by_token.median())


def _noise(loaded: LoadedModel, sequences: Sequence[tuple[int, ...]]) -> float:
    """How much the company of a padded batch, of as many as memory takes, changes the short sequences' plain logits."""
    short = [tokens for tokens in sequences if len(tokens) <= 2 * _SHORTEST_CHECK]
    together = run_halving(lambda batch: list(_plain_logits(loaded, batch, 0)), short)
    alone = [_plain_logits(loaded, [tokens], 0)[0] for tokens in short]
    return max(float((one - other[: len(one)]).abs().max()) for one, other in zip(alone, together, strict=True))


def _tree_logits(loaded: LoadedModel, sequences: Sequence[tuple[int, ...]], first: Sequence[int]) -> list[torch.Tensor]:
    """Logits [tokens from `first` on, vocabulary] of each sequence: read in two batches, the last token continued.

    In smaller ones where memory does not suffice.
    """
    layout = lay_out(sequences, first, longest_block=max(map(len, sequences)))
    paths = [path.until(path.end - 1) for path in layout.paths]
    for path in paths:
        hold(path)
    middle, logits = len(layout.blocks) // 2, {}

    def read_blocks(blocks: list[Block]) -> list[None]:
        wanted = [(block, index) for block in blocks for index in range(len(block.tokens))]
        logits.update(zip(wanted, run_blocks(loaded.model, blocks, wanted).float(), strict=True))
        finish(blocks)
        return []

    with packed_attention_in(loaded.model):
        for blocks in (layout.blocks[:middle], layout.blocks[middle:]):  # the second looks back at what was kept
            run_halving(read_blocks, list(blocks))
        slots = Slots(len(sequences), loaded.device)
        for path, start in zip(paths, first, strict=True):
            slots.add(path, start // 2)
        last = run_step(loaded.model, slots, [tokens[-1] for tokens in sequences]).float()
    for path in paths:
        release(path.sources)
    read = [[logits[place] for place in path.locate(start, path.end)] for path, start in zip(paths, first, strict=True)]
    return [torch.stack([*rows, end]) for rows, end in zip(read, last, strict=True)]


def _check_sequences(loaded: LoadedModel) -> list[tuple[int, ...]]:
    """A long beginning with two branches, and two short sequences; sorted."""
    size = loaded.vocabulary

    def tokens(count: int, factor: int) -> tuple[int, ...]:
        return tuple((factor * index * index + 7 * index + factor) % size for index in range(count))

    long, short = tokens(_reach(loaded), 3), tokens(min(_SHORTEST_CHECK, _reach(loaded)) - 1, 5)
    branches = [beginning + tokens(_BRANCH, factor) for beginning in (long, short) for factor in (11, 13)]
    return sorted(set(branches))


def _plain_logits(loaded: LoadedModel, sequences: Sequence[tuple[int, ...]], start: int) -> torch.Tensor:
    ids = pad_right(sequences, loaded.device)
    return loaded.logits(ids, torch.arange(start, ids.shape[1], device=loaded.device)).float()
